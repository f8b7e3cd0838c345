"""What a norm_stats.json holds: the numbers in openpi's form, and hvd's record of what they were computed from.

    {"norm_stats": {"state": {"mean", "std", "q01", "q99"}, "actions": {...}}, "made_of": {...}}

openpi reads the first and ignores the second; a file without a record (openpi's own, an older hvd's) is taken as it is.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from etils import epath
from msgspec import Meta

from hvd import documents
from hvd.configs import DataConfig, Experiment
from hvd.data.columns import parse_column
from hvd.data.dataset import Dataset
from hvd.data.running_stats import NormStats
from hvd.documents import Count
from hvd.errors import UserError
from hvd.robots import get_robot

AGAIN = "run `hvd norm-stats`"

_Number = Annotated[float, Meta(ge=-1e9, le=1e9)]
_Spread = Annotated[float, Meta(ge=0, le=1e9)]
_Dims = Meta(min_length=1, max_length=4096)


class _Numbers(msgspec.Struct):
    mean: Annotated[list[_Number], _Dims]
    std: Annotated[list[_Spread], _Dims]
    q01: Annotated[list[_Number], _Dims] | None = None
    q99: Annotated[list[_Number], _Dims] | None = None


class _Both(msgspec.Struct):
    state: _Numbers
    actions: _Numbers


@dataclass(frozen=True)
class MadeOf:
    """What statistics were computed from.

    Attributes:
        frames: of the dataset, those that its config offers.
        delta_dims: action dims taken relative to the state at a chunk's start; () = absolute actions.
        horizon: actions of a chunk.
        state, actions: the dataset's columns, in the order in which they are joined.
        state_dims, action_dims: the name of each dim (Dataset.state_dims).
    """

    dataset: str
    digest: str
    frames: Count
    robot: str
    delta_dims: tuple[Count, ...]
    horizon: Count
    state: tuple[str, ...]
    actions: tuple[str, ...]
    state_dims: tuple[str, ...]
    action_dims: tuple[str, ...]

    @classmethod
    def of(cls, cfg: Experiment, dataset: Dataset) -> "MadeOf":
        """The record of the statistics that `hvd norm-stats` computes of `dataset`, the experiment's first one."""
        robot, keys = get_robot(cfg.robot), first_set(cfg)[1].keys
        delta = tuple(np.flatnonzero(robot.delta_mask()).tolist()) if cfg.norm.delta_actions else ()
        return cls(
            dataset.name,
            dataset.digest,
            len(dataset.rows()),
            robot.name,
            delta,
            cfg.model.action_horizon,
            keys.state,
            keys.actions,
            dataset.state_dims,
            dataset.action_dims,
        )


class _File(msgspec.Struct):
    norm_stats: _Both
    made_of: MadeOf | None = None


def first_set(cfg: Experiment) -> tuple[str, DataConfig]:
    """Name and config of the set that statistics come from: the optimal one where there is one."""
    found = [(name, data) for name, data in cfg.sets().items() if data.repo_id]
    if not found:
        raise UserError(f"config {cfg.name}: no dataset; set optimal_data.repo_id")
    return found[0]


def read(path: epath.Path) -> tuple[dict[str, NormStats], MadeOf | None]:
    """The statistics in a norm_stats.json and their record; groups other than state and actions are ignored.

    Raises:
        UserError: names the file and the field.
    """
    try:
        found = documents.read(path, _File)
    except FileNotFoundError:
        raise UserError(f"{path}: norm stats are missing; {AGAIN}") from None
    except UserError as error:
        raise UserError(f"{error}; {AGAIN}") from None
    both = {"state": found.norm_stats.state, "actions": found.norm_stats.actions}
    return {name: _arrays(numbers, f"{path}: {name}") for name, numbers in both.items()}, found.made_of


def _arrays(numbers: _Numbers, where: str) -> NormStats:
    given = [numbers.mean, numbers.std]
    if numbers.q01 is not None and numbers.q99 is not None:
        given += [numbers.q01, numbers.q99]
    if len({len(each) for each in given}) != 1:
        raise UserError(f"{where}: mean, std, q01 and q99 must be lists of one length; {AGAIN}")
    arrays = [np.asarray(each, np.float64) for each in given]
    if len(arrays) == 4 and (arrays[2] > arrays[3]).any():
        dim = int(np.argmax(arrays[2] > arrays[3]))
        raise UserError(f"{where}: q01[{dim}] is above q99[{dim}]; {AGAIN}")
    return NormStats(*arrays)


def to_json(stats: Mapping[str, NormStats], made_of: MadeOf | None) -> str:
    """The content of a norm_stats.json."""
    content: dict[str, Any] = {"norm_stats": {name: each.lists() for name, each in stats.items()}}
    if made_of is not None:
        content["made_of"] = msgspec.to_builtins(made_of)
    return json.dumps(content, indent=2) + "\n"


def check_use(path: epath.Path, cfg: Experiment, stats: Mapping[str, NormStats], made_of: MadeOf | None) -> None:
    """Raise UserError where `cfg` would use the statistics of `path` for something else than they are of."""
    robot = get_robot(cfg.robot)
    again = f"run `hvd norm-stats --config {cfg.name}`"
    if stats["actions"].dim != robot.action_dim:
        dims = f"{stats['actions'].dim} action dims, {robot.name} has {robot.action_dim}"
        raise UserError(f"{path}: norm stats of another robot ({dims}); {again}")
    if cfg.norm.mode == "quantile":
        for name, each in stats.items():
            if each.q01 is None or each.q99 is None:
                raise UserError(f"{path}: {name} has no q01 and q99, which norm.mode quantile needs; {again}")
    if made_of is None:
        return
    keys = first_set(cfg)[1].keys
    delta = np.flatnonzero(robot.delta_mask()).tolist() if cfg.norm.delta_actions else []
    pairs = [
        ("robot", made_of.robot, robot.name),
        ("norm.delta_actions: relative action dims", list(made_of.delta_dims), delta),
        ("keys.state", _selected(made_of.state), _selected(keys.state)),
        ("keys.actions", _selected(made_of.actions), _selected(keys.actions)),
    ]
    if made_of.delta_dims:  # of absolute actions each frame counts once, whatever the horizon
        pairs.append(("model.action_horizon", made_of.horizon, cfg.model.action_horizon))
    _refuse_other(path, pairs, again)


def check_data(path: epath.Path, cfg: Experiment, made_of: MadeOf | None, datasets: Mapping[str, Dataset]) -> None:
    """Raise UserError where the set that the statistics are of has changed, or where the `datasets`, by the names of
    their sets, have the same dims in another order."""
    own = datasets.get(first_set(cfg)[0])
    if made_of is not None and own is not None:
        now = MadeOf.of(cfg, own)
        pairs = [
            ("state dims", made_of.state_dims, now.state_dims),
            ("action dims", made_of.action_dims, now.action_dims),
            ("number of frames", made_of.frames, now.frames),
            ("digest of the dataset", made_of.digest, now.digest),
        ]
        _refuse_other(path, pairs, f"run `hvd norm-stats --config {cfg.name}`")
    dataset, *others = datasets.values()
    for other in others:
        for what in ("state_dims", "action_dims"):
            _check_order(what.split("_")[0], dataset, other, getattr(dataset, what), getattr(other, what))


def _refuse_other(path: epath.Path, pairs: list[tuple[str, Any, Any]], again: str) -> None:
    for what, theirs, ours in pairs:
        if theirs != ours:
            raise UserError(f"{path}: these norm stats are of other data: {_difference(what, theirs, ours)}; {again}")


def _difference(what: str, theirs: Any, ours: Any) -> str:
    if isinstance(theirs, tuple) and isinstance(ours, tuple) and len(theirs) == len(ours) > 1:
        dim = next(i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
        what, theirs, ours = f"{what}[{dim}]", theirs[dim], ours[dim]
    return f"{what} {theirs} there, {ours} here"


def _selected(columns: tuple[str, ...]) -> list[str]:
    """Columns in one spelling: "a[0:2]" and "a[0,1]" are the same."""
    return [name if dims is None else f"{name}{dims}" for name, dims in map(parse_column, columns)]


def _check_order(what: str, first: Dataset, other: Dataset, ours: tuple[str, ...], theirs: tuple[str, ...]) -> None:
    """Two datasets may name their dims in two ways, but the same names must be in the same order."""
    for mine, its in ((ours, theirs), (_own_names(ours), _own_names(theirs))):
        if mine and its and mine != its and sorted(mine) == sorted(its):
            raise UserError(
                f"{other.name} and {first.name} have the same {what} dims in another order "
                f"({_difference('dim', mine, its)}); datasets of one experiment share their statistics, set keys"
            )


def _own_names(dims: tuple[str, ...]) -> tuple[str, ...]:
    """The names that a dataset gives its dims; () unless all have one."""
    names = [dim.partition(" ")[2] for dim in dims]
    return tuple(names) if all(names) else ()
