"""A simulated task, as a newcomer writes it: touch the bar with the right hand. One sub-task, one kind of mistake."""

import dataclasses

import numpy as np

from hvd.sim.env import Env
from hvd.sim.mistakes import PlannedMistake
from hvd.sim.tasks import pick
from hvd.sim.teleoperator import CROUCH


class Touch:
    def __init__(self, env: Env):
        self.env = env

    def reset(self) -> None: ...

    def judge(self, stage: int) -> tuple[int, str]:
        distance = np.linalg.norm(self.env.hand_position("right") - self.env.object_pose()[0])
        return (1, "touched") if stage == 0 and distance < 0.06 else (stage, "")


class TouchOperator(pick.PickOperator):
    def phase_grasp(self, action: np.ndarray) -> None:
        self.hands_to(action, self._hand(self.object + self._tips), CROUCH)


def mistakes(rng: np.random.Generator) -> tuple[PlannedMistake, ...]:
    return (PlannedMistake("arms", "hesitates", "reach", delay=2, frames=int(rng.integers(14, 28))),)


TASK = dataclasses.replace(
    pick.TASK,
    prompt="touch the yellow bar",
    subtasks=("touched",),
    progress=Touch,
    operator=TouchOperator,
    mistakes=mistakes,
)
