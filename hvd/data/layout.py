"""Where things lie in a LeRobot dataset folder, versions v2.1 and v3.0, read from its meta folder without lerobot.

v2.1: meta/{info.json,episodes.jsonl,tasks.jsonl}, one parquet file and one mp4 per camera and episode.
v3.0: meta/{info.json,tasks.parquet,episodes/*/*.parquet}, files that hold many episodes; meta/episodes says which.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hvd.errors import UserError

VERSIONS = ("v2.1", "v3.0")


@dataclass(frozen=True)
class VideoSpan:
    """The part of a video file that belongs to one episode: it begins `offset` seconds into the file."""

    path: Path
    offset: float


@dataclass(frozen=True)
class EpisodeMeta:
    """One episode as the meta folder has it. `extra` holds fields that are not LeRobot's own (success, quality)."""

    index: int
    length: int
    tasks: tuple[str, ...]
    data_path: Path
    videos: Mapping[str, VideoSpan]
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """A dataset's description. `data_paths` are in the order of the rows; `tasks[i]` is the prompt of task_index i."""

    root: Path
    version: str
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    episodes: tuple[EpisodeMeta, ...]
    tasks: Mapping[int, str]

    @property
    def data_paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(e.data_path for e in self.episodes))

    @property
    def video_paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(v.path for e in self.episodes for v in e.videos.values()))

    @property
    def image_keys(self) -> tuple[str, ...]:
        return tuple(k for k, f in self.features.items() if f.get("dtype") in ("video", "image"))


def read_layout(root: Path) -> Layout:
    """Read the meta folder of the dataset at `root`. Raises UserError naming the file that is missing or wrong."""
    root = root.absolute()
    info_path = root / "meta" / "info.json"
    if not info_path.is_file():
        raise UserError(f"{info_path}: not found; set the data config's root (or HF_LEROBOT_HOME) to a LeRobot dataset")
    info = _json(info_path.read_bytes(), info_path)
    if not isinstance(info, dict):
        raise UserError(f"{info_path}: expected a JSON object")
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise UserError(
            f"{info_path}: dataset version {version!r} is unknown; hvd reads {' and '.join(VERSIONS)}, "
            "convert the dataset with lerobot"
        )
    for field in ("fps", "features", "data_path"):
        if field not in info:
            raise UserError(f"{info_path}: field {field!r} is missing")
    try:
        tasks, episodes = (_read_v21 if version == "v2.1" else _read_v30)(root, info)
    except KeyError as error:
        raise UserError(
            f"{root / 'meta'}: field {error} is missing from the episodes' or tasks' description"
        ) from error
    if not episodes:
        raise UserError(f"{root}: the dataset has no episode")
    return Layout(root, version, float(info["fps"]), info["features"], tuple(episodes), tasks)


def _read_v21(root: Path, info: Mapping[str, Any]) -> tuple[dict[int, str], list[EpisodeMeta]]:
    tasks = {int(t["task_index"]): str(t["task"]) for t in _json_lines(root / "meta" / "tasks.jsonl")}
    chunk_size = int(info.get("chunks_size", 1000))
    cameras = [k for k, f in info["features"].items() if f.get("dtype") == "video"]
    episodes = []
    for line in sorted(_json_lines(root / "meta" / "episodes.jsonl"), key=lambda line: line["episode_index"]):
        index = int(line["episode_index"])
        names = {"episode_chunk": index // chunk_size, "episode_index": index}
        videos = {k: VideoSpan(root / info["video_path"].format(video_key=k, **names), 0.0) for k in cameras}
        extra = {k: v for k, v in line.items() if k not in ("episode_index", "tasks", "length")}
        data_path = root / info["data_path"].format(**names)
        episodes.append(EpisodeMeta(index, int(line["length"]), tuple(line.get("tasks", ())), data_path, videos, extra))
    return tasks, episodes


def _read_v30(root: Path, info: Mapping[str, Any]) -> tuple[dict[int, str], list[EpisodeMeta]]:
    table = read_parquet(root / "meta" / "tasks.parquet")
    # pandas writes the prompt as the index: a column called "task" or "__index_level_0__", according to the writer
    prompt_column = next((c for c in table.column_names if c != "task_index"), "task")
    prompts = table[prompt_column].to_pylist()
    tasks = {int(i): str(p) for i, p in zip(table["task_index"].to_pylist(), prompts, strict=True)}
    cameras = [k for k, f in info["features"].items() if f.get("dtype") == "video"]
    folder = root / "meta" / "episodes"
    paths = sorted(folder.glob("*/*.parquet"))
    if not paths:
        raise UserError(f"{folder}: no episodes file in it")
    rows = [row for path in paths for row in _episode_rows(path)]
    episodes = []
    for row in sorted(rows, key=lambda row: row["dataset_from_index"]):
        videos = {}
        for key in cameras:
            chunk, file = row[f"videos/{key}/chunk_index"], row[f"videos/{key}/file_index"]
            path = root / info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file)
            videos[key] = VideoSpan(path, float(row[f"videos/{key}/from_timestamp"]))
        data_path = root / info["data_path"].format(
            chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
        )
        extra = {k: v for k, v in row.items() if "/" not in k and k not in _V30_COLUMNS}
        episodes.append(
            EpisodeMeta(
                int(row["episode_index"]), int(row["length"]), tuple(row["tasks"] or ()), data_path, videos, extra
            )
        )
    return tasks, episodes


_V30_COLUMNS = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index")


def _episode_rows(path: Path) -> list[dict[str, Any]]:
    # the columns of per-episode statistics are many and of no use here
    names = [n for n in read_schema(path).names if not n.startswith("stats/")]
    return read_parquet(path, names).to_pylist()


def read_schema(path: Path) -> pa.Schema:
    """The schema of a parquet file; a UserError names a file that is missing or damaged."""
    try:
        return pq.read_schema(path)
    except FileNotFoundError:
        raise UserError(f"{path}: data file is missing") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged or truncated parquet file ({error})") from error


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A parquet file, or some columns of it; a UserError names a file that is missing or damaged."""
    try:
        return pq.ParquetFile(path).read(columns=columns)
    except FileNotFoundError:
        raise UserError(f"{path}: data file is missing") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged or truncated parquet file ({error})") from error


def _json(text: bytes, path: Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: not found")
    return [_json(line, path) for line in path.read_bytes().splitlines() if line.strip()]
