"""A recording format, as a newcomer writes it: one .npz file per episode, with state, action and one array a camera."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hvd.data.recordings import Format, RecordingRef
from hvd.errors import UserError
from hvd.robots import Robot


class Npz:
    def __init__(self, ref: RecordingRef, robot: Robot, odom_yaw: float):
        self._ref, self._arrays = ref, np.load(ref.path)
        self.num_frames, self.fps = len(self.actions()), 5.0
        if self.actions().shape[1] != robot.action_dim:
            raise UserError(f"{ref}: {self.actions().shape[1]} actions, robot {robot.name} has {robot.action_dim}")

    def __enter__(self) -> "Npz":
        return self

    def __exit__(self, *_: object) -> None:
        self._arrays.close()

    def state(self) -> np.ndarray:
        return self._arrays["state"]

    def actions(self) -> np.ndarray:
        return self._arrays["action"]

    def environment_state(self) -> None:
        return None

    def image_size(self, camera: str) -> tuple[int, int]:
        _, height, width, _ = self._arrays[camera].shape
        return height, width

    def frames(self, camera: str) -> Iterator[np.ndarray]:
        yield self._arrays[camera]


def episodes(path: Path) -> tuple[None] | tuple[()]:
    with np.load(path) as arrays:
        return (None,) if "action" in arrays else ()


FORMAT = Format((".npz",), episodes, Npz, "no array called action")
