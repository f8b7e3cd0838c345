"""JoyLo / BEHAVIOR Robot Suite recordings: HDF5 files of teleoperated episodes, raw (one episode a file) and merged
(groups `demo_<i>` in one file).

Below the episode's root lie the keys that the robot names for its parts (hvd.robots), `obs/odom/*` and
`obs/rgb/<camera>/img`. Gripper values are strokes, 0 (closed) to 100 (open), kept as they are. Simulated recordings may
also hold `obs/sim/environment_state` [T, E].

A recording's bytes are its own: what HDF5 would read from another file (external storage, external links, virtual
datasets), and what was declared but never written and would read as zeros, is refused.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float32, UInt8

from hvd.data.recordings import Format, RecordingRef
from hvd.errors import UserError, nearest
from hvd.robots import ODOMETRY, ROBOTS, Robot

ENVIRONMENT_STATE = "obs/sim/environment_state"
BLOCK_BYTES = 8 * 2**20  # images of one read; a few blocks at most are alive at a time
MAX_FRAMES = 2**24  # a fortnight at 10 Hz
MAX_NUMBERS = 2**27  # of one column
MAX_PIXELS = 2**25  # of an image: 8K
MAX_CHUNK = 2**30  # bytes that HDF5 unpacks at once
MAX_RATE = 1000  # frames per second
_HOPS = 16  # soft links on the way to a key
_DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError)  # what h5py says of a damaged file


def episodes(path: Path) -> tuple[int | None, ...]:
    """(None,) for a raw file, the sorted numbers of its `demo_<i>` groups for a merged one, () for anything else."""
    with _open(path) as file:
        names = set(file.keys())  # `in` would follow a link
        if names & {"action", "obs"}:
            return (None,)
        return tuple(sorted(int(name[5:]) for name in names if re.fullmatch(r"demo_\d{1,9}", name)))


class JoyLo:
    """An open episode (hvd.data.recordings.Recording).

    Attributes:
        ref: which episode.
        num_frames: T, the length of the first action column.
        fps: frames per second as recorded, None when the file does not say (merged files often do not).
    """

    def __init__(self, ref: RecordingRef, robot: Robot, odom_yaw: float = 0.0):
        """Open `ref`. `odom_yaw` (rad): see state()."""
        self.ref, self.robot, self.odom_yaw = ref, robot, odom_yaw
        if not robot.parts:
            known = " or ".join(name for name, other in ROBOTS.items() if other.parts)
            raise UserError(f"robot {robot.name}: no JoyLo recording has its {robot.action_names[0]!r}; use {known}")
        self._file = _open(ref.path)
        try:
            root = self._file if ref.demo is None else self._find(self._file, f"demo_{ref.demo}")
            if not isinstance(root, h5py.Group):
                raise UserError(f"{ref}: no such group in the file")
            self._root = root
            self.num_frames = len(self._dataset(robot.parts[0].action))
            if not 0 < self.num_frames <= MAX_FRAMES:
                count = self.num_frames or "no"
                raise UserError(f"{ref}: {robot.parts[0].action} has {count} frames; 1 to {MAX_FRAMES} are taken")
            self.fps = self._rate()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "JoyLo":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def actions(self) -> Float32[np.ndarray, "t a"]:
        """Absolute targets in the robot's order: joints rad, grippers 0..100, base vx, vy m/s and wz rad/s."""
        return np.concatenate([self._column(part.action, len(part.names)) for part in self.robot.parts], axis=1)

    def state(self) -> Float32[np.ndarray, "t a"]:
        """Measured state in the order of the actions.

        The base's part is its velocity (vx, vy, wz) in the base frame: `obs/odom/base_velocity` where the file was
        post-processed, else `linear_velocity[:, :2]` turned by `odom_yaw`, and `angular_velocity[:, 2]`. Raw odometry
        is a twist in the frame of the tracker, which rides on the base (a ROS Odometry message gives twists in the
        child frame), so nothing is rotated from world to body; what remains is how the tracker is mounted, the
        constant `odom_yaw` (its x axis seen from the base, counter-clockwise).
        """
        columns = [
            self._base_velocity() if part.state == ODOMETRY else self._column(part.state, len(part.names), part.cut)
            for part in self.robot.parts
        ]
        return np.concatenate(columns, axis=1)

    def environment_state(self) -> Float32[np.ndarray, "t e"] | None:
        """The simulator's `obs/sim/environment_state`; None where there is none (all real recordings)."""
        if self._find(self._root, ENVIRONMENT_STATE) is None:
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
        size = math.prod(data.shape[1:])
        fit = max(1, BLOCK_BYTES // size)
        chunk = data.chunks[0] if data.chunks else 1
        step = max(1, fit // chunk) * chunk  # whole chunks, so that none is decompressed twice
        if step * size > MAX_CHUNK:
            step = fit
        for start in range(0, self.num_frames, step):
            try:
                block = data[start : start + step]
            except _DAMAGE as error:
                raise UserError(f"{self.ref}: cannot read {key} at frame {start}: {_reason(error)}") from error
            yield block

    def _rate(self) -> float | None:
        for attrs in (self._root.attrs, self._file.attrs):
            if "recording_freq" in attrs:
                value = np.asarray(attrs["recording_freq"])
                if value.size != 1 or value.dtype.kind not in "fiu" or not 0 < float(value.item()) <= MAX_RATE:
                    said = str(value)[:80]
                    needed = f"a positive number is needed, {MAX_RATE} at most"
                    raise UserError(f"{self.ref}: attribute recording_freq is {said}; {needed}")
                return float(value.item())
        return None

    def _base_velocity(self) -> Float32[np.ndarray, "t 3"]:
        if self._find(self._root, f"{ODOMETRY}/base_velocity") is not None:
            return self._column(f"{ODOMETRY}/base_velocity", 3)
        linear = self._column(f"{ODOMETRY}/linear_velocity", 3)
        angular = self._column(f"{ODOMETRY}/angular_velocity", 3)
        if self.odom_yaw:
            c, s = np.float32(np.cos(self.odom_yaw)), np.float32(np.sin(self.odom_yaw))
            x, y = linear[:, 0], linear[:, 1]
            linear = np.stack([c * x - s * y, s * x + c * y], axis=1)
        return np.concatenate([linear[:, :2], angular[:, 2:]], axis=1)

    def _images(self, camera: str) -> h5py.Dataset:
        key = _image_key(camera)
        if self._find(self._root, key) is None:
            group = self._find(self._root, "obs/rgb")
            there = list(group) if isinstance(group, h5py.Group) else []
            raise UserError(f"{self.ref}: camera {camera!r} is missing (key {key}){nearest(camera, there)}")
        data = self._dataset(key)
        if data.ndim != 4 or data.shape[3] != 3 or data.dtype != np.uint8:
            raise UserError(f"{self.ref}: {key} is {data.dtype} {list(data.shape)}; uint8 [T, H, W, 3] is needed")
        self._check_length(key, data)
        pixels, chunk = data.shape[1] * data.shape[2], math.prod(data.chunks or ())
        if not 0 < pixels <= MAX_PIXELS or chunk > MAX_CHUNK:
            said = f"{list(data.shape)} in chunks of {list(data.chunks or ())}"
            raise UserError(f"{self.ref}: {key} is {said}; at most {MAX_PIXELS} pixels and {MAX_CHUNK} bytes a chunk")
        return data

    def _column(self, key: str, width: int, cut: bool = False) -> Float32[np.ndarray, "t w"]:
        """Column `key` as [T, width]; `cut` drops further columns. Checks type, length, width and finiteness."""
        data = self._dataset(key)
        if data.dtype.kind not in "fiu":
            raise UserError(f"{self.ref}: {key} is of type {data.dtype}; numbers are needed")
        self._check_length(key, data)
        columns = 1 if data.ndim == 1 else data.shape[1] if data.ndim == 2 else -1
        if columns != width and not (cut and columns > width):
            raise UserError(
                f"{self.ref}: {key} has shape {list(data.shape)}, robot {self.robot.name} needs "
                f"[{self.num_frames}, {width}]; is --robot right?"
            )
        if (data.size or 0) > MAX_NUMBERS or math.prod(data.chunks or ()) > MAX_NUMBERS:
            raise UserError(f"{self.ref}: {key} has {data.size} numbers; at most {MAX_NUMBERS} are taken")
        try:
            values = data[...]
        except _DAMAGE as error:
            raise UserError(f"{self.ref}: cannot read {key}: {_reason(error)}") from error
        with np.errstate(over="ignore"):  # too large for float32 becomes infinite, which is reported below
            values = values.reshape(self.num_frames, columns)[:, :width].astype(np.float32)
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            raise UserError(f"{self.ref}: {key} has a NaN or infinite value at frame {int(np.argmax(bad))}")
        return values

    def _dataset(self, key: str) -> h5py.Dataset:
        data = self._find(self._root, key)
        if data is None:
            raise UserError(f"{self.ref}: key {key} is missing")
        if not isinstance(data, h5py.Dataset) or data.ndim == 0:
            raise UserError(f"{self.ref}: {key} is not an array")
        if data.is_virtual or data.external:
            kind = "a virtual dataset" if data.is_virtual else "in external storage"
            raise UserError(f"{self.ref}: {key} is {kind}, its data lie in another file; copy them into this one")
        if data.size and not _is_written(data):
            raise UserError(f"{self.ref}: {key} {list(data.shape)} was declared but not all of it was written")
        return data

    def _find(self, group: h5py.Group, key: str) -> h5py.Group | h5py.Dataset | None:
        """What lies at `key` below `group`, None if nothing does. No link is followed out of the file."""
        found: Any = group
        parts, hops = key.split("/"), _HOPS
        try:
            while parts:
                name = parts.pop(0)
                if name in ("", "."):
                    continue
                link = found.get(name, getlink=True) if isinstance(found, h5py.Group) else None
                if link is None:
                    return None
                if isinstance(link, h5py.SoftLink) and hops:
                    found = self._file if link.path.startswith("/") else found
                    parts, hops = link.path.split("/") + parts, hops - 1
                elif isinstance(link, h5py.HardLink):
                    found = found[name]
                else:
                    raise UserError(
                        f"{self.ref}: {key}: {name!r} is a link out of the file; copy what it means into it"
                    )
        except _DAMAGE as error:
            raise UserError(f"{self.ref}: cannot read {key}: {_reason(error)}") from error
        return found

    def _check_length(self, key: str, data: h5py.Dataset) -> None:
        if len(data) != self.num_frames:
            first = self.robot.parts[0].action
            raise UserError(f"{self.ref}: {key} has {len(data)} frames but {first} has {self.num_frames}")


def _is_written(data: h5py.Dataset) -> bool:
    """Whether the file has bytes for all of the array; HDF5 fills in zeros else."""
    if data.chunks is None:
        return data.id.get_storage_size() >= data.size * data.dtype.itemsize
    wanted = math.prod(-(-size // chunk) for size, chunk in zip(data.shape, data.chunks, strict=True))
    if not data.id.get_create_plist().get_nfilters():  # HDF5 fills a chunk that is too short from whatever memory
        wanted_bytes = wanted * math.prod(data.chunks) * data.dtype.itemsize
        return data.id.get_num_chunks() >= wanted and data.id.get_storage_size() >= wanted_bytes
    return data.id.get_num_chunks() >= wanted


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


FORMAT = Format(
    suffixes=(".hdf5", ".h5"),
    episodes=episodes,
    open=JoyLo,
    foreign="neither action and obs nor demo_<i> groups; not a JoyLo recording",
)
