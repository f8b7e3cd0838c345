"""Small LeRobot datasets, written with pyarrow and PyAV alone, whose every value and frame can be predicted."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hvd.configs import DataConfig, KeyMap
from hvd.data.video import encode_video

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
KEYS = {"base_0_rgb": "observation.images.head", "left_wrist_0_rgb": "observation.images.left_wrist"}
TASKS = ("open the drawer", "close the drawer")


@dataclass
class Recipe:
    """What a dataset of the factory holds; the arrays are those the files are written from."""

    root: Path
    lengths: tuple[int, ...]
    version: Literal["v2.1", "v3.0"] = "v3.0"
    kind: Literal["video", "image"] = "video"
    size: tuple[int, int] = (32, 48)
    fps: int = 10
    state_dim: int = 4
    action_dim: int = 21
    cameras: tuple[str, ...] = CAMERAS
    success: tuple[bool, ...] | None = None
    columns: tuple[str, str] | None = ("next.reward", "terminal")  # names of the reward and terminal columns
    terminal_at: dict[int, int] = field(default_factory=dict)  # episode -> frame; default: the last one
    seed: int = 0
    codec: str = "h264"

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        n = sum(self.lengths)
        self.starts = np.cumsum([0, *self.lengths])
        self.state = rng.normal(size=(n, self.state_dim)).astype(np.float32)
        self.actions = rng.normal(size=(n, self.action_dim)).astype(np.float32)
        self.rewards = rng.integers(0, 3, n).astype(np.float32)
        self.terminal = np.zeros(n, bool)
        for i, length in enumerate(self.lengths):
            self.terminal[self.starts[i] + self.terminal_at.get(i, length - 1)] = True
        self.episode_of = np.repeat(np.arange(len(self.lengths)), self.lengths)
        self.frame_of = np.arange(n) - self.starts[self.episode_of]

    def frame(self, camera: str, row: int) -> np.ndarray:
        """The camera's frame of a row: flat fields, so that lossy coding keeps their level."""
        number = 7 * int(self.frame_of[row]) + 31 * int(self.episode_of[row]) + 50 * self.cameras.index(camera)
        image = np.full((*self.size, 3), 30 + number % 160, np.uint8)
        image[:, : self.size[1] // 2] = 30 + (3 * number + 40) % 160
        return image

    def frames(self, camera: str) -> np.ndarray:
        return np.stack([self.frame(camera, row) for row in range(len(self.state))])

    @property
    def config(self) -> DataConfig:
        keys = KeyMap(images={c: KEYS[c] for c in self.cameras})
        return DataConfig(repo_id=self.root.name, root=str(self.root), keys=keys)


def make_dataset(root: Path, lengths: Sequence[int] = (12, 7, 9), **options: Any) -> Recipe:
    """Write a dataset to `root` and return what it holds."""
    recipe = Recipe(root, tuple(lengths), **options)
    write_dataset(recipe)
    return recipe


def write_dataset(recipe: Recipe) -> None:
    (_write_v21 if recipe.version == "v2.1" else _write_v30)(recipe)


def _features(recipe: Recipe) -> dict[str, Any]:
    features: dict[str, Any] = {
        "observation.state": {"dtype": "float32", "shape": [recipe.state_dim], "names": None},
        "action": {"dtype": "float32", "shape": [recipe.action_dim], "names": None},
    }
    for camera in recipe.cameras:
        shape = [*recipe.size, 3]
        features[KEYS[camera]] = {"dtype": recipe.kind, "shape": shape, "names": ["height", "width", "channels"]}
    return features


def _info(recipe: Recipe, **paths: str) -> dict[str, Any]:
    return {
        "codebase_version": recipe.version,
        "fps": recipe.fps,
        "total_episodes": len(recipe.lengths),
        "total_frames": len(recipe.state),
        "chunks_size": 1000,
        "features": _features(recipe),
        **paths,
    }


def _table(recipe: Recipe, rows: np.ndarray) -> pa.Table:
    def vectors(x: np.ndarray) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])

    columns: dict[str, Any] = {
        "observation.state": vectors(recipe.state[rows]),
        "action": vectors(recipe.actions[rows]),
        "timestamp": pa.array((recipe.frame_of[rows] / recipe.fps).astype(np.float32)),
        "frame_index": pa.array(recipe.frame_of[rows]),
        "episode_index": pa.array(recipe.episode_of[rows]),
        "index": pa.array(rows),
        "task_index": pa.array(recipe.episode_of[rows] % len(TASKS)),
    }
    if recipe.columns:
        reward, terminal = recipe.columns
        columns[reward] = pa.array(recipe.rewards[rows])
        columns[terminal] = pa.array(recipe.terminal[rows])
    if recipe.kind == "image":
        for camera in recipe.cameras:
            cells = [{"bytes": _png(recipe.frame(camera, row)), "path": f"{row}.png"} for row in rows]
            columns[KEYS[camera]] = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return pa.table(columns)


def _png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def _write_videos(recipe: Recipe, camera: str, path: Path, rows: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encode_video(path, [np.stack([recipe.frame(camera, row) for row in rows])], recipe.fps, recipe.codec)


def _write_v21(recipe: Recipe) -> None:
    meta, data = recipe.root / "meta", recipe.root / "data/chunk-000"
    meta.mkdir(parents=True)
    data.mkdir(parents=True)
    data_path = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video_path = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    info = _info(recipe, data_path=data_path, video_path=video_path)
    (meta / "info.json").write_text(json.dumps(info))
    tasks = [{"task_index": i, "task": t} for i, t in enumerate(TASKS)]
    (meta / "tasks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tasks))
    lines = []
    for i, length in enumerate(recipe.lengths):
        line: dict[str, Any] = {"episode_index": i, "tasks": [TASKS[i % 2]], "length": length}
        if recipe.success is not None:
            line["success"] = recipe.success[i]
        lines.append(line)
        rows = np.arange(recipe.starts[i], recipe.starts[i + 1])
        pq.write_table(_table(recipe, rows), data / f"episode_{i:06d}.parquet")
        if recipe.kind == "video":
            for camera in recipe.cameras:
                path = recipe.root / f"videos/chunk-000/{KEYS[camera]}/episode_{i:06d}.mp4"
                _write_videos(recipe, camera, path, rows)
    (meta / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_v30(recipe: Recipe) -> None:
    """Two episodes per data file; one video file per camera."""
    root, file = recipe.root, "chunk-{chunk_index:03d}/file-{file_index:03d}"
    for folder in ("meta/episodes/chunk-000", "data/chunk-000"):
        (root / folder).mkdir(parents=True)
    info = _info(recipe, data_path=f"data/{file}.parquet", video_path=f"videos/{{video_key}}/{file}.mp4")
    (root / "meta/info.json").write_text(json.dumps(info))
    tasks = pa.table({"task_index": list(range(len(TASKS))), "__index_level_0__": list(TASKS)})
    pq.write_table(tasks, root / "meta/tasks.parquet")
    episodes = []
    for i, length in enumerate(recipe.lengths):
        row: dict[str, Any] = {
            "episode_index": i,
            "tasks": [TASKS[i % 2]],
            "length": length,
            "data/chunk_index": 0,
            "data/file_index": i // 2,
            "dataset_from_index": int(recipe.starts[i]),
            "dataset_to_index": int(recipe.starts[i + 1]),
            "stats/action/min": [0.0],
            "quality": "expert" if i % 2 else "teleop",
        }
        if recipe.kind == "video":
            for camera in recipe.cameras:
                row[f"videos/{KEYS[camera]}/chunk_index"] = 0
                row[f"videos/{KEYS[camera]}/file_index"] = 0
                row[f"videos/{KEYS[camera]}/from_timestamp"] = float(recipe.starts[i] / recipe.fps)
        if recipe.success is not None:
            row["success"] = recipe.success[i]
        episodes.append(row)
    pq.write_table(pa.Table.from_pylist(episodes), root / "meta/episodes/chunk-000/file-000.parquet")
    for i in range(0, len(recipe.lengths), 2):
        rows = np.arange(recipe.starts[i], recipe.starts[min(i + 2, len(recipe.lengths))])
        pq.write_table(_table(recipe, rows), root / f"data/chunk-000/file-{i // 2:03d}.parquet")
    if recipe.kind == "video":
        for camera in recipe.cameras:
            path = root / f"videos/{KEYS[camera]}/chunk-000/file-000.mp4"
            _write_videos(recipe, camera, path, np.arange(len(recipe.state)))
