"""Label sidecars: what a recording cannot say by itself (task, success, sub-tasks and their rewards, quality).

    {"task": "move the box", "success": true, "quality": "teleop",
     "subtasks": [{"name": "grasped", "start": 0, "end": 41, "reward": 1.0}],
     "terminal": true, "mistakes": [{"level": "torso", "start": 12, "end": 20, "kind": "late"}]}

`task` and `success` are required. Frames are indices into the episode, `end` is exclusive; a sub-task's reward is
given at its last frame (`end - 1`). `terminal` says that the task is over at the last frame, by success or by an
irrecoverable failure; without it an episode is terminal when it succeeded. `mistakes` is the simulator's ground truth:
evaluation reads it, training never does.

Reading is strict: an unknown key, a wrong type, a boundary outside the episode or two sub-tasks that share a frame are
errors that name the file and the field.
"""

import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float32

from hvd.errors import UserError, nearest
from hvd.files import write_atomic

Quality = Literal["expert", "teleop", "rollout"]
QUALITIES: tuple[str, ...] = get_args(Quality)


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
class Labels:
    """The labels of one episode. `terminal` None means: as `success`."""

    task: str
    success: bool
    subtasks: tuple[Subtask, ...] = ()
    quality: str = "teleop"
    terminal: bool | None = None
    mistakes: tuple[Mistake, ...] = ()

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
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: label file is missing; write it, or pass --default-success") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the label file: {error}") from error
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    return parse_labels(data, str(path), num_frames)


def parse_labels(data: Any, where: str, num_frames: int | None = None) -> Labels:
    """Labels from decoded JSON; `where` names the file in errors."""
    fields = _object(
        data, where, required=("task", "success"), optional=("subtasks", "quality", "terminal", "mistakes")
    )
    task = _typed(fields, "task", str, where)
    if not task.strip():
        raise UserError(f"{where}: task is empty; say in words what the robot was to do")
    quality = _typed(fields, "quality", str, where, default="teleop")
    if quality not in QUALITIES:
        raise UserError(f"{where}: quality is {quality!r}; use one of {', '.join(QUALITIES)}")
    subtasks = []
    for i, item in enumerate(_typed(fields, "subtasks", list, where, default=[])):
        at = f"{where}: subtasks[{i}]"
        item = _object(item, at, required=("name", "start", "end", "reward"))
        start, end = _span(item, at, num_frames)
        reward = _typed(item, "reward", float, at)
        if not math.isfinite(reward):
            raise UserError(f"{at}: reward is {reward}; give a finite number")
        subtasks.append(Subtask(_typed(item, "name", str, at), start, end, reward))
    _check_overlap(subtasks, where)
    mistakes = []
    for i, item in enumerate(_typed(fields, "mistakes", list, where, default=[])):
        at = f"{where}: mistakes[{i}]"
        item = _object(item, at, required=("level", "start", "end", "kind"))
        start, end = _span(item, at, num_frames)
        mistakes.append(Mistake(_typed(item, "level", str, at), start, end, _typed(item, "kind", str, at)))
    success = _typed(fields, "success", bool, where)
    terminal = _typed(fields, "terminal", bool, where) if "terminal" in fields else None
    if success and terminal is False:
        raise UserError(f"{where}: terminal is false but success is true; a task that succeeded is over")
    return Labels(task, success, tuple(subtasks), quality, terminal, tuple(mistakes))


def labels_json(labels: Labels) -> dict[str, Any]:
    """The JSON object of a sidecar; optional keys are left out where they say nothing."""
    data: dict[str, Any] = {
        "task": labels.task,
        "success": labels.success,
        "subtasks": [{"name": s.name, "start": s.start, "end": s.end, "reward": s.reward} for s in labels.subtasks],
        "quality": labels.quality,
    }
    if labels.terminal is not None:
        data["terminal"] = labels.terminal
    if labels.mistakes:
        data["mistakes"] = [{"level": m.level, "start": m.start, "end": m.end, "kind": m.kind} for m in labels.mistakes]
    return data


def write_labels(path: str | os.PathLike[str], labels: Labels) -> None:
    """Write a sidecar atomically, after the same checks as when reading it (boundaries excepted)."""
    data = labels_json(labels)
    parse_labels(data, str(path))
    write_atomic(path, json.dumps(data, indent=1) + "\n")


def _object(data: Any, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """`data` as a mapping that has the `required` keys and no key beyond these and the `optional` ones."""
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected an object, found {_kind(data)}")
    known = required + optional
    for key in data:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)}")
    for key in required:
        if key not in data:
            raise UserError(f"{where}: key {key!r} is missing; required are {', '.join(required)}")
    return data


def _typed(fields: Mapping[str, Any], key: str, kind: type, where: str, default: Any = None) -> Any:
    """fields[key] if it has the JSON type `kind` (an integer is a fine float, a bool is no number)."""
    if key not in fields and default is not None:
        return default
    value = fields[key]
    right = isinstance(value, int | float) if kind is float else isinstance(value, kind)
    if not right or (kind in (int, float) and isinstance(value, bool)):
        raise UserError(f"{where}: {key} must be {_NAMES[kind]}, found {_kind(value)}")
    return float(value) if kind is float else value


def _span(item: Mapping[str, Any], where: str, num_frames: int | None) -> tuple[int, int]:
    start, end = _typed(item, "start", int, where), _typed(item, "end", int, where)
    if not 0 <= start < end:
        raise UserError(f"{where}: start {start} and end {end} must satisfy 0 <= start < end (end is exclusive)")
    if num_frames is not None and end > num_frames:
        raise UserError(f"{where}: end {end} lies outside the episode of {num_frames} frames")
    return start, end


def _check_overlap(subtasks: list[Subtask], where: str) -> None:
    ordered = sorted(subtasks, key=lambda s: s.start)
    for before, after in itertools.pairwise(ordered):
        if after.start < before.end:
            raise UserError(
                f"{where}: subtasks {before.name!r} (frames {before.start}-{before.end}) and {after.name!r} "
                f"({after.start}-{after.end}) overlap; ends are exclusive"
            )


_NAMES = {str: "text", bool: "true or false", int: "an integer", float: "a number", list: "a list", dict: "an object"}


def _kind(value: Any) -> str:
    return "null" if value is None else f"{_NAMES.get(type(value), type(value).__name__)} ({str(value)[:40]})"
