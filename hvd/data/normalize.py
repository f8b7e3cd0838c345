"""Normalisation of state and actions, and its statistics: one pass over numeric columns, never an image.

Statistics come from the optimal dataset alone and are shared, by content, by all datasets of an experiment
(docs/method.md, "The policy stage"). Files have openpi's format, norm_stats.json:
{"norm_stats": {"state": {"mean", "std", "q01", "q99"}, "actions": {...}}}, with the robot's dims, not padded.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
from etils import epath
from jaxtyping import Float, Float64

from hvd.configs import DataConfig, Experiment, NormConfig
from hvd.data import norm_record
from hvd.data.dataset import Dataset, check_rates
from hvd.data.norm_record import MadeOf
from hvd.data.running_stats import NormStats, RunningStats
from hvd.data.transitions import Transitions
from hvd.errors import UserError
from hvd.files import write_shared
from hvd.robots import Robot, get_robot

EPSILON = 1e-6  # openpi adds it to std and to the quantile range
STILL = 1e-4  # a scale below this, in the dim's own unit, is said aloud
FAR = 50.0  # a normalised value beyond this is said aloud
_ROWS = 1 << 16  # rows of a chunk of the pass

Mode = Literal["z_score", "quantile"]
Stats = dict[str, NormStats]
Ranges = dict[str, tuple[np.ndarray, np.ndarray]]
"""Least and largest value of each dim of "state" and "actions"."""


def _quantiles(stats: NormStats) -> tuple[Float64[np.ndarray, " d"], Float64[np.ndarray, " d"]]:
    if stats.q01 is None or stats.q99 is None:
        raise UserError("these norm stats have no q01 and q99, which norm.mode quantile needs; run `hvd norm-stats`")
    return stats.q01, stats.q99


def _terms(stats: NormStats, mode: Mode, std_floor: float, dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale so that normalised = (x - shift) / scale; both [dims]."""
    if mode == "z_score":
        return stats.mean[:dims], np.maximum(stats.std[:dims], std_floor) + EPSILON
    q01, q99 = _quantiles(stats)
    half = (q99[:dims] - q01[:dims] + EPSILON) / 2
    return q01[:dims] + half, np.maximum(half, std_floor)


def normalize(
    x: Float[np.ndarray, "*n d"], stats: NormStats, mode: Mode = "z_score", std_floor: float = 0.0
) -> Float64[np.ndarray, "*n d"]:
    """z_score: (x - mean) / (std + 1e-6); quantile: q01..q99 to -1..1. x may have fewer dims than the statistics.

    Quantile in openpi's order of operations: the bins of pi0.5's prompts show the last bit of a number.
    """
    dims = x.shape[-1]
    shift, scale = _terms(stats, mode, std_floor, dims)
    if mode == "z_score":
        return (x - shift) / scale
    q01, q99 = _quantiles(stats)
    width = q99[:dims] - q01[:dims] + EPSILON
    return ((x - q01[:dims]) / width * 2 - 1) * (width / 2 / scale)


def unnormalize(
    x: Float[np.ndarray, "*n d"], stats: NormStats, mode: Mode = "z_score", std_floor: float = 0.0
) -> Float64[np.ndarray, "*n d"]:
    """The inverse of `normalize`; x may have fewer dims than the statistics, further dims are an error."""
    if x.shape[-1] > stats.dim:
        raise ValueError(f"{x.shape[-1]} dims, statistics of {stats.dim}: cut the padding first")
    shift, scale = _terms(stats, mode, std_floor, x.shape[-1])
    return x * scale + shift


def compute(
    datasets: Sequence[Dataset], norm: NormConfig, robot: Robot, horizon: int, ranges: Ranges | None = None
) -> Stats:
    """Statistics of state and actions over the datasets' offered rows.

    With delta actions: over the differences to the state at the chunk's start, for all real steps of all chunks.

    Args:
        ranges: of these datasets, where they are known.
    """
    for dataset in datasets:
        check_delta(norm, robot, dataset.state.shape[1])
    ranges = ranges or ranges_of(datasets, norm, robot, horizon)
    stats: Stats = {}
    for name in ("state", "actions"):
        running = RunningStats(*ranges[name])
        for part in _parts(datasets, norm, robot, horizon, name):
            running.update(part)
        stats[name] = running.result()
    return stats


def ranges_of(datasets: Sequence[Dataset], norm: NormConfig, robot: Robot, horizon: int) -> Ranges:
    """The ranges of what `compute` takes the statistics of."""
    found: Ranges = {}
    for name in ("state", "actions"):
        low, high = None, None
        for part in _parts(datasets, norm, robot, horizon, name):
            low = part.min(0) if low is None else np.minimum(low, part.min(0))
            high = part.max(0) if high is None else np.maximum(high, part.max(0))
        if low is None or high is None:
            raise UserError("statistics need at least two frames")
        found[name] = low, high
    return found


def far_values(dataset: Dataset, ranges: Ranges, stats: Mapping[str, NormStats], norm: NormConfig) -> list[str]:
    """A line for the state and one for the actions where normalised values of `dataset`, which has these `ranges`, go
    far beyond what a model can learn from: dims that hardly move where the statistics come from."""
    lines = []
    for name, dims in (("state", dataset.state_dims), ("actions", dataset.action_dims)):
        ends = np.stack(ranges[name]).astype(np.float64)
        worst = np.abs(normalize(ends, stats[name], norm.mode, norm.std_floor)).max(0)
        found = [
            f"{dim} ({dims[dim] if dims else name}) reaches {worst[dim]:.3g}" for dim in np.flatnonzero(worst > FAR)
        ]
        if found:
            more = f" and {len(found) - 8} more" if len(found) > 8 else ""
            lines.append(
                f"warning: {dataset.name}: {name.removesuffix('s')} dim {', '.join(found[:8])}{more} once normalised, "
                "because it hardly moves in the statistics: raise norm.std_floor, or leave the dim out of keys"
            )
    return lines


def _parts(
    datasets: Sequence[Dataset], norm: NormConfig, robot: Robot, horizon: int, name: str
) -> Iterator[Float[np.ndarray, "n d"]]:
    for dataset in datasets:
        rows = dataset.rows()
        if name == "actions" and norm.delta_actions:
            transitions = Transitions(dataset, horizon)
            for start in range(0, len(rows), max(1, _ROWS // horizon)):
                part = rows[start : start + max(1, _ROWS // horizon)]
                chunk = transitions.chunk(part)
                yield delta(chunk.actions, dataset.state[part], np.asarray(robot.delta_mask()))[chunk.action_mask]
        else:
            array = dataset.state if name == "state" else dataset.actions
            for start in range(0, len(rows), _ROWS):
                yield array[rows[start : start + _ROWS]]


def delta(
    actions: Float[np.ndarray, "*n k a"], state: Float[np.ndarray, "*n s"], mask: np.ndarray
) -> Float[np.ndarray, "*n k a"]:
    """Actions relative to the state at the chunk's start in the dims where `mask` [<= a] is true."""
    return actions - _held(actions, state, mask)


def absolute(
    actions: Float[np.ndarray, "*n k a"], state: Float[np.ndarray, "*n s"], mask: np.ndarray
) -> Float[np.ndarray, "*n k a"]:
    """The inverse of `delta`."""
    return actions + _held(actions, state, mask)


def check_delta(norm: NormConfig, robot: Robot, state_dim: int) -> None:
    """Delta actions need a state whose first dims are the robot's."""
    needed = max(robot.position_dims, default=-1) + 1
    if norm.delta_actions and state_dim < needed:
        raise UserError(
            f"norm.delta_actions needs a state that begins with the dims of robot {robot.name} ({needed} of them), "
            f"but the state has {state_dim}; set keys.state or norm.delta_actions False"
        )


def _held(actions: np.ndarray, state: np.ndarray, mask: np.ndarray) -> np.ndarray:
    held = np.zeros((*actions.shape[:-2], 1, actions.shape[-1]), actions.dtype)
    dims = len(mask)
    held[..., 0, :dims] = np.where(mask, state[..., :dims], 0)
    return held


def path_for(cfg: Experiment, repo_id: str) -> epath.Path:
    """<assets_dir>/<experiment>/<repo_id>/norm_stats.json"""
    return epath.Path(cfg.assets_dir) / (cfg.exp_name or cfg.name) / repo_id / "norm_stats.json"


def save(path: epath.Path, stats: Mapping[str, NormStats], made_of: MadeOf | None = None) -> None:
    """Write a norm_stats.json in one step."""
    try:
        write_shared(path, norm_record.to_json(stats, made_of))
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror})") from error


def load(path: epath.Path) -> Stats:
    """The statistics in a norm_stats.json, whatever they are of. Raises UserError naming file and field."""
    return norm_record.read(path)[0]


def load_for(cfg: Experiment, path: epath.Path) -> tuple[Stats, MadeOf | None]:
    """The statistics in a norm_stats.json and their record, for the use that `cfg` makes of them.

    Raises:
        UserError: names the file and the field, or what else they are of.
    """
    stats, made_of = norm_record.read(path)
    norm_record.check_use(path, cfg, stats, made_of)
    return stats, made_of


def datasets_of(cfg: Experiment) -> tuple[DataConfig, ...]:
    """The experiment's datasets, the optimal one first."""
    norm_record.first_set(cfg)
    return tuple(d for d in cfg.sets().values() if d.repo_id)


def load_shared(cfg: Experiment) -> Stats:
    """The statistics that all datasets of the experiment share.

    Raises UserError when a file is missing, two datasets have different statistics, or they are of something else than
    this experiment: another robot, other columns, actions that are relative or not.
    """
    return read_shared(cfg)[0]


def read_shared(cfg: Experiment) -> tuple[Stats, MadeOf | None]:
    """`load_shared`, with the record of what the statistics are of."""
    paths = [path_for(cfg, data.repo_id) for data in datasets_of(cfg)]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: norm stats are missing; run `hvd norm-stats --config {cfg.name}`")
    found = [load_for(cfg, path) for path in paths]
    for path, (stats, made_of) in zip(paths, found, strict=True):
        if not equal(stats, found[0][0]) or (made_of and found[0][1] and made_of != found[0][1]):
            raise UserError(
                f"{paths[0]} and {path}: different statistics for two datasets of one experiment; "
                f"run `hvd norm-stats --config {cfg.name}`"
            )
    return found[0]


def for_data(cfg: Experiment, datasets: Mapping[str, Dataset]) -> tuple[Stats, MadeOf | None, list[str]]:
    """`read_shared` for these open datasets, by the names of their sets, and lines about what the user should know.

    Raises UserError also where the statistics are of other contents of the optimal set, or where the datasets have
    the same dims in another order.
    """
    path = path_for(cfg, norm_record.first_set(cfg)[1].repo_id)
    stats, made_of = read_shared(cfg)
    norm_record.check_data(path, cfg, made_of, datasets)
    said = [] if made_of else [f"{path}: it does not say what these norm stats are of (an older hvd's, or openpi's)"]
    robot, horizon = get_robot(cfg.robot), cfg.model.action_horizon
    check_delta(cfg.norm, robot, stats["state"].dim)
    for dataset in datasets.values():
        if all(x.shape[1] == stats[n].dim for n, x in (("state", dataset.state), ("actions", dataset.actions))):
            said += far_values(dataset, ranges_of([dataset], cfg.norm, robot, horizon), stats, cfg.norm)
    return stats, made_of, list(dict.fromkeys(said))


def equal(a: Mapping[str, NormStats], b: Mapping[str, NormStats]) -> bool:
    return {name: each.lists() for name, each in a.items()} == {name: each.lists() for name, each in b.items()}


def main(cfg: Experiment) -> None:
    """`hvd norm-stats`: statistics of the optimal dataset, written for every dataset of the experiment."""
    configs = datasets_of(cfg)
    check_rates(cfg.datasets())
    begin = time.perf_counter()
    opened = [
        Dataset.open(c, cameras=(), robot=cfg.robot, horizon=cfg.model.action_horizon)
        for c in configs
        if c is configs[0] or c.path().exists()  # the value stage alone needs no suboptimal set
    ]
    dataset = opened[0]
    for other in opened[1:]:
        if other.state.shape[1] != dataset.state.shape[1]:
            raise UserError(
                f"{other.name}: state has {other.state.shape[1]} dims, that of {dataset.name} has "
                f"{dataset.state.shape[1]}; datasets of one experiment share their statistics, set keys.state"
            )
    robot, horizon = get_robot(cfg.robot), cfg.model.action_horizon
    check_delta(cfg.norm, robot, dataset.state.shape[1])
    ranges = ranges_of([dataset], cfg.norm, robot, horizon)
    stats = compute([dataset], cfg.norm, robot, horizon, ranges)
    made_of = MadeOf.of(cfg, dataset)
    norm_record.check_data(path_for(cfg, configs[0].repo_id), cfg, None, {str(i): d for i, d in enumerate(opened)})
    kind = "delta" if cfg.norm.delta_actions else "absolute"
    print(
        f"{dataset.name}: {len(dataset.rows())} frames, state of {stats['state'].dim} dims, {kind} actions of "
        f"{stats['actions'].dim}, {time.perf_counter() - begin:.2f} s"
    )
    for name in ("state", "actions"):
        still = np.flatnonzero(_terms(stats[name], cfg.norm.mode, 0.0, stats[name].dim)[1] < STILL).tolist()
        if still and cfg.norm.std_floor < STILL:
            what = name.removesuffix("s")
            print(f"{what} dims {still} hardly move here: norm.std_floor keeps them from exploding where they do move")
    others = {id(d): d for d in opened[1:] if (d.root, d.episodes) != (dataset.root, dataset.episodes)}
    lines = far_values(dataset, ranges, stats, cfg.norm)
    for other in others.values():
        lines += far_values(other, ranges_of([other], cfg.norm, robot, horizon), stats, cfg.norm)
    for line in lines:
        print(line)
    for data in configs:
        path = path_for(cfg, data.repo_id)
        state = _state(path, stats, made_of)
        save(path, stats, made_of)
        print(f"{path}: {state}")


def _state(path: epath.Path, stats: Stats, made_of: MadeOf) -> str:
    """What writing these statistics to `path` does, in a word."""
    if not path.exists():
        return "written"
    try:
        before = norm_record.read(path)
    except UserError:
        return "replaced: it was damaged"
    if not equal(before[0], stats):
        return "replaced: the statistics have changed"
    return "unchanged" if before[1] == made_of else "the same statistics, with a new record of what they are of"
