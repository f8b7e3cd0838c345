"""Take a bar from the low shelf, deep bent, and put it on top of a tall cabinet, upright, on the other side."""

import dataclasses

import mujoco as mj
import numpy as np
from jaxtyping import Float

from hvd.sim.carry import Carry
from hvd.sim.scene import GOAL_HALF, OVERVIEW
from hvd.sim.tasks import pick
from hvd.sim.teleoperator import TURN_X

CABINET_XY, CABINET_HEIGHT = np.array([1.25, -1.05]), 1.40
TALL = np.array([0.15, -0.3, 0.15, 0.0])  # torso at the cabinet


def furnish(spec: mj.MjSpec) -> None:
    """The cabinet, and the mark on its top."""
    box, middle = mj.mjtGeom.mjGEOM_BOX, CABINET_HEIGHT / 2
    spec.camera(OVERVIEW).pos[1] -= 1.0  # films show this side of the room
    size, rgba = [0.2, 0.3, middle], [0.45, 0.4, 0.35, 1]
    spec.worldbody.add_geom(name="cabinet", type=box, pos=[*CABINET_XY, middle], size=size, rgba=rgba)
    top, mark = [*CABINET_XY, CABINET_HEIGHT + 0.001], [*GOAL_HALF, 0.001]
    blue = [0.2, 0.4, 0.9, 1]
    spec.worldbody.add_geom(name="mark", type=box, pos=top, size=mark, rgba=blue, contype=0, conaffinity=0)


class StowProgress(Carry):
    """The bar may stand or lie on the cabinet."""

    goal = CABINET_XY
    clear = 0.10

    def rests_on_goal(self, position: Float[np.ndarray, "3"], upright: float) -> bool:
        return bool(CABINET_HEIGHT < position[2] < CABINET_HEIGHT + self.env.task.half[2] + 0.02)


class StowOperator(pick.PickOperator):
    """Takes the bar with the right gripper, and rises with it on the way to the cabinet."""

    _goal, _top, _upright = CABINET_XY, CABINET_HEIGHT, TALL

    def phase_back_away(self, action):
        distance, turn = self._carry(action, [TURN_X, self.lift_y, 0])
        if distance < 0.04 and turn < 0.05:
            self.go("sidestep")

    def phase_sidestep(self, action):
        distance, turn = self._carry(action, [TURN_X, self._goal[1] - self._standoff[1], 0])
        if distance < 0.04 and turn < 0.05 and self.height >= self._low + 0.1:
            self.go("advance")


TASK = dataclasses.replace(
    pick.TASK,
    prompt="take the yellow bar from the low shelf and put it on the blue mark on top of the tall cabinet",
    progress=StowProgress,
    operator=StowOperator,
    furnish=furnish,
)
