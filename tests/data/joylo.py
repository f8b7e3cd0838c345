"""Small JoyLo recordings for tests: what was written comes back as `Truth`, to compare with."""

from dataclasses import dataclass
from pathlib import Path

import av
import h5py
import numpy as np

from hvd.data.labels import Labels, Subtask, sidecar_path, write_labels
from hvd.data.recordings import CAMERAS
from hvd.pools import Isolated
from hvd.robots import get_robot


@dataclass(frozen=True)
class Truth:
    """state, actions: float32 [T, A] in the robot's order; images: uint8 [T, H, W, 3] per camera."""

    state: np.ndarray
    actions: np.ndarray
    images: dict[str, np.ndarray]
    environment: np.ndarray | None


class Here(Isolated):
    """Reads recordings in this process, which knows what a test has put in its place."""

    def __call__(self, function, *args, **kwargs):
        return function(*args, **kwargs)


def moving_images(num_frames: int, size: tuple[int, int], seed: int) -> np.ndarray:
    """uint8 [T, H, W, 3]: a smooth background with a box that moves, as easy for a codec as a real scene."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[0:height, 0:width] / max(size)
    phase = rng.uniform(0, 6, 3)
    images = np.empty((num_frames, height, width, 3), np.uint8)
    for t in range(num_frames):
        wave = np.sin(3 * x[..., None] + 2 * y[..., None] + phase + 0.05 * t)
        images[t] = (128 + 80 * wave).astype(np.uint8)
        left, top = (t * 2 + seed) % max(1, width - 8), (t + 3 * seed) % max(1, height - 8)
        images[t, top : top + 8, left : left + 8] = rng.integers(0, 255, 3, dtype=np.uint8)
    return images


def read_video(path: Path) -> np.ndarray:
    """The frames of a video, uint8 [T, H, W, 3]."""
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames)


def fill(
    root: h5py.Group,
    num_frames: int = 12,
    *,
    seed: int = 0,
    robot: str = "r1",
    size: tuple[int, int] = (32, 48),
    cameras: tuple[str, ...] = CAMERAS,
    gripper_2d: bool = False,
    base_velocity: bool = True,
    environment: bool = False,
    compression: str | None = None,
    extra_joints: int = 1,
) -> Truth:
    """Write one episode's groups below `root`. `extra_joints`: what arms are observed with beyond their joints."""
    rng = np.random.default_rng(seed)
    names = get_robot(robot).action_names
    joints = sum(name.startswith("left_arm_") for name in names)
    parts: dict[str, list[np.ndarray]] = {"state": [], "action": []}

    def gripper(values: np.ndarray) -> np.ndarray:
        return values[:, None] if gripper_2d else values

    def add(part: str) -> None:
        if part == "base":
            velocity = rng.normal(0, 0.2, (num_frames, 3))
            odom = root.require_group("obs/odom")
            odom["position"] = rng.normal(size=(num_frames, 3))
            odom["orientation"] = np.tile([0.0, 0.0, 0.0, 1.0], (num_frames, 1))
            if base_velocity:
                odom["base_velocity"] = velocity.astype(np.float32)
                odom["linear_velocity"] = rng.normal(size=(num_frames, 3))
                odom["angular_velocity"] = rng.normal(size=(num_frames, 3))
            else:
                odom["linear_velocity"] = np.concatenate([velocity[:, :2], np.zeros((num_frames, 1))], axis=1)
                odom["angular_velocity"] = np.concatenate([np.zeros((num_frames, 2)), velocity[:, 2:]], axis=1)
            command = rng.uniform(-0.3, 0.3, (num_frames, 3))
            root["action/mobile_base"] = command
            parts["state"].append(velocity)
            parts["action"].append(command)
        elif part.endswith("gripper"):
            stroke, command = rng.uniform(0, 100, (2, num_frames))
            root[f"obs/gripper_state/{part}/gripper_position"] = gripper(stroke)
            root[f"action/{part}"] = gripper(command)
            parts["state"].append(stroke[:, None])
            parts["action"].append(command[:, None])
        else:
            width = 4 if part == "torso" else joints
            more = 0 if part == "torso" else extra_joints
            position = np.cumsum(rng.normal(0, 0.05, (num_frames, width + more)), axis=0)
            command = position[:, :width] + rng.normal(0, 0.01, (num_frames, width))
            root[f"obs/joint_state/{part}/joint_position"] = position
            root[f"action/{part}"] = command
            parts["state"].append(position[:, :width])
            parts["action"].append(command)

    for part in ("left_arm", "left_gripper", "base", "right_arm", "right_gripper", "torso"):
        add(part)
    images = {}
    for i, camera in enumerate(cameras):
        images[camera] = moving_images(num_frames, size, seed * 7 + i)
        options = {"compression": compression, "chunks": (1, *size, 3)} if compression else {}
        root.create_dataset(f"obs/rgb/{camera}/img", data=images[camera], **options)
    extra = None
    if environment:
        extra = rng.normal(size=(num_frames, 11)).astype(np.float32)
        root["obs/sim/environment_state"] = extra
    state, actions = (np.concatenate(parts[key], axis=1).astype(np.float32) for key in ("state", "action"))
    return Truth(state, actions, images, extra)


def labels_of(num_frames: int, success: bool = True, task: str = "stack the boxes") -> Labels:
    """Two sub-tasks, the second one only when it succeeded."""
    half = max(1, num_frames // 2)
    subtasks = [Subtask("reached", 0, half)]
    if success and half < num_frames:
        subtasks.append(Subtask("placed", half, num_frames))
    return Labels(task, success, tuple(subtasks), "expert" if success else "teleop")


def write_recording(path: Path, num_frames: int = 12, *, fps: float | None = 10.0, success: bool | None = True, **kw):
    """A raw file with its sidecar (`success` None: without one); `kw` as in fill(). Returns the Truth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs["collected_time"] = "2026-11-23"
        file.attrs["horizon"] = num_frames
        if fps is not None:
            file.attrs["recording_freq"] = fps
        truth = fill(file, num_frames, **kw)
    if success is not None:
        write_labels(sidecar_path(path), labels_of(num_frames, success))
    return truth


def write_merged(path: Path, lengths: tuple[int, ...], success: bool | None = True, **kw) -> list[Truth]:
    """A merged file of len(lengths) episodes with a sidecar each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    truths = []
    with h5py.File(path, "w") as file:
        file.attrs["num_demos"] = len(lengths)
        file.attrs["merging_time"] = "2026-11-23"
        for i, length in enumerate(lengths):
            truths.append(fill(file.create_group(f"demo_{i}"), length, **({"seed": i} | kw)))
            if success is not None:
                write_labels(sidecar_path(path, i), labels_of(length, success))
    return truths


def write_folder(folder: Path, lengths: tuple[int, ...] = (12, 9, 15), failures: tuple[int, ...] = (), **kw):
    """Raw recordings demo_0000.hdf5, ... of the given lengths; `failures` are indices. Returns the Truths."""
    return [
        write_recording(folder / f"demo_{i:04d}.hdf5", n, seed=i, success=i not in failures, **kw)
        for i, n in enumerate(lengths)
    ]


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below `folder`: contents by relative path, None for a folder."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }
