"""Numeric columns of a LeRobot dataset as memory-mapped arrays, one row per frame, cached by the data's digest."""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from hvd.configs import DataConfig
from hvd.data.cache import cache_folder, cached
from hvd.data.labels import episode_path, load_labels
from hvd.data.layout import Feature, Layout, data_files
from hvd.data.success import of_rows, truth
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
    schema, keys = layout.format.schema(layout.data_paths[0]), cfg.keys
    for column in (*keys.state, *keys.actions):
        name = parse_column(column)[0]
        if name not in schema.names:
            raise UserError(f"{layout.root}: column {name!r} is not in the dataset{nearest(name, _numeric(schema))}")
    rewards = terminal = ""
    if cfg.reward == "column":
        rewards = _first(layout, schema, keys.rewards, "reward", ("next.reward", "reward"))
        terminal = _first(layout, schema, keys.terminal, "terminal", ("terminal", "next.terminal", "next.done"))
    # labels say themselves how an episode ended
    usual = ("success", "next.success") if cfg.reward != "labels" else ()
    success = next((k for k in usual if k in schema.names), "")
    names = {"timestamp", "task_index", "episode_index", "frame_index", rewards, terminal, success}
    names |= {parse_column(c)[0] for c in (*keys.state, *keys.actions)}
    return _Names(rewards, terminal, success, [n for n in schema.names if n in names])


class _Arrays:
    """Writes arrays of n rows, block after block, as .npy files of `folder`.

    Not through memory maps: a full disk is an error when writing, but kills a process that touches a mapped page.
    """

    def __init__(self, folder: Path, n: int):
        self._folder, self._n = folder, n
        self._files: dict[str, tuple[BinaryIO, tuple[int, ...]]] = {}

    def append(self, name: str, block: np.ndarray, where: Path) -> None:
        """Add the next rows to the array `name`; `where` names their file in errors."""
        width = block.shape[1:]
        if name not in self._files:
            self._files[name] = file, _ = (self._folder / f"{name}.npy").open("wb"), width
            header = {"descr": np.lib.format.dtype_to_descr(block.dtype), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, header | {"shape": (self._n, *width)})
        file, expected = self._files[name]
        if width != expected:
            raise UserError(f"{where}: {name} has {width[0]} dims here and {expected[0]} in another file")
        file.write(np.ascontiguousarray(block).data)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for file, _ in self._files.values():
                stack.enter_context(file)


def _build(layout: Layout, cfg: DataConfig, folder: Path) -> None:
    """Read every data file once and write the arrays of `load_columns` into `folder`."""
    folder.mkdir()
    names = _resolve(layout, cfg)
    lengths = [e.length for e in layout.episodes]
    starts = np.cumsum([0, *lengths])
    success = {}
    if cfg.reward != "labels":
        said = ((i, truth(e.extra.get("success"), _episode_name(layout, i))) for i, e in enumerate(layout.episodes))
        success = {i: value for i, value in said if value is not None}
    row, rate = 0, _Rate(layout)
    with contextlib.closing(_Arrays(folder, int(starts[-1]))) as out:
        files = data_files(layout)  # before memory is taken for the number of rows that meta says
        position = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        for path, count in tqdm(files, unit="file", desc=f"reading {layout.root.name}", delay=2):
            table, episode_of = layout.format.table(path, names.read), position[row : row + count]
            _check_episodes(layout, table, path, episode_of)
            frame = np.arange(row, row + len(table)) - starts[episode_of]
            columns = {
                "episode_of": episode_of,
                "task_index": _scalar(table, "task_index", path, np.int32, np.zeros(len(table))),
                "time": _scalar(table, "timestamp", path, np.float64, frame / layout.fps),
                "state": _concatenated(table, cfg.keys.state, path),
                "actions": _concatenated(table, cfg.keys.actions, path),
            }
            if cfg.reward == "column":
                columns["rewards"] = _scalar(table, names.rewards, path, np.float32)
                columns["terminal"] = _scalar(table, names.terminal, path, np.float32) != 0
            for name, block in columns.items():
                _check_finite(layout, name, block, path, episode_of, frame)
                out.append(name, block, path)
            _check_order(
                layout, "frame_index", _scalar(table, "frame_index", path, np.float64, frame), path, episode_of
            )
            _check_order(layout, "timestamp", columns["time"], path, episode_of)
            rate.add(columns["time"], episode_of)
            if names.success:
                succeeded = of_rows(table[names.success], f"{path}: column {names.success!r}")
                for i in np.unique(episode_of).tolist():
                    success.setdefault(i, bool(succeeded[episode_of == i].any()))
            row += len(table)
        rate.check()
        successes = _successes(layout, success)
        if cfg.reward != "column":
            rewards, terminal = _rewards(layout, cfg, successes, starts)
            out.append("rewards", rewards, layout.root)
            out.append("terminal", terminal, layout.root)
    np.save(folder / "success.npy", successes)


def _episode_name(layout: Layout, position: int) -> str:
    return f"{layout.root / 'meta'}: episode {layout.episodes[position].index}"


def _successes(layout: Layout, known: dict[int, bool]) -> np.ndarray:
    """How each episode ended. Where the dataset says nothing at all, each is a success."""
    missing = sorted(set(range(len(layout.episodes))) - set(known))
    if known and missing:
        raise UserError(f"{_episode_name(layout, missing[0])} has no success, though others have; write true or false")
    return np.asarray([known.get(i, True) for i in range(len(layout.episodes))])


def _check_episodes(layout: Layout, table: pa.Table, path: Path, episode_of: np.ndarray) -> None:
    """A file must hold the rows of the episodes that stand in the order of meta."""
    if len(table) != len(episode_of):
        raise UserError(f"{path}: has {len(table)} rows where its head says {len(episode_of)}")
    if "episode_index" in table.column_names:
        numbers = np.asarray([e.index for e in layout.episodes], np.int64)[episode_of]
        if not np.array_equal(_scalar(table, "episode_index", path, np.int64), numbers):
            raise UserError(f"{path}: its rows do not follow the order of the episodes in meta")


def _check_order(layout: Layout, name: str, values: np.ndarray, path: Path, episode_of: np.ndarray) -> None:
    """`values` must grow from row to row of an episode."""
    bad = np.flatnonzero((np.diff(episode_of) == 0) & ~(np.diff(values) > 0))
    if len(bad):
        episode = layout.episodes[episode_of[bad[0]]].index
        raise UserError(
            f"{path}: {name} does not grow from row to row in episode {episode} ({values[bad[0]]:.6g}, then "
            f"{values[bad[0] + 1]:.6g}); its rows are out of order or their {name} is wrong"
        )


class _Rate:
    """Compares the mean step of the timestamps with the frames per second that info.json says."""

    def __init__(self, layout: Layout):
        self._layout, self._seconds, self._steps = layout, 0.0, 0

    def add(self, time: np.ndarray, episode_of: np.ndarray) -> None:
        same = np.diff(episode_of) == 0
        self._seconds += float(np.diff(time)[same].sum())
        self._steps += int(same.sum())

    def check(self) -> None:
        found = self._steps / self._seconds if self._steps else self._layout.fps
        if not 0.75 < found / self._layout.fps < 1.34:
            raise UserError(
                f"{self._layout.root / 'meta/info.json'}: fps is {self._layout.fps:g}, but the timestamps of the data "
                f"have {found:.3g} frames per second; mend whichever is wrong"
            )


def _check_finite(
    layout: Layout, name: str, block: np.ndarray, path: Path, episode_of: np.ndarray, frame: np.ndarray
) -> None:
    finite = np.isfinite(block).reshape(len(block), -1).all(1)
    if not finite.all():
        bad = int(np.argmin(finite))
        place = f"episode {layout.episodes[episode_of[bad]].index}, frame {frame[bad]}"
        raise UserError(f"{path}: {name} is NaN or infinite in {place}; remove or repair that episode")


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


def parse_column(column: str) -> tuple[str, list[int] | None]:
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


def dim_names(features: Mapping[str, Feature], columns: tuple[str, ...], width: int) -> tuple[str, ...]:
    """What each of the `width` dims of the joined columns is called: "action[2] elbow", without a name "action[2]".

    Args:
        features: of info.json; where they do not say how wide the columns are, dims are counted through.
    """
    found: list[str] = []
    for column in columns:
        name, dims = parse_column(column)
        feature = features.get(name, Feature(""))
        shape, said = feature.shape, _flat_names(feature.names)
        whole = isinstance(shape, list | tuple) and all(type(n) is int for n in shape)
        size = math.prod(map(int, shape)) if whole and shape else 0
        said = said if len(said) == size else ()
        for dim in range(min(size, width)) if dims is None else dims:
            found.append(f"{name}[{dim}]" + (f" {said[dim]}" if dim < len(said) else ""))
    return tuple(found) if len(found) == width else tuple(f"{'+'.join(columns)}[{i}]" for i in range(width))


def _flat_names(names: Any) -> tuple[str, ...]:
    """LeRobot writes names as a list, as a list in a list, or as a mapping to one."""
    while isinstance(names, Mapping) and len(names) == 1:
        names = next(iter(names.values()))
    if isinstance(names, Mapping):
        names = list(names)
    while isinstance(names, list | tuple) and len(names) == 1 and isinstance(names[0], list | tuple):
        names = names[0]
    flat = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return tuple(names) if flat else ()


def _concatenated(table: pa.Table, columns: tuple[str, ...], path: Path) -> np.ndarray:
    parts = []
    for column in columns:
        name, dims = parse_column(column)
        with np.errstate(all="ignore"):  # a number beyond float32 becomes infinite, and is refused as such
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
    with np.errstate(all="ignore"):
        result = values[:, 0].astype(dtype)
    if np.issubdtype(dtype, np.integer) and not np.array_equal(result, values[:, 0]):
        raise UserError(f"{path}: column {name!r} must hold whole numbers of {8 * result.itemsize} bits")
    return result


def _matrix(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """A numeric column as [rows, width]: scalars have width 1, nested lists are flattened."""
    if name not in table.column_names:
        raise UserError(f"{path}: column {name!r} is missing{nearest(name, table.column_names)}")
    if table.column_names.count(name) > 1:
        raise UserError(f"{path}: column {name!r} is there twice")
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
