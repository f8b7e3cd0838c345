"""Carry a tote between both hands from the shelf to the goal on the table."""

import functools

import numpy as np
from jaxtyping import Float

from hvd.sim.carry import SUBTASKS, Carry
from hvd.sim.kinematics import Pose, rot_x, rot_z
from hvd.sim.mistakes import Sizes, carry_mistakes, carry_opportunities
from hvd.sim.scene import HALF_TURNS, SHELF_HEIGHT, SIDES, TABLE_HEIGHT, TABLE_XY
from hvd.sim.tasks import Task
from hvd.sim.teleoperator import CARRY, CROUCH, STAND, STUCK, TURN_X, Teleoperator


class ToteProgress(Carry):
    """The tote must stand upright on the goal."""

    clear = 0.20

    def rests_on_goal(self, position: Float[np.ndarray, "3"], upright: float) -> bool:
        return bool(abs(position[2] - TABLE_HEIGHT - self.env.task.half[2]) < 0.02 and upright > 0.9)


class ToteOperator(Teleoperator):
    """Takes the tote between both hands. Widths are from its middle line to a hand."""

    let_go = 0.13
    _standoff, _wide, _touch = 0.60, 0.25, 0.19

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.squeeze = 0.032
        if self.quality and self.rng.random() < 0.5 * self.quality:
            self.squeeze -= float(self.rng.uniform(0, 0.03))  # a weak grip

    def seen_yaw(self, yaw: float) -> float:
        return (yaw + np.pi / 2) % np.pi - np.pi / 2

    def shift_hand(self, side: str, pose: Pose, wide: float, up: float) -> Pose:
        position, rotation = pose
        outwards = rot_z(self.env.base_pose()[2]) @ [0, wide if side == "left" else -wide, up]
        return position + outwards, rotation

    def phase_approach(self, action):
        distance, turn = self.drive(action, self._front(), 0.6)
        if distance < 0.35:
            self.hands_to(action, self._hands(self.object + [0, 0, 0.10], self.object_yaw, 0.28, -0.16), CROUCH)
        if (distance < 0.03 and turn < 0.05) or self.steps > 60:
            self.look()
            self.go("reach")

    def phase_reach(self, action):
        self.drive(action, self._front(), 0.2)
        error = self.hands_to(action, self._hands(self.object, self.object_yaw, self._wide), CROUCH)
        if (error < 0.02 and self.steps > 4) or self.late(30):
            self.go("grasp")

    def phase_grasp(self, action):
        width = max(self._wide - 0.02 * self.steps, self._touch - self.squeeze)
        self.hands_to(action, self._hands(self.object, self.object_yaw, width), CROUCH)
        if self.steps > 7:
            self.go("lift")

    def phase_lift(self, action):
        self.height = self.object[2] + min(0.02 * self.steps, 0.16)
        posture = CROUCH + (CARRY - CROUCH) * min(1, self.steps / 10)
        centre = np.array([*self.object[:2], self.height])
        self.hands_to(action, self._hands(centre, self.object_yaw, self._touch - self.squeeze), posture)
        if self.steps < 9:
            return
        if self.env.object_pose()[0][2] < self.height - 0.04:
            self.squeeze = 0.032
            self.fail()
            return
        x, y, yaw = self.env.base_pose()
        self.held = (rot_z(-yaw) @ [self.object[0] - x, self.object[1] - y, 0])[:2]  # the object in the base frame
        self.held_yaw, self.lift_y = self.object_yaw - yaw, y
        self.go("back_away")

    def phase_regroup(self, action):
        self.drive(action, self._front(0.12), 0.6)
        self.hands_to(action, self._hands(self.object + [0, 0, 0.08], self.object_yaw, 0.28, -0.14), CROUCH)
        if self.steps > 10:
            self.look()
            self.go("approach")

    def phase_back_away(self, action):
        self.height = min(self.height + 0.025, self._high)
        posture = CARRY + (STAND - CARRY) * min(self.steps / 20, 1)
        distance, _ = self._carry(action, [TURN_X - 0.06, self.lift_y, 0], posture)
        if self.height >= self._high and distance < 0.05:
            self.go("sidestep")

    def phase_sidestep(self, action):
        distance, turn = self._carry(action, [TURN_X, TABLE_XY[1], 0], STAND)
        if distance < 0.04 and turn < 0.05:
            self.go("advance")

    def phase_advance(self, action):
        distance, turn = self._carry(action, self._at_table, STAND)
        if distance < 0.04 and turn < 0.05:
            self.go("lower")

    def phase_lower(self, action):
        self.height = max(self.height - 0.018, self._low)
        self._carry(action, self._at_table, STAND)
        if self.height <= self._low and self.steps > 9:
            centre, self.place_yaw = self._held_at()
            self.place = np.array([*centre, self.height])
            self.go("release")

    def phase_release(self, action):
        width = min(0.16 + 0.02 * self.steps, 0.27)
        self.hands_to(action, self._hands(self.place, self.place_yaw, width), STAND)
        if self.steps > 6:
            self.go("leave")

    def phase_leave(self, action):
        action[7] = -0.25
        self.hands_to(action, self._hands(self.place - [0.02 * self.steps, 0, 0], self.place_yaw, 0.27), STAND)
        if self.steps > 25:
            self.go("give_up")

    @property
    def _low(self) -> float:
        return TABLE_HEIGHT + self.env.task.half[2] - 0.002

    @property
    def _high(self) -> float:
        return TABLE_HEIGHT + self.env.task.half[2] + 0.11

    _at_table = np.array([TABLE_XY[0] - 0.62, TABLE_XY[1], 0])

    def _front(self, back: float = 0.0) -> np.ndarray:
        """The base pose from which the tote is lifted, `back` metres further away."""
        x, y = self.object[:2] - (rot_z(self.object_yaw) @ [self._standoff + back, 0, 0])[:2]
        return np.array([x, y, self.object_yaw])

    def _hands(self, centre: np.ndarray, yaw: float, width: float, ahead: float = -0.03) -> dict[str, Pose]:
        turn = rot_z(yaw)
        return {
            "left": (centre + turn @ [ahead, width, 0], turn @ rot_x(-np.pi / 2)),
            "right": (centre + turn @ [ahead, -width, 0], turn @ rot_x(np.pi / 2)),
        }

    def _held_at(self) -> tuple[np.ndarray, float]:
        """Where the carried tote should be: x, y and yaw in the world."""
        x, y, yaw = self.env.base_pose()
        return np.array([x, y]) + (rot_z(yaw) @ [*self.held, 0])[:2], yaw + self.held_yaw

    def _carry(self, action, goal, posture) -> tuple[float, float]:
        reached = self.drive(action, np.asarray(goal, float), 0.45)
        self.held += np.clip(np.array([0.58, 0]) - self.held, -0.01, 0.01)
        self.held_yaw *= 0.9
        centre, yaw = self._held_at()
        self.hands_to(action, self._hands(np.array([*centre, self.height]), yaw, self._touch - self.squeeze), posture)
        position, _ = self.env.object_pose()
        low = position[2] < SHELF_HEIGHT + 0.15
        lost = np.linalg.norm(position[:2] - centre) > 0.15 or position[2] < self.height - 0.05
        if (lost and low and self.may_try_again) or (low and self.steps > 15) or self.steps > STUCK:
            self.squeeze = 0.032
            self.fail()
        return reached


_SIZES = Sizes(out_of_reach=(0.62, 0.68), too_high=(0.13, 0.18), too_wide=(0.03, 0.06))

TASK = Task(
    prompt="carry the red tote from the shelf to the green goal on the table",
    half=np.array([0.09, 0.17, 0.07]),
    mass=0.8,
    rgba=(0.85, 0.3, 0.2, 1.0),
    hands=SIDES,
    symmetries=HALF_TURNS,
    turned=0.25,
    subtasks=SUBTASKS,
    progress=ToteProgress,
    operator=ToteOperator,
    mistakes=functools.partial(carry_mistakes, sizes=_SIZES),
    opportunities=carry_opportunities(_SIZES),
)
