"""Where things lie in a dataset's folder. Each module of this package reads one layout, which it describes in `FORMAT`;
a new file here is a new dataset format.

Every dataset has a meta/info.json. Its "codebase_version" names the format, "features" its columns and cameras with
their "dtype" ("video", "image" or a number's), "fps" its rate. Read without lerobot.
"""

import functools
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hvd.errors import UserError


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


@dataclass(frozen=True)
class Format:
    """How the datasets of one codebase_version are read.

    Attributes:
        describe: called with the dataset's folder and the content of info.json, gives the prompts by task_index and the
            episodes in the order of the rows. A KeyError is reported as a field that is missing in the folder meta.
        table: reads a data file, or some columns of it; numbers by frame, and images as encoded bytes or paths.
        schema: the column names and types of a data file.
    """

    version: str
    describe: Callable[[Path, Mapping[str, Any]], tuple[dict[int, str], list[EpisodeMeta]]]
    table: Callable[[Path, list[str] | None], pa.Table] = read_parquet
    schema: Callable[[Path], pa.Schema] = read_schema


@functools.cache
def formats() -> dict[str, Format]:
    """The formats by version: the modules of this package."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    every = [importlib.import_module(f"{__name__}.{name}").FORMAT for name in names]
    return {format.version: format for format in every}


@dataclass(frozen=True)
class Layout:
    """A dataset's description. `data_paths` are in the order of the rows; `tasks[i]` is the prompt of task_index i."""

    root: Path
    format: Format
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    episodes: tuple[EpisodeMeta, ...]
    tasks: Mapping[int, str]

    @property
    def version(self) -> str:
        return self.format.version

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
    info = parse_json(info_path.read_bytes(), info_path)
    if not isinstance(info, dict):
        raise UserError(f"{info_path}: expected a JSON object")
    version = info.get("codebase_version")
    format = formats().get(str(version))
    if format is None:
        raise UserError(
            f"{info_path}: dataset version {version!r} is unknown; hvd reads {' and '.join(formats())}, "
            "convert the dataset with lerobot"
        )
    for field in ("fps", "features"):
        if field not in info:
            raise UserError(f"{info_path}: field {field!r} is missing")
    try:
        tasks, episodes = format.describe(root, info)
    except KeyError as error:
        raise UserError(
            f"{root / 'meta'}: field {error} is missing from the episodes' or tasks' description"
        ) from error
    if not episodes:
        raise UserError(f"{root}: the dataset has no episode")
    return Layout(root, format, float(info["fps"]), info["features"], tuple(episodes), tasks)


def parse_json(text: bytes, path: Path) -> Any:
    """The value of a JSON file's content, or of a line of it."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
