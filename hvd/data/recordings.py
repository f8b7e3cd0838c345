"""JoyLo / BEHAVIOR Robot Suite recordings: HDF5 files of teleoperated episodes, raw (one episode a file) and merged
(groups `demo_<i>` in one file).

Below the episode's root lie `action/*`, `obs/joint_state/*`, `obs/gripper_state/*`, `obs/odom/*` and
`obs/rgb/<camera>/img`. Gripper values are strokes, 0 (closed) to 100 (open), kept as they are. Simulated recordings may
also hold `obs/sim/environment_state` [T, E].

Reading is lazy: the numeric columns of an episode are small and read whole, images only in blocks of a few megabytes.
Every fault is a UserError that names the file and the key.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np
from jaxtyping import Float32, UInt8

from hvd.errors import UserError, nearest
from hvd.robots import Robot

CAMERAS = ("head", "left_wrist", "right_wrist")
SUFFIXES = (".hdf5", ".h5")
ENVIRONMENT_STATE = "obs/sim/environment_state"
BLOCK_BYTES = 8 * 2**20  # images of one read; a few blocks at most are alive at a time


@dataclass(frozen=True)
class _Part:
    """Where a part of the robot lies in a recording. `cut`: observed columns beyond the part's width are dropped."""

    action: str
    state: str
    cut: bool = False


# Part names are the prefixes of hvd.robots' action names; "base" has no single state key (see Recording.state).
_PARTS = {
    "left_arm": _Part("action/left_arm", "obs/joint_state/left_arm/joint_position", cut=True),
    "left_gripper": _Part("action/left_gripper", "obs/gripper_state/left_gripper/gripper_position"),
    "base": _Part("action/mobile_base", ""),
    "right_arm": _Part("action/right_arm", "obs/joint_state/right_arm/joint_position", cut=True),
    "right_gripper": _Part("action/right_gripper", "obs/gripper_state/right_gripper/gripper_position"),
    "torso": _Part("action/torso", "obs/joint_state/torso/joint_position"),
}


@dataclass(frozen=True)
class RecordingRef:
    """One episode on disk: a raw file, or group `demo_<demo>` of a merged one."""

    path: Path
    demo: int | None = None

    def __str__(self) -> str:
        return str(self.path) if self.demo is None else f"{self.path}:demo_{self.demo}"


@dataclass(frozen=True)
class Summary:
    """What Recording.check found: frames, rate (None when the file does not say), image sizes, environment dims."""

    num_frames: int
    fps: float | None
    image_sizes: tuple[tuple[int, int], ...]  # (height, width) per camera, in the order asked for
    environment_dim: int  # 0 = the recording has no environment state


def recording_files(source: str | Path) -> list[Path]:
    """The HDF5 files of a folder in natural order (demo_2 before demo_10), or the one file that `source` is."""
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: no such folder of recordings")
    files = [p for p in source.iterdir() if p.suffix in SUFFIXES and not p.name.startswith(".") and p.is_file()]
    if not files:
        raise UserError(f"{source}: no recordings here (files ending in {' or '.join(SUFFIXES)})")
    return sorted(files, key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p.name)])


def episodes_of(path: Path) -> list[RecordingRef]:
    """The episodes of one file: itself when raw, one per `demo_<i>` group, by number, when merged."""
    with _open(path) as file:
        if "action" in file or "obs" in file:
            return [RecordingRef(path)]
        demos = sorted(int(name[5:]) for name in file.keys() if re.fullmatch(r"demo_\d+", name))
    if not demos:
        raise UserError(f"{path}: neither action and obs nor demo_<i> groups; not a JoyLo recording")
    return [RecordingRef(path, demo) for demo in demos]


def parts_of(robot: Robot) -> list[tuple[str, int]]:
    """The recording's parts in the order of the robot's action dims, each with its width."""
    parts: list[tuple[str, int]] = []
    for name in robot.action_names:
        part = next((p for p in _PARTS if name == p or name.startswith(f"{p}_")), None)
        if part is None:
            raise UserError(f"robot {robot.name}: no JoyLo recording has its {name!r}; use r1 or r1_pro")
        if parts and parts[-1][0] == part:
            parts[-1] = (part, parts[-1][1] + 1)
        else:
            parts.append((part, 1))
    return parts


class Recording:
    """An open episode; a context manager.

    Attributes:
        ref: which episode.
        num_frames: T, the length of the first action column.
        fps: frames per second as recorded, None when the file does not say (merged files often do not).
    """

    def __init__(self, ref: RecordingRef, robot: Robot, odom_yaw: float = 0.0):
        """Open `ref`. `odom_yaw` (rad): see state()."""
        self.ref, self.robot, self.odom_yaw = ref, robot, odom_yaw
        self._parts = parts_of(robot)
        self._file = _open(ref.path)
        try:
            root = self._file if ref.demo is None else self._file.get(f"demo_{ref.demo}")
            if not isinstance(root, h5py.Group):
                raise UserError(f"{ref}: no such group in the file")
            self._root = root
            self.num_frames = len(self._dataset(_PARTS[self._parts[0][0]].action))
            if self.num_frames == 0:
                raise UserError(f"{ref}: {_PARTS[self._parts[0][0]].action} has no frames")
            self.fps = self._rate()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._file.close()

    def check(self, cameras: tuple[str, ...]) -> Summary:
        """Read every numeric column and look at the images' shapes; raises UserError at the first fault."""
        self.actions()
        self.state()
        environment = self.environment_state()
        sizes = tuple(self.image_size(camera) for camera in cameras)
        return Summary(self.num_frames, self.fps, sizes, 0 if environment is None else environment.shape[1])

    def actions(self) -> Float32[np.ndarray, "t a"]:
        """Absolute targets in the robot's order: joints rad, grippers 0..100, base vx, vy m/s and wz rad/s."""
        return np.concatenate([self._column(_PARTS[part].action, width) for part, width in self._parts], axis=1)

    def state(self) -> Float32[np.ndarray, "t a"]:
        """Measured state in the order of the actions.

        The base's part is its velocity (vx, vy, wz) in the base frame: `obs/odom/base_velocity` where the file was
        post-processed, else `linear_velocity[:, :2]` turned by `odom_yaw`, and `angular_velocity[:, 2]`. Raw odometry
        is a twist in the frame of the tracker, which rides on the base (a ROS Odometry message gives twists in the
        child frame), so nothing is rotated from world to body; what remains is how the tracker is mounted, the
        constant `odom_yaw` (its x axis seen from the base, counter-clockwise).
        """
        columns = []
        for part, width in self._parts:
            where = _PARTS[part]
            columns.append(self._column(where.state, width, cut=where.cut) if where.state else self._base_velocity())
        return np.concatenate(columns, axis=1)

    def environment_state(self) -> Float32[np.ndarray, "t e"] | None:
        """The simulator's `obs/sim/environment_state`; None where there is none (all real recordings)."""
        if ENVIRONMENT_STATE not in self._root:
            return None
        data = self._dataset(ENVIRONMENT_STATE)
        return self._column(ENVIRONMENT_STATE, data.shape[1] if data.ndim == 2 else 1)

    def image_size(self, camera: str) -> tuple[int, int]:
        """(height, width) of the camera's images, after checking that they are uint8 RGB and as many as actions."""
        data = self._images(camera)
        return int(data.shape[1]), int(data.shape[2])

    def frames(self, camera: str) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        """The camera's images in order, in blocks of at most BLOCK_BYTES (one HDF5 chunk if that is larger)."""
        data, key = self._images(camera), _image_key(camera)
        fit = max(1, BLOCK_BYTES // int(np.prod(data.shape[1:])))
        chunk = data.chunks[0] if data.chunks else 1
        step = max(1, fit // chunk) * chunk  # whole chunks, so that none is decompressed twice
        for start in range(0, self.num_frames, step):
            try:
                block = data[start : start + step]
            except OSError as error:
                raise UserError(f"{self.ref}: cannot read {key} at frame {start}: {_reason(error)}") from error
            yield block

    def _rate(self) -> float | None:
        for attrs in (self._root.attrs, self._file.attrs):
            if "recording_freq" in attrs:
                value = np.asarray(attrs["recording_freq"])
                if value.size != 1 or value.dtype.kind not in "fiu" or not 0 < float(value.item()) < np.inf:
                    raise UserError(f"{self.ref}: attribute recording_freq is {value}; a positive number is needed")
                return float(value.item())
        return None

    def _base_velocity(self) -> Float32[np.ndarray, "t 3"]:
        if "obs/odom/base_velocity" in self._root:
            return self._column("obs/odom/base_velocity", 3)
        linear = self._column("obs/odom/linear_velocity", 3)
        angular = self._column("obs/odom/angular_velocity", 3)
        if self.odom_yaw:
            c, s = np.float32(np.cos(self.odom_yaw)), np.float32(np.sin(self.odom_yaw))
            x, y = linear[:, 0], linear[:, 1]
            linear = np.stack([c * x - s * y, s * x + c * y], axis=1)
        return np.concatenate([linear[:, :2], angular[:, 2:]], axis=1)

    def _images(self, camera: str) -> h5py.Dataset:
        key = _image_key(camera)
        if key not in self._root:
            group = self._root.get("obs/rgb")
            there = list(group) if isinstance(group, h5py.Group) else []
            raise UserError(f"{self.ref}: camera {camera!r} is missing (key {key}){nearest(camera, there)}")
        data = self._dataset(key)
        if data.ndim != 4 or data.shape[3] != 3 or data.dtype != np.uint8:
            raise UserError(f"{self.ref}: {key} is {data.dtype} {list(data.shape)}; uint8 [T, H, W, 3] is needed")
        self._check_length(key, data)
        return data

    def _column(self, key: str, width: int, cut: bool = False) -> Float32[np.ndarray, "t w"]:
        """Column `key` as [T, width]; `cut` drops further columns. Checks type, length, width and finiteness."""
        data = self._dataset(key)
        if data.dtype.kind not in "fiu":
            raise UserError(f"{self.ref}: {key} is of type {data.dtype}; numbers are needed")
        self._check_length(key, data)
        found = 1 if data.ndim == 1 else data.shape[1] if data.ndim == 2 else -1
        if found != width and not (cut and found > width):
            raise UserError(
                f"{self.ref}: {key} has shape {list(data.shape)}, robot {self.robot.name} needs "
                f"[{self.num_frames}, {width}]; is --robot right?"
            )
        try:
            values = data[...]
        except OSError as error:
            raise UserError(f"{self.ref}: cannot read {key}: {_reason(error)}") from error
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is reported below
            values = values.reshape(self.num_frames, found)[:, :width].astype(np.float32)
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            raise UserError(f"{self.ref}: {key} has a NaN or infinite value at frame {int(np.argmax(bad))}")
        return values

    def _dataset(self, key: str) -> h5py.Dataset:
        try:
            data = self._root.get(key)
        except (OSError, RuntimeError) as error:  # a damaged object header
            raise UserError(f"{self.ref}: cannot read {key}: {_reason(error)}") from error
        if data is None:
            raise UserError(f"{self.ref}: key {key} is missing")
        if not isinstance(data, h5py.Dataset) or data.ndim == 0:
            raise UserError(f"{self.ref}: {key} is not an array")
        return data

    def _check_length(self, key: str, data: h5py.Dataset) -> None:
        if len(data) != self.num_frames:
            first = _PARTS[self._parts[0][0]].action
            raise UserError(f"{self.ref}: {key} has {len(data)} frames but {first} has {self.num_frames}")


def _image_key(camera: str) -> str:
    return f"obs/rgb/{camera}/img"


def _open(path: Path) -> h5py.File:
    try:
        # best-effort: read-only and network file systems often have no locks
        return h5py.File(path, "r", locking="best-effort")
    except FileNotFoundError:
        raise UserError(f"{path}: recording is missing") from None
    except OSError as error:
        raise UserError(f"{path}: not a readable HDF5 file (truncated or damaged?): {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """HDF5's own words, without its preamble: the text in the last parentheses where there is one."""
    text = str(error)
    with contextlib.suppress(ValueError):
        text = text[text.index("(") + 1 : text.rindex(")")]
    return text
