"""Pull a low drawer open by its handle, the base backing away while the hand holds it, and leave it open."""

import mujoco as mj
import numpy as np
from jaxtyping import Float

from hvd.sim.carry import Carry
from hvd.sim.kinematics import rot_z
from hvd.sim.mistakes import Opportunity, Way, casual_mistakes
from hvd.sim.scene import HALF_TURNS, OVERVIEW, QUARTER_TURNS, RIGHT_GRIPPER
from hvd.sim.tasks import Task
from hvd.sim.tasks.pick import PickOperator
from hvd.sim.teleoperator import CROUCH, STAND, STUCK, TURN_X

HANDLE = np.array([1.0, -1.05, 0.42])  # of the closed drawer
TRAVEL, OPEN = 0.45, 0.36  # metres: the drawer's way, and how far it counts as open
SUBTASKS = ("reached", "grasped", "opened", "left")

_LOST_AFTER = 4  # control steps without a grip
_AWAY = 0.18  # metres from the hand to the handle of a drawer that is left


def furnish(spec: mj.MjSpec) -> None:
    """A chest on the floor, and its drawer: the body "object", whose frame is the middle of the handle."""
    box = mj.mjtGeom.mjGEOM_BOX
    spec.camera(OVERVIEW).pos[1] -= 1.0  # films show this side of the room
    x, y, _ = HANDLE
    wood, light = [0.45, 0.35, 0.25, 1], [0.7, 0.6, 0.45, 1]
    chest = spec.worldbody
    for name, pos, size in (
        ("chest_below", [x + 0.33, y, 0.15], [0.22, 0.3, 0.15]),
        ("chest_above", [x + 0.33, y, 0.74], [0.22, 0.3, 0.20]),
        ("chest_behind", [x + 0.53, y, 0.42], [0.02, 0.3, 0.12]),
    ):
        chest.add_geom(name=name, type=box, pos=pos, size=size, rgba=wood)
    drawer = chest.add_body(name="object", pos=HANDLE)
    drawer.add_joint(
        name="object",
        type=mj.mjtJoint.mjJNT_SLIDE,
        axis=[1, 0, 0],
        range=(-TRAVEL, 0),
        limited=True,
        damping=15,
        frictionloss=3,
        armature=0.5,
    )
    grip = {"friction": [1.2, 0.02, 0.001], "condim": 4}
    drawer.add_geom(name="object", type=box, size=TASK.half, mass=0.2, rgba=TASK.rgba, **grip)
    drawer.add_geom(name="front", type=box, pos=[0.1, 0, 0], size=[0.01, 0.26, 0.10], mass=1, rgba=light)
    for side in (-1, 1):  # what holds the handle, above and below the fingers
        at = [0.05, 0, side * (TASK.half[2] - 0.01)]
        drawer.add_geom(type=box, pos=at, size=[0.05, 0.008, 0.008], mass=0.1, rgba=TASK.rgba)


class DrawerProgress(Carry):
    """Open, and let go of: SUBTASKS."""

    clear = _AWAY

    def rests_on_goal(self, position: Float[np.ndarray, "3"], upright: float) -> bool:
        return True

    def _on_goal(self) -> bool:
        return bool(HANDLE[0] - self.env.object_pose()[0][0] > OPEN)

    def judge(self, stage: int) -> tuple[int, str]:
        self._follow_grip()
        is_open = self._on_goal()
        if self._is_placed():
            return 4, "left"
        if (stage == 3 and not is_open) or (stage == 2 and self._loose_steps > _LOST_AFTER):
            return (1 if self._is_near() else 0), "lost"
        if stage == 1 and not self._is_near():
            return 0, "lost"
        done = (self._is_reached(), self._loose_steps == 0, is_open, False)[stage]
        return (stage + 1, SUBTASKS[stage]) if done else (stage, "")


class DrawerOperator(PickOperator):
    """Holds the handle with the right gripper and backs away."""

    first = "sidestep"

    def phase_sidestep(self, action):
        """In front of the chest, at a distance."""
        distance, turn = self.drive(action, np.array([TURN_X, self.object[1] - self._standoff[1], 0]), 0.6)
        if (distance < 0.06 and turn < 0.1) or self.late(60):
            self.go("approach")

    def phase_lift(self, action):
        """What follows the grasp: nothing is lifted here."""
        self.height = self.object[2]
        self.go("pull")
        self.phase_pull(action)

    def phase_pull(self, action):
        action[RIGHT_GRIPPER] = 100 if self.releasing else 0
        away = self._base_for(HANDLE, TRAVEL - 0.01)
        self.drive(action, away, 0.3)
        self.hands_to(action, {"right": (self._holds_at(), rot_z(self.env.base_pose()[2]) @ self._tilt)}, CROUCH)
        position, _ = self.env.object_pose()
        if np.linalg.norm(position - self.env.hand_position("right")) > 0.1 or self.steps > STUCK:
            self.fail()
        elif HANDLE[0] - position[0] > OPEN + 0.04:
            self.place = position.copy()
            self.go("leave")

    def phase_leave(self, action):
        """Opens the hand, draws it back, and drives away upright."""
        back = max(self.steps - 4, 0)
        posture = CROUCH + (STAND - CROUCH) * min(1, back / 10)
        self.hands_to(action, self._hand(self.place + self._tips + [-0.03 * back, 0, 0]), posture)
        if back:
            action[7] = -0.3
        if self.steps > 30:
            self.go("give_up")

    def _holds_at(self) -> np.ndarray:
        x, y, yaw = self.env.base_pose()
        ahead = rot_z(yaw) @ [*self._standoff, 0]
        return np.array([x + ahead[0], y + ahead[1], self.height]) + self._tips


def _away(least: float, most: float) -> tuple[Way, Way]:
    return Way("stops_short", ahead=(-most, -least)), Way("off_to_side", aside=(least, most), either_side=True)


OPPORTUNITIES = (
    Opportunity("base", ("sidestep",), _away(0.4, 0.6), (10, 20), final=False),
    Opportunity("base", ("approach",), _away(0.5, 0.7), (15, 30)),
    Opportunity("base", ("pull",), (Way("stops_short", ahead=(0.2, 0.35)),), (15, 30)),
    Opportunity("torso", ("approach",), (Way("no_bend", late="late_bend"),), (15, 30)),
    Opportunity("torso", ("pull",), (Way("leans", ahead=(0.25, 0.4), delay=(3, 6)),), (15, 30)),
    Opportunity(
        "arms",
        ("reach",),
        (Way("too_high", up=(0.11, 0.15)), Way("too_wide", aside=(0.05, 0.07), either_side=True)),
        (12, 28),
    ),
    Opportunity("arms", ("pull",), (Way("releases_early", delay=(4, 8)),), (1, 1), share=0.5),
    Opportunity("arms", ("reach", "leave"), (Way("hesitates", delay=(2, 2)),), (14, 28), final=False),
)

TASK = Task(
    prompt="pull the drawer open by its black handle and leave it open",
    half=np.array([0.012, 0.012, 0.07]),
    mass=0.2,
    rgba=(0.1, 0.1, 0.1, 1.0),
    hands=("right",),
    symmetries=np.concatenate([HALF_TURNS, QUARTER_TURNS]),
    turned=0.0,
    subtasks=SUBTASKS,
    progress=DrawerProgress,
    operator=DrawerOperator,
    mistakes=casual_mistakes(OPPORTUNITIES),
    opportunities=OPPORTUNITIES,
    furnish=furnish,
)
