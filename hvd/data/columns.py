"""Numeric columns of a LeRobot dataset as memory-mapped arrays, one row per frame, cached by the data's digest."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from hvd.configs import DataConfig
from hvd.data.cache import cache_folder, cached, replacing
from hvd.data.labels import episode_path, load_labels
from hvd.data.layout import Layout, read_parquet, read_schema
from hvd.errors import UserError, nearest

CACHE_VERSION = 1
_SAMPLE = 64 * 1024  # bytes hashed at the beginning, middle and end of each video
_SELECTION = re.compile(r"^(?P<name>[^\[\]]+)\[(?P<dims>[0-9,:\s]+)\]$")


def digest(layout: Layout) -> str:
    """sha256 over the contents of meta and data, and over size and sampled bytes of each video.

    `keep_digest` remembers it beside sizes and times of the files, so that a second opening does not read them.
    """
    whole, sampled = _files(layout)
    with contextlib.suppress(ValueError, KeyError, OSError):  # a damaged note is as good as none
        known = json.loads((cache_folder(layout.root) / _NOTE).read_bytes())
        if known["files"] == _fingerprint(layout):
            return known["digest"]
    total = hashlib.sha256(f"{CACHE_VERSION}".encode())
    for path in whole + sampled:
        total.update(f"{path.relative_to(layout.root)}\n".encode())
        try:
            with path.open("rb") as file:
                total.update(_sampled(file) if path in sampled else hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"{path}: file of the dataset is missing or unreadable ({error.strerror})") from None
    return total.hexdigest()


def keep_digest(layout: Layout, value: str) -> None:
    """Remember the digest, and remove from the cache what belongs to other contents of the dataset."""
    folder = cache_folder(layout.root)
    note = json.dumps({"files": _fingerprint(layout), "digest": value})
    path = folder / _NOTE
    if path.is_file() and path.read_text() == note:
        return
    with replacing(path) as temporary:
        temporary.write_text(note)
    for entry in folder.iterdir():
        if re.search(r"-[0-9a-f]{16}-", entry.name) and f"-{value[:16]}-" not in entry.name and entry.name[0] != ".":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)


_NOTE = "digest.json"


def _files(layout: Layout) -> tuple[list[Path], list[Path]]:
    """The files hashed whole and those of which only parts are."""
    meta = sorted(p for p in (layout.root / "meta").rglob("*") if p.is_file())
    return [*meta, *layout.data_paths], list(layout.video_paths)


def _fingerprint(layout: Layout) -> str:
    """Changes when any file of the dataset does."""
    total = hashlib.sha256(str(layout.root.resolve()).encode())
    for path in itertools.chain(*_files(layout)):
        stat = path.stat()
        total.update(f"{path.relative_to(layout.root)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return total.hexdigest()


def _sampled(file: BinaryIO) -> bytes:
    size = file.seek(0, os.SEEK_END)
    total = hashlib.sha256(str(size).encode())
    for start in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
        file.seek(start)
        total.update(file.read(_SAMPLE))
    return total.digest()


def load_columns(layout: Layout, data_digest: str, cfg: DataConfig) -> dict[str, np.ndarray]:
    """The dataset's arrays, memory-mapped: state [n,S] and actions [n,A] float32, rewards [n] float32, terminal [n]
    bool, time [n] float64 (seconds into the episode), task_index and episode_of [n] int32 (position among the
    episodes), success [episodes] bool. Built on first use; UserErrors name the missing key, the episode and the frame.
    """
    recipe = {
        "version": CACHE_VERSION,
        "state": cfg.keys.state,
        "actions": cfg.keys.actions,
        "rewards": cfg.keys.rewards,
        "terminal": cfg.keys.terminal,
        "reward": cfg.reward,
        "labels": _labels_digest(layout, cfg) if cfg.reward == "labels" else "",
    }
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder(layout.root) / f"columns-{data_digest[:16]}-{key}"
    cached(folder, lambda temporary: _build(layout, cfg, temporary))
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def labels_folder(layout: Layout, cfg: DataConfig) -> Path:
    return Path(cfg.labels_dir) if cfg.labels_dir else layout.root / "labels"


def _labels_digest(layout: Layout, cfg: DataConfig) -> str:
    total = hashlib.sha256()
    for episode in layout.episodes:
        path = episode_path(labels_folder(layout, cfg), episode.index)
        total.update(path.read_bytes() if path.is_file() else b"missing")
    return total.hexdigest()


def _build(layout: Layout, cfg: DataConfig, folder: Path) -> None:
    """Read every data file once and write the arrays of `load_columns` into `folder`."""
    folder.mkdir()
    schema = read_schema(layout.data_paths[0])
    keys = cfg.keys
    for column in (*keys.state, *keys.actions):
        name = _parse(column)[0]
        if name not in schema.names:
            raise UserError(f"{layout.root}: column {name!r} is not in the dataset{nearest(name, _numeric(schema))}")
    reward_key, terminal_key = "", ""
    if cfg.reward == "column":
        advice = '; or set the data config\'s reward to "success_at_end" or "labels"'
        reward_key = _first(layout, schema, keys.rewards, ("next.reward", "reward"), "reward", advice)
        terminal_key = _first(
            layout, schema, keys.terminal, ("terminal", "next.terminal", "next.done"), "terminal", advice
        )
    success_key = next((k for k in ("success", "next.success") if k in schema.names), "")
    names = {"timestamp", "frame_index", "task_index", "episode_index", reward_key, terminal_key, success_key}
    names |= {_parse(c)[0] for c in (*keys.state, *keys.actions)}
    wanted = [n for n in schema.names if n in names]

    n = sum(e.length for e in layout.episodes)
    starts = np.cumsum([0, *(e.length for e in layout.episodes)])
    episode_of = np.repeat(np.arange(len(layout.episodes), dtype=np.int32), [e.length for e in layout.episodes])
    out: dict[str, np.ndarray] = {}

    def put(name: str, row: int, value: np.ndarray) -> None:
        if name not in out:
            out[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", value.dtype, (n, *value.shape[1:]))
        if value.shape[1:] != out[name].shape[1:]:
            raise UserError(
                f"{layout.root}: {name} has width {value.shape[1:]} in one file and {out[name].shape[1:]} in another"
            )
        out[name][row : row + len(value)] = value

    row, success = 0, _episode_success(layout)
    for path in layout.data_paths:
        table = read_parquet(path, wanted)
        m = table.num_rows
        inside = np.flatnonzero([e.data_path == path for e in layout.episodes])
        expected = sum(layout.episodes[i].length for i in inside)
        if m != expected:
            raise UserError(f"{path}: has {m} rows where the episodes' description says {expected}; truncated file?")
        ids = np.asarray([layout.episodes[i].index for i in episode_of[row : row + m]])
        if "episode_index" in table.column_names and not np.array_equal(_matrix(table, "episode_index")[:, 0], ids):
            raise UserError(f"{path}: its rows do not follow the order of the episodes in meta")
        frame = np.arange(row, row + m) - starts[episode_of[row : row + m]]
        put("episode_of", row, episode_of[row : row + m])
        put("task_index", row, _scalar(table, "task_index", np.int32, np.zeros(m, np.int32)))
        put("time", row, _scalar(table, "timestamp", np.float64, frame / layout.fps))
        put("state", row, _concatenated(table, keys.state, path))
        put("actions", row, _concatenated(table, keys.actions, path))
        if cfg.reward == "column":
            put("rewards", row, _scalar(table, reward_key, np.float32))
            put("terminal", row, _scalar(table, terminal_key, np.float32) != 0)
        if success_key:
            said = _scalar(table, success_key, np.float32) != 0
            for i in inside:
                success.setdefault(int(i), bool(said[starts[i] - row : starts[i + 1] - row].any()))
        row += m
    out["success"] = np.asarray([success.get(i, True) for i in range(len(layout.episodes))])
    np.save(folder / "success.npy", out["success"])
    if cfg.reward != "column":
        rewards, terminal = _rewards(layout, cfg, out["success"], starts)
        put("rewards", 0, rewards)
        put("terminal", 0, terminal)
        np.save(folder / "success.npy", out["success"])
    for name in ("state", "actions", "rewards"):
        _check_finite(layout, name, out[name], starts)
    for array in out.values():
        if isinstance(array, np.memmap):
            array.flush()


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


def _episode_success(layout: Layout) -> dict[int, bool]:
    """Success per episode position where the meta folder states it."""
    return {i: bool(e.extra["success"]) for i, e in enumerate(layout.episodes) if e.extra.get("success") is not None}


def _check_finite(layout: Layout, name: str, array: np.ndarray, starts: np.ndarray) -> None:
    for begin in range(0, len(array), 1 << 18):
        part = array[begin : begin + (1 << 18)]
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
        if name not in table.column_names:
            raise UserError(f"{path}: column {name!r} is missing{nearest(name, table.column_names)}")
        values = _matrix(table, name).astype(np.float32, copy=False)
        if dims is not None and max(dims) >= values.shape[1]:
            raise UserError(f"{path}: column {column!r} asks for dim {max(dims)} of {values.shape[1]}")
        parts.append(values if dims is None else values[:, dims])
    return np.concatenate(parts, axis=1)


def _matrix(table: pa.Table, name: str) -> np.ndarray:
    """A numeric column as [rows, width]: scalars have width 1, nested lists are flattened."""
    array = table[name].combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # pyarrow keeps an empty column chunked
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], pa.float32())
    if array.null_count:
        raise UserError(f"column {name!r} has {array.null_count} empty cells; remove or fill them")
    n = len(array)
    while pa.types.is_nested(array.type):
        array = array.flatten()
    values = array.to_numpy(zero_copy_only=False)
    if values.dtype == object or values.dtype.kind not in "biuf":
        raise UserError(f"column {name!r} is not numeric ({array.type})")
    if n and len(values) % n:
        raise UserError(f"column {name!r} has rows of different lengths")
    return values.reshape(n, -1)


def _scalar(table: pa.Table, name: str, dtype: Any, default: np.ndarray | None = None) -> np.ndarray:
    if default is not None and name not in table.column_names:
        return default.astype(dtype)
    values = _matrix(table, name)
    if values.shape[1] != 1:
        raise UserError(f"column {name!r} must hold one number per frame, has {values.shape[1]}")
    return values[:, 0].astype(dtype)


def _numeric(schema: pa.Schema) -> list[str]:
    return [f.name for f in schema if not pa.types.is_struct(f.type)]


def _first(layout: Layout, schema: pa.Schema, given: str, usual: tuple[str, ...], what: str, advice: str) -> str:
    for name in (given,) if given else usual:
        if name in schema.names:
            return name
    name = given or usual[0]
    raise UserError(f"{layout.root}: no {what} column {name!r} in the dataset{nearest(name, _numeric(schema))}{advice}")
