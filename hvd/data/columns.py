"""Numeric columns of a LeRobot dataset as memory-mapped arrays, one row per frame, cached by the data's digest."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from hvd.configs import DataConfig
from hvd.data.cache import cache_folder, cached
from hvd.data.labels import episode_path, load_labels
from hvd.data.layout import Layout, read_parquet, read_schema
from hvd.errors import UserError, nearest

_SELECTION = re.compile(r"^(?P<name>[^\[\]]+)\[(?P<dims>[0-9,:\s]+)\]$")


def load_columns(layout: Layout, data_digest: str, cfg: DataConfig) -> dict[str, np.ndarray]:
    """The dataset's arrays, memory-mapped: state [n,S] and actions [n,A] float32, rewards [n] float32, terminal [n]
    bool, time [n] float64 (seconds into the episode), task_index and episode_of [n] int32 (position among the
    episodes), success [episodes] bool. Built on first use; UserErrors name the missing key, the episode and the frame.
    """
    keys = cfg.keys
    recipe = [keys.state, keys.actions, keys.rewards, keys.terminal, cfg.reward]
    if cfg.reward == "labels":
        recipe.append(_labels_digest(layout, cfg))
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    folder = cache_folder(layout.root) / f"columns-{data_digest[:16]}-{key}"
    cached(folder, lambda temporary: _build(layout, cfg, temporary))
    # plain views: the memmap class makes every access slower
    return {path.stem: np.asarray(np.load(path, mmap_mode="r")) for path in sorted(folder.glob("*.npy"))}


def labels_folder(layout: Layout, cfg: DataConfig) -> Path:
    return Path(cfg.labels_dir) if cfg.labels_dir else layout.root / "labels"


def _labels_digest(layout: Layout, cfg: DataConfig) -> str:
    total = hashlib.sha256()
    for episode in layout.episodes:
        path = episode_path(labels_folder(layout, cfg), episode.index)
        total.update(path.read_bytes() if path.is_file() else b"missing")
    return total.hexdigest()


@dataclass(frozen=True)
class _Names:
    """The columns to read; "" = there is none. `read` are all of them, without selections of dims."""

    rewards: str
    terminal: str
    success: str
    read: list[str]


def _resolve(layout: Layout, cfg: DataConfig) -> _Names:
    """Find the columns that `cfg` means, or say which one is missing and what is like it."""
    schema, keys = read_schema(layout.data_paths[0]), cfg.keys
    for column in (*keys.state, *keys.actions):
        name = _parse(column)[0]
        if name not in schema.names:
            raise UserError(f"{layout.root}: column {name!r} is not in the dataset{nearest(name, _numeric(schema))}")
    rewards = terminal = ""
    if cfg.reward == "column":
        rewards = _first(layout, schema, keys.rewards, "reward", ("next.reward", "reward"))
        terminal = _first(layout, schema, keys.terminal, "terminal", ("terminal", "next.terminal", "next.done"))
    success = next((k for k in ("success", "next.success") if k in schema.names), "")
    names = {"timestamp", "task_index", "episode_index", rewards, terminal, success}
    names |= {_parse(c)[0] for c in (*keys.state, *keys.actions)}
    return _Names(rewards, terminal, success, [n for n in schema.names if n in names])


class _Arrays:
    """Arrays of n rows, filled file by file, straight into .npy files of `folder`."""

    def __init__(self, folder: Path, n: int, where: Path):
        self._folder, self._n, self._where = folder, n, where
        self.arrays: dict[str, np.ndarray] = {}

    def put(self, name: str, row: int, value: np.ndarray) -> None:
        if name not in self.arrays:
            path, shape = self._folder / f"{name}.npy", (self._n, *value.shape[1:])
            self.arrays[name] = np.lib.format.open_memmap(path, "w+", value.dtype, shape)
        array = self.arrays[name]
        if value.shape[1:] != array.shape[1:]:
            widths = f"{value.shape[1]} dims in one file and {array.shape[1]} in another"
            raise UserError(f"{self._where}: {name} has {widths}")
        array[row : row + len(value)] = value


def _build(layout: Layout, cfg: DataConfig, folder: Path) -> None:
    """Read every data file once and write the arrays of `load_columns` into `folder`."""
    folder.mkdir()
    names = _resolve(layout, cfg)
    starts = np.cumsum([0, *(e.length for e in layout.episodes)])
    inside: dict[Path, list[int]] = {}  # positions of the episodes in each file
    for i, episode in enumerate(layout.episodes):
        inside.setdefault(episode.data_path, []).append(i)
    out = _Arrays(folder, int(starts[-1]), layout.root)
    success = {i: bool(e.extra["success"]) for i, e in enumerate(layout.episodes) if e.extra.get("success") is not None}
    row = 0
    for path in tqdm(layout.data_paths, unit="file", desc=f"reading {layout.root.name}", delay=2):
        table, positions = read_parquet(path, names.read), np.asarray(inside[path])
        lengths = starts[positions + 1] - starts[positions]
        rows = row + np.arange(table.num_rows)
        if len(rows) != lengths.sum():
            expected = f"where the episodes' description says {lengths.sum()}"
            raise UserError(f"{path}: has {len(rows)} rows {expected}; truncated file?")
        episode_of = np.repeat(positions, lengths).astype(np.int32)
        numbers = np.asarray([layout.episodes[i].index for i in positions])
        if "episode_index" in table.column_names:
            found = _matrix(table, "episode_index", path)[:, 0]
            if not np.array_equal(found, np.repeat(numbers, lengths)) or positions[0] != np.searchsorted(starts, row):
                raise UserError(f"{path}: its rows do not follow the order of the episodes in meta")
        out.put("episode_of", row, episode_of)
        out.put("task_index", row, _scalar(table, "task_index", path, np.int32, np.zeros(len(rows))))
        out.put("time", row, _scalar(table, "timestamp", path, np.float64, (rows - starts[episode_of]) / layout.fps))
        out.put("state", row, _concatenated(table, cfg.keys.state, path))
        out.put("actions", row, _concatenated(table, cfg.keys.actions, path))
        if cfg.reward == "column":
            out.put("rewards", row, _scalar(table, names.rewards, path, np.float32))
            out.put("terminal", row, _scalar(table, names.terminal, path, np.float32) != 0)
        if names.success:
            said = _scalar(table, names.success, path, np.float32) != 0
            for i in positions.tolist():
                success.setdefault(i, bool(said[starts[i] - row : starts[i + 1] - row].any()))
        row += len(rows)
    successes = np.asarray([success.get(i, True) for i in range(len(layout.episodes))])
    if cfg.reward != "column":
        rewards, terminal = _rewards(layout, cfg, successes, starts)
        out.put("rewards", 0, rewards)
        out.put("terminal", 0, terminal)
    np.save(folder / "success.npy", successes)
    _check_finite(layout, out.arrays, starts)


def _rewards(layout: Layout, cfg: DataConfig, success: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and terminal flags of a dataset without such columns; with "labels" also corrects `success` in place."""
    rewards, terminal = np.zeros(starts[-1], np.float32), np.zeros(starts[-1], bool)
    for i, episode in enumerate(layout.episodes):
        rows = slice(starts[i], starts[i + 1])
        if cfg.reward == "labels":
            labels = load_labels(episode_path(labels_folder(layout, cfg), episode.index), episode.length)
            rewards[rows] = labels.rewards(episode.length)
            success[i] = labels.success
            terminal[starts[i + 1] - 1] = labels.is_terminal
        else:
            rewards[starts[i + 1] - 1] = terminal[starts[i + 1] - 1] = success[i]
    return rewards, terminal


def _check_finite(layout: Layout, arrays: Mapping[str, np.ndarray], starts: np.ndarray) -> None:
    block = 1 << 18
    for name, begin in (
        (name, i) for name in ("state", "actions", "rewards") for i in range(0, int(starts[-1]), block)
    ):
        part = arrays[name][begin : begin + block]
        finite = np.isfinite(part).reshape(len(part), -1).all(1)
        if not finite.all():
            row = begin + int(np.argmin(finite))
            i = int(np.searchsorted(starts, row, side="right")) - 1
            episode = layout.episodes[i]
            raise UserError(
                f"{episode.data_path}: {name} is NaN or infinite in episode {episode.index}, frame {row - starts[i]}; "
                "remove or repair that episode"
            )


def _parse(column: str) -> tuple[str, list[int] | None]:
    """ "key[0,1,5]" or "key[0:3]" selects dims of a column; "key" takes all."""
    match = _SELECTION.match(column)
    if match is None:
        return column, None
    dims: list[int] = []
    for part in match["dims"].split(","):
        start, colon, stop = part.strip().partition(":")
        try:
            dims.extend(range(int(start), int(stop)) if colon else [int(start)])
        except ValueError:
            raise UserError(f"column {column!r}: write the dims as [0,1,5] or [0:3]") from None
    return match["name"], dims


def _concatenated(table: pa.Table, columns: tuple[str, ...], path: Path) -> np.ndarray:
    parts = []
    for column in columns:
        name, dims = _parse(column)
        values = _matrix(table, name, path).astype(np.float32, copy=False)
        if dims is not None and max(dims) >= values.shape[1]:
            raise UserError(f"{path}: column {column!r} asks for dim {max(dims)} of {values.shape[1]}")
        parts.append(values if dims is None else values[:, dims])
    return np.concatenate(parts, axis=1)


def _scalar(table: pa.Table, name: str, path: Path, dtype: Any, default: np.ndarray | None = None) -> np.ndarray:
    """A column of one number per frame [rows]; `default` where the file has no such column."""
    if default is not None and name not in table.column_names:
        return default.astype(dtype)
    values = _matrix(table, name, path)
    if values.shape[1] != 1:
        raise UserError(f"{path}: column {name!r} must hold one number per frame, has {values.shape[1]}")
    return values[:, 0].astype(dtype)


def _matrix(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """A numeric column as [rows, width]: scalars have width 1, nested lists are flattened."""
    if name not in table.column_names:
        raise UserError(f"{path}: column {name!r} is missing{nearest(name, table.column_names)}")
    array = pa.concat_arrays(table[name].chunks) if len(table) else pa.array([], pa.float32())
    while True:
        if array.null_count:
            raise UserError(f"{path}: column {name!r} has {array.null_count} empty cells; remove or fill them")
        if not isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
            break
        if len(pc.call_function("list_value_length", [array]).unique()) > 1:
            raise UserError(f"{path}: column {name!r} has rows of different lengths")
        array = array.flatten()
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    if not pa.types.is_integer(array.type) and not pa.types.is_floating(array.type):
        raise UserError(f"{path}: column {name!r} is not numeric ({array.type})")
    # to_numpy would import pandas where that is installed, which takes seconds
    return np.from_dlpack(array).reshape(len(table), -1)


def _numeric(schema: pa.Schema) -> list[str]:
    return [f.name for f in schema if not pa.types.is_struct(f.type)]


def _first(layout: Layout, schema: pa.Schema, given: str, what: str, usual: tuple[str, ...]) -> str:
    """The column `given`, or else the first of the `usual` ones that is there."""
    for name in (given,) if given else usual:
        if name in schema.names:
            return name
    name = given or usual[0]
    raise UserError(
        f"{layout.root}: no {what} column {name!r} in the dataset{nearest(name, _numeric(schema))}; "
        'or set the data config\'s reward to "success_at_end" or "labels"'
    )
