"""The simulated tasks: one module each, which says all of its task in `TASK`. The module's name is the task's name
(`--sim.task`), so a new file in this folder is a new task.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from hvd.configs import SIM_TASKS
from hvd.errors import UserError, nearest
from hvd.sim.mistakes import Opportunity, PlannedMistake


@runtime_checkable
class Progress(Protocol):
    """Judges how far the task has come in one environment."""

    def reset(self) -> None:
        """A new episode begins."""
        ...

    def judge(self, stage: int) -> tuple[int, str]:
        """After a control step: the number of sub-tasks completed (before the step: `stage`), and what happened: the
        name of the sub-task just completed, "lost" or ""."""
        ...


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        prompt: the task in words, as the policy gets it.
        half: [3] half sizes of the object.
        hands: the hands that carry it.
        symmetries: [n, 4] rotations (quaternions wxyz) that map the object onto itself.
        turned: the object starts turned by at most so many radians either way.
        subtasks: names in the order of completion; the last one completed is success.
        progress: called with the Env, gives the judge of these sub-tasks.
        operator: called with (env, seed, quality, retries, plans, concurrent) after env.reset, gives the scripted
            teleoperator.
        mistakes: called with a random generator, gives the mistakes of one episode that a `casual` operator records.
        opportunities: where each level may err (hvd.sim.operators), in the order of the task.
        furnish: called with the mujoco.MjSpec of room and robot, adds what else the task needs; also a body "object"
            that hangs on one joint "object" along x, where the object is no free body.
    """

    prompt: str
    half: np.ndarray
    mass: float
    rgba: tuple[float, float, float, float]
    hands: tuple[str, ...]
    symmetries: np.ndarray
    turned: float
    subtasks: tuple[str, ...]
    progress: Callable[[Any], Progress]
    operator: Callable[..., Any]
    mistakes: Callable[[np.random.Generator], tuple[PlannedMistake, ...]]
    opportunities: tuple[Opportunity, ...] = ()
    furnish: Callable[[Any], None] | None = None


def get_task(name: str) -> Task:
    """The task called `name`; a UserError that offers the nearest names otherwise."""
    if name not in SIM_TASKS:
        raise UserError(f"unknown task {name!r}{nearest(name, SIM_TASKS)}")
    return importlib.import_module(f"{__name__}.{name}").TASK
