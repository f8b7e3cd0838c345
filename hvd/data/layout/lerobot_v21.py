"""LeRobot v2.1: meta/{info.json,episodes.jsonl,tasks.jsonl}, one parquet file and one mp4 per camera and episode."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvd.data.layout import EpisodeMeta, Format, VideoSpan, parse_json
from hvd.errors import UserError


def describe(root: Path, info: Mapping[str, Any]) -> tuple[dict[int, str], list[EpisodeMeta]]:
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


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: not found")
    return [parse_json(line, path) for line in path.read_bytes().splitlines() if line.strip()]


FORMAT = Format("v2.1", describe)
