"""LeRobot v3.0: meta/{info.json,tasks.parquet,episodes/*/*.parquet}, and files that hold many episodes each; the tables
in meta/episodes say where an episode lies.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvd.data.layout import EpisodeMeta, Format, VideoSpan, read_parquet, read_schema
from hvd.errors import UserError

_COLUMNS = ("episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index")


def describe(root: Path, info: Mapping[str, Any]) -> tuple[dict[int, str], list[EpisodeMeta]]:
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
        extra = {k: v for k, v in row.items() if "/" not in k and k not in _COLUMNS}
        episodes.append(
            EpisodeMeta(
                int(row["episode_index"]), int(row["length"]), tuple(row["tasks"] or ()), data_path, videos, extra
            )
        )
    return tasks, episodes


def _episode_rows(path: Path) -> list[dict[str, Any]]:
    # the columns of per-episode statistics are many and of no use here
    names = [n for n in read_schema(path).names if not n.startswith("stats/")]
    return read_parquet(path, names).to_pylist()


FORMAT = Format("v3.0", describe)
