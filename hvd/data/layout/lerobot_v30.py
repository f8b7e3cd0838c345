"""LeRobot v3.0: meta/{info.json,tasks.parquet,episodes/*/*.parquet}, and files that hold many episodes each; the tables
in meta/episodes say where an episode lies.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pyarrow as pa
from msgspec import Meta, field

from hvd import documents
from hvd.data.layout import (
    EpisodeMeta,
    Format,
    Length,
    PathTemplate,
    VideoSpan,
    count_rows,
    parse_json,
    prompts,
    read_meta,
)
from hvd.documents import Count
from hvd.errors import UserError

_FIELDS = ("chunk_index", "file_index")


class _Info(msgspec.Struct):
    data_path: str
    features: dict[str, dict[str, Any]]
    video_path: str | None = None


class _Episode(msgspec.Struct):
    episode_index: Count
    length: Length
    dataset_from_index: Count
    chunk: Count = field(name="data/chunk_index")
    file: Count = field(name="data/file_index")
    tasks: list[str] | str | None = None


class _Video(msgspec.Struct):
    chunk_index: Count
    file_index: Count
    from_timestamp: Annotated[float, Meta(ge=0, lt=1e9)]


class _Task(msgspec.Struct):
    task_index: Count
    task: str


def describe(root: Path, info: Mapping[str, Any]) -> tuple[dict[int, str], list[EpisodeMeta]]:
    said, data = _paths(root, info)
    video = None
    if said.video_path is not None:
        where = f"{root / 'meta/info.json'}: video_path"
        video = PathTemplate(root, said.video_path, (*_FIELDS, "video_key"), where)
    cameras = [k for k, f in said.features.items() if f["dtype"] == "video"]
    folder = root / "meta" / "episodes"
    paths = sorted(folder.glob("*/*.parquet"))
    if not paths:
        raise UserError(f"{folder}: no episodes file in it")
    found = []
    for path in paths:
        # the columns of per-episode statistics are many and of no use here
        for row in read_meta(path, without="stats/")[1]:
            where = f"{path}: episode {row.get('episode_index')}"
            episode = documents.convert(row, _Episode, where)
            spans = {key: _span(row, key, video, where) for key in cameras} if video else {}
            videos = {key: span for key, span in spans.items() if span is not None}
            extra = {k: v for k, v in row.items() if "/" not in k and k not in _Episode.__struct_fields__}
            extra.pop("dataset_to_index", None)
            texts = (episode.tasks,) if isinstance(episode.tasks, str) else tuple(episode.tasks or ())
            data_path = data.path(chunk_index=episode.chunk, file_index=episode.file)
            meta = EpisodeMeta(episode.episode_index, episode.length, texts, data_path, videos, extra)
            found.append((episode.dataset_from_index, meta))
    return _tasks(root / "meta" / "tasks.parquet"), [meta for _, meta in sorted(found, key=lambda pair: pair[0])]


def _span(row: Mapping[str, Any], key: str, video: PathTemplate, where: str) -> VideoSpan | None:
    """Where the video of a camera lies; None when the episode has none."""
    prefix = f"videos/{key}/"
    said = {name: row.get(prefix + name) for name in _Video.__struct_fields__}
    if all(value is None for value in said.values()):
        return None
    place = documents.convert(said, _Video, f"{where}: {prefix[:-1]}")
    path = video.path(video_key=key, chunk_index=place.chunk_index, file_index=place.file_index)
    return VideoSpan(path, place.from_timestamp)


def _paths(root: Path, info: Mapping[str, Any]) -> tuple[_Info, PathTemplate]:
    where = str(root / "meta" / "info.json")
    said = documents.convert(info, _Info, where)
    return said, PathTemplate(root, said.data_path, _FIELDS, f"{where}: data_path")


def _tasks(path: Path) -> dict[int, str]:
    schema, read = read_meta(path)
    column = _prompt_column(schema, path)
    rows = [{"task_index": row.get("task_index"), "task": row[column]} for row in read]
    tasks = (documents.convert(row, _Task, f"{path}: row {i}") for i, row in enumerate(rows))
    return prompts(((task.task_index, task.task) for task in tasks), path)


def _prompt_column(schema: pa.Schema, path: Path) -> str:
    """lerobot writes the prompt as pandas' index, which pandas' note in the schema names."""
    note = parse_json((schema.metadata or {}).get(b"pandas", b"{}"), f"{path}: pandas' note")
    index = note.get("index_columns") if isinstance(note, dict) else None
    for name in (*(index if isinstance(index, list) else ()), "task", "__index_level_0__"):
        if isinstance(name, str) and name != "task_index" and name in schema.names:
            return name
    raise UserError(f"{path}: no column of prompts called task; its columns are {', '.join(schema.names[:12])}")


def files(root: Path, info: Mapping[str, Any]) -> tuple[Path, ...]:
    """All data files: lerobot's own converter leaves a wrong data/file_index in some episodes."""
    return _paths(root, info)[1].existing()


FORMAT = Format("v3.0", describe, rows=count_rows, files=files)
