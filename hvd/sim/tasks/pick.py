"""Pick a bar from the shelf with the right gripper and place it on the goal on the table."""

import functools

import numpy as np
from jaxtyping import Float

from hvd.sim.carry import SUBTASKS, Carry
from hvd.sim.kinematics import Pose, rot_y, rot_z
from hvd.sim.mistakes import Sizes, carry_mistakes, carry_opportunities
from hvd.sim.scene import HALF_TURNS, QUARTER_TURNS, RIGHT_GRIPPER, SHELF_HEIGHT, TABLE_HEIGHT, TABLE_XY
from hvd.sim.tasks import Task
from hvd.sim.teleoperator import CARRY, CROUCH, STAND, STUCK, TURN_X, Teleoperator


class PickProgress(Carry):
    """The bar may stand or lie on the goal."""

    clear = 0.10

    def rests_on_goal(self, position: Float[np.ndarray, "3"], upright: float) -> bool:
        return bool(TABLE_HEIGHT < position[2] < TABLE_HEIGHT + self.env.task.half[2] + 0.02)


class PickOperator(Teleoperator):
    """Takes the bar with the right gripper."""

    open_grip = 100.0
    _goal, _top, _upright = TABLE_XY, TABLE_HEIGHT, STAND  # where the bar is brought, and the torso's posture there
    _standoff = np.array([0.62, -0.16])  # the bar from the base: forward, left
    _tilt = rot_y(0.35)
    _tips = np.array([0.005, 0, 0.012])  # from the bar's middle to where the hand closes
    _before = np.array([-0.11, 0, 0.045])  # from the bar's middle to where the hand waits

    def seen_yaw(self, yaw: float) -> float:
        return 0.0  # the bar is taken as it stands

    def shift_hand(self, side: str, pose: Pose, wide: float, up: float) -> Pose:
        return pose[0] + np.array([0, wide, up]), pose[1]

    def phase_approach(self, action):
        distance, turn = self.drive(action, self._base_for(self.object), 0.6)
        if distance < 0.35:
            self.hands_to(action, self._hand(self.object + [-0.16, 0, 0.09]), CROUCH)
        if (distance < 0.03 and turn < 0.05) or self.steps > 60:
            self.look()
            self.go("reach")

    def phase_reach(self, action):
        self.drive(action, self._base_for(self.object), 0.2)
        error = self.hands_to(action, self._hand(self.object + self._before), CROUCH)
        if (error < 0.015 and self.steps > 3) or self.late(30):
            self.go("grasp")

    def phase_grasp(self, action):
        k = min(self.steps / 6, 1)
        error = self.hands_to(action, self._hand(self.object + self._before * (1 - k) + self._tips * k), CROUCH)
        if (k == 1 and error < 0.012) or self.steps > 20:
            self.go("close")

    def phase_close(self, action):
        self.hands_to(action, self._hand(self.object + self._tips), CROUCH)
        action[RIGHT_GRIPPER] = 0
        if self.steps > 4:
            self.go("lift")

    def phase_lift(self, action):
        action[RIGHT_GRIPPER] = 100 if self.releasing else 0
        rise = np.array([-0.01 * self.steps, 0, min(0.03 * self.steps, 0.2)])
        posture = CROUCH + (CARRY - CROUCH) * min(1, self.steps / 10)
        self.hands_to(action, self._hand(self.object + self._tips + rise), posture)
        if self.steps < 8:
            return
        if self.env.object_pose()[0][2] < SHELF_HEIGHT + self.env.task.half[2] + 0.05:
            self.fail()
            return
        self.height, self.lift_y = SHELF_HEIGHT + 0.25, self.env.base_pose()[1]
        self.go("back_away")

    def phase_regroup(self, action):
        self.drive(action, self._base_for(self.object, 0.08), 0.6)
        self.hands_to(action, self._hand(self.object + [-0.18, 0, 0.10]), CROUCH)
        if self.steps > 8:
            self.look()
            self.go("approach")

    def phase_back_away(self, action):
        distance, turn = self._carry(action, [TURN_X, self.lift_y, 0])
        if distance < 0.04 and turn < 0.05 and self.height >= self._low + 0.1:
            self.go("sidestep")

    def phase_sidestep(self, action):
        distance, turn = self._carry(action, [TURN_X, self._goal[1] - self._standoff[1], 0])
        if distance < 0.04 and turn < 0.05:
            self.go("advance")

    def phase_advance(self, action):
        distance, turn = self._carry(action, self._at_table)
        if distance < 0.04 and turn < 0.05:
            self.go("lower")

    def phase_lower(self, action):
        self._carry(action, self._at_table, down=True)
        if self.height < self._low and self.steps > 7 and self.hand_error < 0.03:
            self.place = self._held_at()
            self.go("leave")

    def phase_leave(self, action):
        if self.steps > 3:
            action[7] = -0.3
            self.hands_to(action, self._hand(self.place + [-0.04 * (self.steps - 3), 0, 0.02]), self._upright)
        if self.steps > 25:
            self.go("give_up")

    @property
    def _low(self) -> float:
        return self._top + self.env.task.half[2] + 0.012

    @property
    def _at_table(self) -> np.ndarray:
        return np.array([self._goal[0] - self._standoff[0] - 0.05, self._goal[1] - self._standoff[1], 0])

    def _base_for(self, position: np.ndarray, back: float = 0.0) -> np.ndarray:
        return np.array([position[0] - self._standoff[0] - back, position[1] - self._standoff[1], 0])

    def _hand(self, position: np.ndarray, yaw: float = 0.0) -> dict[str, Pose]:
        return {"right": (position, rot_z(yaw) @ self._tilt)}

    def _held_at(self) -> np.ndarray:
        x, y, yaw = self.env.base_pose()
        return np.array([*(np.array([x, y]) + (rot_z(yaw) @ [*self._standoff, 0])[:2]), self.height])

    def _carry(self, action, goal, down: bool = False) -> tuple[float, float]:
        action[RIGHT_GRIPPER] = 100 if self.releasing else 0
        reached = self.drive(action, np.asarray(goal, float), 0.5)
        self.height = max(self.height - 0.02, self._low - 0.002) if down else min(self.height + 0.03, self._low + 0.12)
        yaw = self.env.base_pose()[2]
        self.hand_error = self.hands_to(action, self._hand(self._held_at(), yaw), self._upright)
        position, _ = self.env.object_pose()
        lost = np.linalg.norm(position - self.env.hand_position("right")) > 0.12
        reachable = SHELF_HEIGHT < position[2] < SHELF_HEIGHT + 0.2
        if (lost and reachable and self.may_try_again) or (lost and self.steps > 15) or self.steps > STUCK:
            self.fail()
        return reached


_SIZES = Sizes(
    out_of_reach=(0.73, 0.80),
    too_high=(0.11, 0.15),
    too_wide=(0.05, 0.07),
    to_either_side=True,
    # one arm reaches the goal from where it advances: letting go there is no mistake
    released_early_in=("lift", "back_away", "sidestep"),
)

TASK = Task(
    prompt="pick the yellow bar from the shelf and place it on the green goal on the table",
    half=np.array([0.022, 0.022, 0.05]),
    mass=0.12,
    rgba=(0.9, 0.7, 0.1, 1.0),
    hands=("right",),
    symmetries=np.concatenate([HALF_TURNS, QUARTER_TURNS]),
    turned=0.0,
    subtasks=SUBTASKS,
    progress=PickProgress,
    operator=PickOperator,
    mistakes=functools.partial(carry_mistakes, sizes=_SIZES),
    opportunities=carry_opportunities(_SIZES),
)
