"""Label sidecars: what a recording cannot say by itself (task, success, sub-tasks and their rewards, quality).

    {"task": "move the box", "success": true, "quality": "teleop",
     "subtasks": [{"name": "grasped", "start": 0, "end": 41, "reward": 1.0}],
     "terminal": true, "mistakes": [{"level": "torso", "start": 12, "end": 20, "kind": "late"}],
     "waiting": [{"level": "arms", "start": 15, "end": 21}]}

`task` and `success` are required, and all keys of a span but a sub-task's reward (1 by itself). Frames are indices
into the episode, `end` is exclusive; a sub-task's reward is given at its last frame (`end - 1`). `terminal` says that
the task is over at the last frame, by success or by an irrecoverable failure; without it an episode is terminal when it
succeeded. `mistakes` and `waiting` are the simulator's ground truth: evaluation reads them, and of
training only the extractor `oracle`, an experiment's upper bound.

Reading is strict: an unknown key, a wrong type, a boundary outside the episode or two sub-tasks that share a frame are
errors that name the file and the field.
"""

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32

from hvd import documents
from hvd.errors import UserError
from hvd.fields import from_plain, to_plain
from hvd.files import write_atomic

MAX_BYTES = 16 << 20  # of a sidecar
MAX_REWARD = 1e6

Quality = Literal["expert", "teleop", "rollout"]


@dataclass(frozen=True)
class Subtask:
    """Frames `start` to `end` (exclusive) worked on `name`; `reward` is given at frame `end - 1`."""

    name: str
    start: int
    end: int
    reward: float = 1.0


@dataclass(frozen=True)
class Mistake:
    """Frames `start` to `end` (exclusive) in which `level` of the robot (hvd.robots) did the wrong thing `kind`."""

    level: str
    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Waiting:
    """Frames `start` to `end` (exclusive) in which `level` stood still because another level's mistake held it up."""

    level: str
    start: int
    end: int


@dataclass(frozen=True)
class Labels:
    """The labels of one episode. `terminal` None means: as `success`."""

    task: str
    success: bool
    subtasks: tuple[Subtask, ...] = ()
    quality: Quality = "teleop"
    terminal: bool | None = None
    mistakes: tuple[Mistake, ...] = ()
    waiting: tuple[Waiting, ...] = ()

    @property
    def is_terminal(self) -> bool:
        """Whether the task is over at the last frame; otherwise the recording only stopped there (truncated)."""
        return self.success if self.terminal is None else self.terminal

    def rewards(self, num_frames: int) -> Float32[np.ndarray, " t"]:
        """Reward per frame, shape [num_frames].

        Each sub-task's reward lies at its last frame (docs/method.md, "Rewards"). A successful episode without
        sub-tasks gets +1 at its last frame, so that success is worth something.
        """
        rewards = np.zeros(num_frames, np.float32)
        for subtask in self.subtasks:
            rewards[subtask.end - 1] += subtask.reward
        if not self.subtasks and self.success:
            rewards[-1] = 1.0
        return rewards


def sidecar_path(recording: str | os.PathLike[str], demo: int | None = None) -> Path:
    """The sidecar beside `recording`: `<stem>.labels.json`, or `<stem>.demo_<i>.labels.json` in a merged file."""
    path = Path(recording)
    name = path.stem if demo is None else f"{path.stem}.demo_{demo}"
    return path.with_name(f"{name}.labels.json")


def episode_path(folder: str | os.PathLike[str], episode: int) -> Path:
    """The sidecar of episode number `episode` in a dataset's `labels` folder."""
    return Path(folder) / f"episode_{episode:06d}.labels.json"


def load_labels(path: str | os.PathLike[str], num_frames: int | None = None) -> Labels:
    """Read and check a sidecar; with `num_frames` also that every boundary lies inside the episode.

    Raises UserError naming the file and the field.
    """
    try:
        data = documents.read(path, object, MAX_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: label file is missing; write it, or pass --default-success") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read the label file: {error}") from error
    return parse_labels(data, str(path), num_frames)


def parse_labels(data: Any, where: str, num_frames: int | None = None) -> Labels:
    """Labels from decoded JSON; `where` names the file in errors."""
    labels = from_plain(Labels, data, where)
    if not labels.task.strip():
        raise UserError(f"{where}: task is empty; say in words what the robot was to do")
    for name in ("subtasks", "mistakes", "waiting"):
        for i, span in enumerate(getattr(labels, name)):
            _check_span(span, f"{where}: {name}[{i}]", num_frames)
    _check_overlap(labels.subtasks, where)
    if labels.success and labels.terminal is False:
        raise UserError(f"{where}: terminal is false but success is true; a task that succeeded is over")
    return labels


def write_labels(path: str | os.PathLike[str], labels: Labels) -> None:
    """Write a sidecar atomically, after the same checks as when reading it (boundaries excepted).

    What says nothing (no mistakes, no waiting, `terminal` as `success`) is left out.
    """
    data = to_plain(
        labels,
        keep=lambda field, value: value is not None and not (field.name in ("mistakes", "waiting") and not value),
    )
    parse_labels(data, str(path))
    write_atomic(path, json.dumps(data, indent=1) + "\n")


def chunk_shares(
    spans: tuple[Mistake | Waiting, ...], levels: tuple[str, ...], length: int, horizon: int
) -> tuple[Float[np.ndarray, "length m"], Float[np.ndarray, " length"]]:
    """For the chunk of `horizon` actions that begins at each frame of an episode (cut at its end): the share of its
    actions that lie in a span of each level, and in any."""
    wrong = np.zeros((length, len(levels) + 1))
    for span in spans:
        at = slice(span.start, span.end)
        wrong[at, -1] = 1
        if span.level in levels:
            wrong[at, levels.index(span.level)] = 1
    summed = np.concatenate([np.zeros((1, wrong.shape[1])), np.cumsum(wrong, 0)])
    starts = np.arange(length)
    ends = np.minimum(starts + horizon, length)
    shares = (summed[ends] - summed[starts]) / (ends - starts)[:, None]
    return shares[:, :-1], shares[:, -1]


def _check_span(span: Subtask | Mistake | Waiting, where: str, num_frames: int | None) -> None:
    start, end = span.start, span.end
    if not 0 <= start < end:
        raise UserError(f"{where}: start {start} and end {end} must satisfy 0 <= start < end (end is exclusive)")
    if num_frames is not None and end > num_frames:
        raise UserError(f"{where}: end {end} lies outside the episode of {num_frames} frames")
    if isinstance(span, Subtask) and not abs(span.reward) <= MAX_REWARD:
        raise UserError(f"{where}: reward is {span.reward}; give a number between -{MAX_REWARD:g} and {MAX_REWARD:g}")


def _check_overlap(subtasks: tuple[Subtask, ...], where: str) -> None:
    ordered = sorted(subtasks, key=lambda s: s.start)
    for before, after in itertools.pairwise(ordered):
        if after.start < before.end:
            raise UserError(
                f"{where}: subtasks {before.name!r} (frames {before.start}-{before.end}) and {after.name!r} "
                f"({after.start}-{after.end}) overlap; ends are exclusive"
            )
