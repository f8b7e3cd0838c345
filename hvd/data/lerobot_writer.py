"""Writes a LeRobot v3.0 dataset that lerobot 0.6 opens, without lerobot, torch or pandas.

    meta/info.json  meta/stats.json  meta/tasks.parquet  meta/episodes/chunk-000/file-000.parquet
    data/chunk-000/file-000.parquet  videos/<key>/chunk-000/file-000.mp4

Several episodes share a file until it would outgrow its limit. A data file has one row group per episode. The episodes'
table tells where an episode lies (file, rows, seconds), its statistics, and the caller's own (success, quality).
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hvd.data import video
from hvd.data.lerobot_stats import Stats, TotalStats, column_stats, plain

VERSION = "v3.0"
CHUNK_FILES = 1000  # files of a chunk folder
DATA_MB, VIDEO_MB = 100, 200  # LeRobot's limits of a file
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{FILE}.mp4"
EPISODES_PATH = f"meta/episodes/{FILE}.parquet"
# What every LeRobot dataset has; the writer fills them.
INDEX_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
ROWS_PER_GROUP = 100  # episodes of a row group in meta/episodes


@dataclass(frozen=True)
class Feature:
    """A numeric column ("float32", "int64" or "bool") of `shape`, or a camera ("video") of shape (height, width, 3)."""

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] | None = None

    def json(self) -> dict[str, Any]:
        names = list(self.names) if self.names is not None else None
        return {"dtype": self.dtype, "shape": list(self.shape), "names": names}


@dataclass(frozen=True)
class Segment:
    """The encoded frames of one episode and camera, waiting to be joined into the dataset's files."""

    path: Path
    frames: int
    size: int  # bytes
    stats: Stats


class LeRobotWriter:
    """Writes episodes one after another into a new folder; a context manager. The dataset is whole after the block,
    unless an exception ended it: then what is there is of no use.

    Args:
        root: the dataset's folder; created.
        fps: frames per second, a whole number as LeRobot asks.
        robot_type: named in info.json.
        features: the columns and cameras, without LeRobot's own index columns.
        codec, crf: how the videos were encoded, for info.json.
    """

    def __init__(
        self,
        root: Path,
        *,
        fps: int,
        robot_type: str,
        features: Mapping[str, Feature],
        codec: str = "h264",
        crf: int = 20,
        data_mb: int | float = DATA_MB,
        video_mb: int | float = VIDEO_MB,
    ):
        self.root, self.fps, self.robot_type, self.codec, self.crf = root, fps, robot_type, codec, crf
        self.features = {k: f for k, f in features.items() if f.dtype != "video"}
        self.cameras = {k: f for k, f in features.items() if f.dtype == "video"}
        self.num_episodes = self.num_frames = 0
        self._data = _Table(root, DATA_PATH, data_mb)
        self._episodes = _Table(root, EPISODES_PATH, data_mb)
        self._rows: list[dict[str, Any]] = []
        self._videos = {key: _Joined(root, key, fps, video_mb) for key in self.cameras}
        self._tasks: dict[str, int] = {}
        self._totals: dict[str, TotalStats] = {}
        root.mkdir(parents=True)

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._data.abandon()
            self._episodes.abandon()

    def add_episode(
        self,
        columns: Mapping[str, np.ndarray],
        task: str,
        segments: Mapping[str, Segment] | None = None,
        extra: Mapping[str, bool | str | int | float] | None = None,
    ) -> None:
        """Append an episode.

        Args:
            columns: per numeric feature the values [T, d] (or [T] for shape (1,)), of the feature's dtype.
            task: the prompt.
            segments: per camera the encoded frames; their files are needed until the end of the block.
            extra: columns of the caller's own in the episodes' table, the same for every episode.
        """
        segments = segments or {}
        if set(columns) != set(self.features) or set(segments) != set(self.cameras):
            raise ValueError(f"episode {self.num_episodes}: columns or cameras differ from the dataset's features")
        length = len(next(iter(columns.values())))
        task_index = self._tasks.setdefault(task, len(self._tasks))
        frame = np.arange(length)
        full = dict(columns) | {
            "timestamp": (frame / self.fps).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.full(length, self.num_episodes),
            "index": self.num_frames + frame,
            "task_index": np.full(length, task_index),
        }
        features = self.features | {key: Feature(dtype, (1,)) for key, dtype in INDEX_FEATURES.items()}
        table = pa.table({key: _arrow_column(full[key], feature, length, key) for key, feature in features.items()})
        chunk, file = self._data.write(table)
        row: dict[str, Any] = {
            "episode_index": self.num_episodes,
            "tasks": [task],
            "length": length,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": self.num_frames,
            "dataset_to_index": self.num_frames + length,
        }
        row |= extra or {}
        for key, segment in segments.items():
            if segment.frames != length:
                raise ValueError(f"episode {self.num_episodes}: {segment.frames} frames of {key} for {length} rows")
            row |= self._videos[key].add(segment)
        stats = {key: segment.stats for key, segment in segments.items()}
        stats |= {key: column_stats(values) for key, values in full.items()}
        self._rows.append(row | self._count(stats))
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush_rows()
        self.num_episodes += 1
        self.num_frames += length

    def _count(self, stats: Mapping[str, Stats]) -> dict[str, Any]:
        """Add an episode's statistics to the dataset's; returns their columns of the episodes' table."""
        row: dict[str, Any] = {}
        for key, value in stats.items():
            row |= {f"stats/{key}/{name}": plain(name, array) for name, array in value.items()}
            if key in self._totals:
                self._totals[key].add(value)
            else:
                self._totals[key] = TotalStats(value)
        return row

    def _finish(self) -> None:
        """Join the videos and write what is left."""
        if not self.num_episodes:
            raise ValueError(f"{self.root}: a dataset needs at least one episode")
        self._flush_rows()
        self._data.close()
        self._episodes.close()
        for joined in self._videos.values():
            joined.close()
        _write_tasks(self.root / "meta/tasks.parquet", list(self._tasks))
        _write_json(self.root / "meta/stats.json", {key: total.json() for key, total in self._totals.items()})
        _write_json(self.root / "meta/info.json", self._info())

    def _flush_rows(self) -> None:
        if self._rows:
            names = list(self._rows[0])
            table = pa.table({name: [row[name] for row in self._rows] for name in names})
            count = len(self._rows)
            place = self._episodes.place(count)
            for name, value in zip(("meta/episodes/chunk_index", "meta/episodes/file_index"), place, strict=True):
                table = table.append_column(name, pa.array([value] * count, pa.int64()))
            self._episodes.write(table, place)
            self._rows.clear()

    def _info(self) -> dict[str, Any]:
        features: dict[str, Any] = {}
        for key, feature in self.cameras.items():
            path = self.root / VIDEO_PATH.format(video_key=key, chunk_index=0, file_index=0)
            features[key] = feature.json() | {"info": video.video_info(path, self.fps, self.codec, self.crf)}
        features |= {key: feature.json() for key, feature in self.features.items()}
        features |= {key: Feature(dtype, (1,)).json() for key, dtype in INDEX_FEATURES.items()}
        return {
            "codebase_version": VERSION,
            "fps": self.fps,
            "features": features,
            "total_episodes": self.num_episodes,
            "total_frames": self.num_frames,
            "total_tasks": len(self._tasks),
            "chunks_size": CHUNK_FILES,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.cameras else None,
            "robot_type": self.robot_type,
            "splits": {"train": f"0:{self.num_episodes}"},
        }


class _Table:
    """Parquet files of one kind; begins a new one when the next rows would make the current one too large."""

    def __init__(self, root: Path, template: str, limit_mb: int | float):
        self._root, self._template, self._limit = root, template, limit_mb * 2**20
        self._number = 0
        self._rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._sink: Any = None

    def place(self, rows: int) -> tuple[int, int]:
        """(chunk, file) where the next `rows` rows go, by the mean size of the rows so far."""
        if self._writer is not None and self._rows:
            size = self._sink.tell()
            if size + size / self._rows * rows >= self._limit:
                self.close()
                self._number += 1
        return divmod(self._number, CHUNK_FILES)

    def write(self, table: pa.Table, place: tuple[int, int] | None = None) -> tuple[int, int]:
        """Write the table as one row group; returns (chunk, file)."""
        chunk, file = place or self.place(table.num_rows)
        if self._writer is None:
            path = self._root / self._template.format(chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._sink = path.open("wb")
            self._writer = pq.ParquetWriter(self._sink, table.schema, compression="snappy", use_dictionary=True)
            self._rows = 0
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._rows += table.num_rows
        return chunk, file

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._sink.close()
            self._writer = None

    def abandon(self) -> None:
        """Let go of a file that could not be written whole (a full disk); nothing is left open after close()."""
        if self._writer is not None:
            self._writer.is_open = False  # else its destructor writes again, and prints a traceback
            self._writer = None
            with contextlib.suppress(OSError):  # of the buffered rest; the first error is on its way up already
                self._sink.close()


class _Joined:
    """One camera's video files: decides which episodes share one, and joins them when each is full."""

    def __init__(self, root: Path, key: str, fps: int, limit_mb: int | float):
        self._root, self._key, self._fps, self._limit = root, key, fps, limit_mb * 2**20
        self._number = self._frames = self._size = 0
        self._paths: list[Path] = []

    def add(self, segment: Segment) -> dict[str, Any]:
        """Note the segment; returns its columns of the episodes' table."""
        if self._paths and self._size + segment.size >= self._limit:
            self.close()
            self._number += 1
        start, end = self._frames, self._frames + segment.frames
        self._paths.append(segment.path)
        self._frames, self._size = end, self._size + segment.size
        chunk, file = divmod(self._number, CHUNK_FILES)
        return {
            f"videos/{self._key}/chunk_index": chunk,
            f"videos/{self._key}/file_index": file,
            f"videos/{self._key}/from_timestamp": start / self._fps,
            f"videos/{self._key}/to_timestamp": end / self._fps,
        }

    def close(self) -> None:
        """Write the current file."""
        if self._paths:
            chunk, file = divmod(self._number, CHUNK_FILES)
            path = self._root / VIDEO_PATH.format(video_key=self._key, chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            frames = video.join_videos(self._paths, path, self._fps)
            if frames != self._frames:
                raise ValueError(f"{path}: {frames} frames joined of {self._frames}")
        self._paths, self._frames, self._size = [], 0, 0


def _arrow_column(values: np.ndarray, feature: Feature, length: int, key: str) -> pa.Array:
    flat = values.reshape(-1)
    if values.dtype != np.dtype(feature.dtype) or len(values) != length or flat.size != length * feature.shape[0]:
        raise ValueError(
            f"{key} is {values.dtype} {values.shape}; {feature.dtype} [{length}, {feature.shape[0]}] needed"
        )
    if feature.shape == (1,):
        return pa.array(flat)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), feature.shape[0])


def _write_tasks(path: Path, tasks: Sequence[str]) -> None:
    """The tasks' table as pandas writes it: lerobot reads it with pandas and wants the prompt as the index."""

    def column(name: str, kind: str, numpy_type: str) -> dict[str, Any]:
        return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy_type, "metadata": None}

    pandas = {
        "index_columns": ["task"],
        "column_indexes": [column("", "unicode", "object") | {"name": None, "metadata": {"encoding": "UTF-8"}}],
        "columns": [column("task_index", "int64", "int64"), column("task", "unicode", "object")],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.3.3",
    }
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)


def _write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=4) + "\n", encoding="utf-8")
