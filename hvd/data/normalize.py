"""Normalisation of state and actions, and its statistics: one pass over numeric columns, never an image.

Statistics come from the optimal dataset alone and are shared, by content, by all datasets of an experiment
(docs/method.md, "The policy stage"). Files have openpi's format, norm_stats.json:
{"norm_stats": {"state": {"mean", "std", "q01", "q99"}, "actions": {...}}}, with the robot's dims, not padded.
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from etils import epath
from jaxtyping import Float, Float64

from hvd.configs import DataConfig, Experiment, NormConfig
from hvd.data.dataset import Dataset
from hvd.data.transitions import Transitions
from hvd.errors import UserError
from hvd.files import write_atomic
from hvd.robots import Robot, get_robot

EPSILON = 1e-6  # openpi adds it to std and to the quantile range
BINS = 5000
STILL = 1e-4  # a standard deviation below this, in the dim's own unit, is said aloud
_ROWS = 1 << 16  # rows of a chunk of the pass

Mode = Literal["z_score", "quantile"]
Stats = dict[str, "NormStats"]


@dataclass(frozen=True)
class NormStats:
    """Mean, population std and the 1% and 99% quantiles per dim."""

    mean: Float64[np.ndarray, " d"]
    std: Float64[np.ndarray, " d"]
    q01: Float64[np.ndarray, " d"]
    q99: Float64[np.ndarray, " d"]

    @property
    def dim(self) -> int:
        return len(self.mean)


class RunningStats:
    """Statistics of vectors that come in batches, as openpi computes them: quantiles from 5000 bins per dim.

    A batch outside the range seen so far widens the bins, and what was counted moves with the lower edge of its old
    bin; that may lose the lowest bin's counts (openpi's way too). `compute` gives the range beforehand instead.
    """

    def __init__(self, low: Float[np.ndarray, " d"] | None = None, high: Float[np.ndarray, " d"] | None = None):
        self.count = 0
        self._low, self._high = low, high
        self._edges: Float64[np.ndarray, "d bins_plus_1"] | None = None

    def update(self, batch: Float[np.ndarray, "*n d"]) -> None:
        batch = batch.reshape(-1, batch.shape[-1])
        if not len(batch):
            return
        wide = batch.astype(np.float64)
        low, high = wide.min(0), wide.max(0)
        mean, square = wide.mean(0), np.square(wide).mean(0)
        if self._edges is None:
            self._mean, self._square = np.zeros_like(mean), np.zeros_like(square)
            self._counts = np.zeros((batch.shape[1], BINS))
            self._low = low if self._low is None else self._low.astype(np.float64)
            self._high = high if self._high is None else self._high.astype(np.float64)
            # openpi widens the first range a little, so that constant dims have bins too
            self._edges = _linspace(self._low - 1e-10, self._high + 1e-10)
        if np.any(low < self._low) or np.any(high > self._high):
            self._low, self._high = np.minimum(low, self._low), np.maximum(high, self._high)
            edges = _linspace(self._low, self._high)
            self._counts = _histogram(self._edges[:, :-1].T, edges, self._counts.T)
            self._edges = edges
        self.count += len(batch)
        share = len(batch) / self.count
        self._mean += (mean - self._mean) * share
        self._square += (square - self._square) * share
        self._counts += _histogram(wide, self._edges)

    def result(self) -> NormStats:
        if self.count < 2 or self._edges is None:
            raise UserError("statistics need at least two frames")
        std = np.sqrt(np.maximum(0.0, self._square - np.square(self._mean)))
        return NormStats(self._mean, std, self._quantile(0.01), self._quantile(0.99))

    def _quantile(self, q: float) -> Float64[np.ndarray, " d"]:
        assert self._edges is not None
        reached = np.cumsum(self._counts, axis=1) < q * self.count
        return np.take_along_axis(self._edges, reached.sum(1)[:, None], axis=1)[:, 0]


def _linspace(low: np.ndarray, high: np.ndarray) -> Float64[np.ndarray, "d bins_plus_1"]:
    return np.linspace(low, high, BINS + 1, axis=1).astype(np.float64)


def _histogram(
    x: Float64[np.ndarray, "n d"], edges: Float64[np.ndarray, "d bins_plus_1"], weights: np.ndarray | None = None
) -> Float64[np.ndarray, "d bins"]:
    """np.histogram of each column with its own equidistant edges, in linear time; weights have the shape of x."""
    d = x.shape[1]
    low, high = edges[:, 0], edges[:, -1]
    width = np.where(high > low, high - low, 1.0)
    at = np.clip(((x - low) * (BINS / width)).astype(np.int64), 0, BINS - 1)
    # rounding can miss by one bin: compare with the edges themselves
    flat = edges.reshape(-1)
    base = np.arange(d) * (BINS + 1)
    at -= x < flat[base + at]
    at += (x >= flat[base + at + 1]) & (at < BINS - 1)
    inside = (x >= low) & (x <= high)
    index = (at + np.arange(d) * BINS)[inside]
    counts = np.bincount(index, None if weights is None else weights[inside], d * BINS)
    return counts.reshape(d, BINS).astype(np.float64)


def _terms(stats: NormStats, mode: Mode, std_floor: float, dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale so that normalised = (x - shift) / scale; both [dims]."""
    if mode == "z_score":
        return stats.mean[:dims], np.maximum(stats.std[:dims], std_floor) + EPSILON
    half = (stats.q99[:dims] - stats.q01[:dims] + EPSILON) / 2
    return stats.q01[:dims] + half, np.maximum(half, std_floor)


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
    width = stats.q99[:dims] - stats.q01[:dims] + EPSILON
    return ((x - stats.q01[:dims]) / width * 2 - 1) * (width / 2 / scale)


def unnormalize(
    x: Float[np.ndarray, "*n d"], stats: NormStats, mode: Mode = "z_score", std_floor: float = 0.0
) -> Float64[np.ndarray, "*n d"]:
    """The inverse of `normalize`; x may have fewer dims than the statistics, further dims are an error."""
    if x.shape[-1] > stats.dim:
        raise ValueError(f"{x.shape[-1]} dims, statistics of {stats.dim}: cut the padding first")
    shift, scale = _terms(stats, mode, std_floor, x.shape[-1])
    return x * scale + shift


def compute(datasets: Sequence[Dataset], norm: NormConfig, robot: Robot, horizon: int) -> Stats:
    """Statistics of state and actions over the datasets' offered rows.

    With delta actions: over the differences to the state at the chunk's start, for all real steps of all chunks.
    """
    for dataset in datasets:
        check_delta(norm, robot, dataset.state.shape[1])
    stats: Stats = {}
    for name in ("state", "actions"):
        low, high = None, None
        for part in _parts(datasets, norm, robot, horizon, name):
            low = part.min(0) if low is None else np.minimum(low, part.min(0))
            high = part.max(0) if high is None else np.maximum(high, part.max(0))
        running = RunningStats(low, high)
        for part in _parts(datasets, norm, robot, horizon, name):
            running.update(part)
        stats[name] = running.result()
    return stats


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
    needed = max(robot.position_dims) + 1
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


def save(path: epath.Path, stats: Mapping[str, NormStats]) -> None:
    """Write a norm_stats.json atomically."""
    try:
        write_atomic(path, _to_json(stats))
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror})") from error


def _to_json(stats: Mapping[str, NormStats]) -> str:
    content = {k: {f.name: getattr(s, f.name).tolist() for f in dataclasses.fields(s)} for k, s in stats.items()}
    return json.dumps({"norm_stats": content}, indent=2) + "\n"


def load(path: epath.Path) -> Stats:
    """Read a norm_stats.json; keys other than state and actions are ignored. Raises UserError naming file and field."""
    try:
        content = json.loads(path.read_text())["norm_stats"]
        return {name: _read_stats(content[name], f"{path}: {name}") for name in ("state", "actions")}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a norm_stats.json ({error}); run `hvd norm-stats`") from error
    except KeyError as error:
        raise UserError(f"{path}: {error} is missing; run `hvd norm-stats`") from error


def _read_stats(fields: Mapping[str, Any], where: str) -> NormStats:
    arrays = {f.name: np.asarray(fields[f.name], np.float64) for f in dataclasses.fields(NormStats)}
    if len({a.shape for a in arrays.values()}) != 1 or arrays["mean"].ndim != 1:
        raise UserError(f"{where}: mean, std, q01 and q99 must be lists of one length")
    if not all(np.isfinite(a).all() for a in arrays.values()):
        raise UserError(f"{where}: holds NaN or infinite numbers; run `hvd norm-stats`")
    return NormStats(**arrays)


def datasets_of(cfg: Experiment) -> tuple[DataConfig, ...]:
    """The experiment's datasets, the optimal one first."""
    found = tuple(d for d in cfg.sets().values() if d.repo_id)
    if not found:
        raise UserError(f"config {cfg.name}: no dataset; set optimal_data.repo_id")
    return found


def load_shared(cfg: Experiment) -> Stats:
    """The statistics that all datasets of the experiment share.

    Raises UserError when a file is missing, two datasets have different statistics, or they are those of another robot.
    """
    first: tuple[epath.Path, Stats] | None = None
    for data in datasets_of(cfg):
        path = path_for(cfg, data.repo_id)
        if not path.exists():
            raise UserError(f"{path}: norm stats are missing; run `hvd norm-stats --config {cfg.name}`")
        stats = load(path)
        if first is None:
            first = path, stats
        elif not _equal(stats, first[1]):
            raise UserError(
                f"{first[0]} and {path}: different statistics for two datasets of one experiment; "
                f"run `hvd norm-stats --config {cfg.name}`"
            )
    assert first is not None
    path, stats = first
    robot = get_robot(cfg.robot)
    if stats["actions"].dim != robot.action_dim:
        raise UserError(
            f"{path}: norm stats of another robot ({stats['actions'].dim} action dims, {robot.name} has "
            f"{robot.action_dim}); run `hvd norm-stats --config {cfg.name}`"
        )
    return stats


def _equal(a: Stats, b: Stats) -> bool:
    return all(
        np.array_equal(getattr(a[k], f.name), getattr(b[k], f.name)) for k in a for f in dataclasses.fields(NormStats)
    )


def main(cfg: Experiment) -> None:
    """`hvd norm-stats`: statistics of the optimal dataset, written for every dataset of the experiment."""
    configs = datasets_of(cfg)
    begin = time.perf_counter()
    dataset, *others = (
        Dataset.open(c, cameras=(), robot=cfg.robot, horizon=cfg.model.action_horizon)
        for c in configs
        if c is configs[0] or c.path().exists()  # the value stage alone needs no suboptimal set
    )
    for other in others:
        if other.state.shape[1] != dataset.state.shape[1]:
            raise UserError(
                f"{other.name}: state has {other.state.shape[1]} dims, that of {dataset.name} has "
                f"{dataset.state.shape[1]}; datasets of one experiment share their statistics, set keys.state"
            )
    stats = compute([dataset], cfg.norm, get_robot(cfg.robot), cfg.model.action_horizon)
    kind = "delta" if cfg.norm.delta_actions else "absolute"
    print(
        f"{dataset.name}: {len(dataset.rows())} frames, state of {stats['state'].dim} dims, {kind} actions of "
        f"{stats['actions'].dim}, {time.perf_counter() - begin:.2f} s"
    )
    still = np.flatnonzero(stats["actions"].std < STILL).tolist()
    if still and cfg.norm.std_floor < STILL:
        print(f"action dims {still} hardly move here: norm.std_floor keeps them from exploding where they do move")
    for data in configs:
        path = path_for(cfg, data.repo_id)
        state = "written"
        if path.exists():
            state = "unchanged" if path.read_text() == _to_json(stats) else "replaced: the statistics have changed"
        save(path, stats)
        print(f"{path}: {state}")
