"""Recordings as `hvd convert` reads them. Each module of this package reads one file format, which it describes in
`FORMAT`; a new file here is a new format.

Reading is lazy: the numeric columns of an episode are small and read whole, images only in blocks of a few megabytes.
Every fault is a UserError that names the file and the key.
"""

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from hvd.errors import UserError
from hvd.robots import Robot

CAMERAS = ("head", "left_wrist", "right_wrist")  # converted by default


@dataclass(frozen=True)
class RecordingRef:
    """One episode on disk: a file of the format `format`, or episode number `demo` of a file that holds several."""

    path: Path
    format: str
    demo: int | None = None

    def __str__(self) -> str:
        return str(self.path) if self.demo is None else f"{self.path}:demo_{self.demo}"


@runtime_checkable
class Recording(Protocol):
    """An open episode; a context manager.

    Attributes:
        num_frames: T, at least 1.
        fps: frames per second as recorded, None when the file does not say.
    """

    num_frames: int
    fps: float | None

    def __enter__(self) -> "Recording": ...

    def __exit__(self, *_: object) -> None: ...

    def state(self) -> Float32[np.ndarray, "t a"]:
        """Measured state, in the order and the units of the actions."""
        ...

    def actions(self) -> Float32[np.ndarray, "t a"]:
        """Absolute targets in the robot's order."""
        ...

    def environment_state(self) -> Float32[np.ndarray, "t e"] | None:
        """What only a simulator knows; None in recordings of real robots."""
        ...

    def image_size(self, camera: str) -> tuple[int, int]:
        """(height, width) of the camera's images, after checking that there is one for each frame."""
        ...

    def frames(self, camera: str) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        """The camera's RGB images in order, in blocks of a few megabytes."""
        ...


@dataclass(frozen=True)
class Format:
    """A file format of recordings.

    Attributes:
        suffixes: of its files, with the dot.
        episodes: the numbers of a file's episodes, (None,) for a file that is one episode; () = the file's content is
            of another format.
        open: the episode, given its reference, the robot, and how the odometry is turned (rad, --odom-yaw-deg).
        foreign: the error about a file with another content.
    """

    suffixes: tuple[str, ...]
    episodes: Callable[[Path], Sequence[int | None]]
    open: Callable[[RecordingRef, Robot, float], Recording]
    foreign: str


@functools.cache
def formats() -> dict[str, Format]:
    """The formats by name: the modules of this package."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").FORMAT for name in names}


def is_recording(path: Path) -> bool:
    """Whether a file has the suffix of a recording."""
    return any(path.suffix in format.suffixes for format in formats().values())


def recording_files(source: str | Path) -> list[Path]:
    """The recordings in a folder in natural order (demo_2 before demo_10), or the one file that `source` is."""
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: no such folder of recordings")
    files = [p for p in source.iterdir() if is_recording(p) and not p.name.startswith(".") and p.is_file()]
    if not files:
        suffixes = " or ".join(suffix for format in formats().values() for suffix in format.suffixes)
        raise UserError(f"{source}: no recordings here (files ending in {suffixes})")
    return sorted(files, key=lambda p: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", p.name)])


def episodes_of(path: Path) -> list[RecordingRef]:
    """The episodes of one file, in order."""
    likely = {name: format for name, format in formats().items() if path.suffix in format.suffixes} or formats()
    for name, format in likely.items():
        refs = [RecordingRef(path, name, demo) for demo in format.episodes(path)]
        if refs:
            return refs
    raise UserError(f"{path}: {'; '.join(format.foreign for format in likely.values())}")


def open_recording(ref: RecordingRef, robot: Robot, odom_yaw: float = 0.0) -> Recording:
    """Open the episode `ref` of `robot`; use it as a context manager."""
    return formats()[ref.format].open(ref, robot, odom_yaw)
