"""LeRobot v2.1: meta/{info.json,episodes.jsonl,tasks.jsonl}, one parquet file and one mp4 per camera and episode."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from hvd import documents
from hvd.data.layout import EpisodeMeta, Format, Length, PathTemplate, VideoSpan, count_rows, json_lines, prompts
from hvd.documents import Count


class _Info(msgspec.Struct):
    data_path: str
    features: dict[str, dict[str, Any]]
    video_path: str | None = None
    chunks_size: Annotated[int, Meta(ge=1, le=2**53)] = 1000


class _Episode(msgspec.Struct):
    episode_index: Count
    length: Length
    tasks: list[str] | str | None = None


class _Task(msgspec.Struct):
    task_index: Count
    task: str


def describe(root: Path, info: Mapping[str, Any]) -> tuple[dict[int, str], list[EpisodeMeta]]:
    meta = root / "meta"
    said = documents.convert(info, _Info, str(meta / "info.json"))
    tasks = [(task.task_index, task.task) for task, _ in json_lines(meta / "tasks.jsonl", _Task)]
    where, fields = f"{meta / 'info.json'}:", ("episode_chunk", "episode_index")
    data = PathTemplate(root, said.data_path, fields, f"{where} data_path")
    cameras = [k for k, f in said.features.items() if f["dtype"] == "video"]
    video = None
    if said.video_path is not None:
        video = PathTemplate(root, said.video_path, (*fields, "video_key"), f"{where} video_path")
    episodes = []
    for line, extra in json_lines(meta / "episodes.jsonl", _Episode):
        names = {"episode_chunk": line.episode_index // said.chunks_size, "episode_index": line.episode_index}
        videos = {k: VideoSpan(video.path(video_key=k, **names), 0.0) for k in cameras} if video else {}
        extra = {k: v for k, v in extra.items() if k not in ("episode_index", "tasks", "length")}
        texts = (line.tasks,) if isinstance(line.tasks, str) else tuple(line.tasks or ())
        episodes.append(EpisodeMeta(line.episode_index, line.length, texts, data.path(**names), videos, extra))
    return prompts(tasks, meta / "tasks.jsonl"), sorted(episodes, key=lambda e: e.index)


FORMAT = Format("v2.1", describe, rows=count_rows)
