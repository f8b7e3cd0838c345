"""The phases of the two tasks: where base, torso and hands should be at each moment, and when the next phase begins."""

from collections.abc import Sequence

import numpy as np

from hvd.sim.env import Env
from hvd.sim.kinematics import Pose, rot_x, rot_y, rot_z
from hvd.sim.mistakes import Plan
from hvd.sim.scene import RIGHT_GRIPPER, SHELF_HEIGHT, SHELF_X, TABLE_HEIGHT, TABLE_XY
from hvd.sim.teleoperator import CARRY, CROUCH, STAND, Teleoperator

_TURN_X = SHELF_X - 1.05  # here the base drives sideways to the table: the object is clear of shelf and table
_STUCK = 60  # steps of a carrying phase after which the operator sees that something blocks the way


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
        if (error < 0.02 and self.steps > 4) or self.steps > (30 if self._mistake is None else 15):
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
        distance, _ = self._carry(action, [_TURN_X - 0.06, self.lift_y, 0], posture)
        if self.height >= self._high and distance < 0.05:
            self.go("sidestep")

    def phase_sidestep(self, action):
        distance, turn = self._carry(action, [_TURN_X, TABLE_XY[1], 0], STAND)
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
        if (lost and low and self.may_try_again) or (low and self.steps > 15) or self.steps > _STUCK:
            self.squeeze = 0.032
            self.fail()
        return reached


class PickOperator(Teleoperator):
    """Takes the bar with the right gripper."""

    open_grip = 100.0
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
        if (error < 0.015 and self.steps > 3) or self.steps > (30 if self._mistake is None else 15):
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
        distance, turn = self._carry(action, [_TURN_X, self.lift_y, 0])
        if distance < 0.04 and turn < 0.05 and self.height >= self._low + 0.1:
            self.go("sidestep")

    def phase_sidestep(self, action):
        distance, turn = self._carry(action, [_TURN_X, TABLE_XY[1] - self._standoff[1], 0])
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
            self.hands_to(action, self._hand(self.place + [-0.04 * (self.steps - 3), 0, 0.02]), STAND)
        if self.steps > 25:
            self.go("give_up")

    @property
    def _low(self) -> float:
        return TABLE_HEIGHT + self.env.task.half[2] + 0.012

    @property
    def _at_table(self) -> np.ndarray:
        return np.array([TABLE_XY[0] - self._standoff[0] - 0.05, TABLE_XY[1] - self._standoff[1], 0])

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
        self.hand_error = self.hands_to(action, self._hand(self._held_at(), yaw), STAND)
        position, _ = self.env.object_pose()
        lost = np.linalg.norm(position - self.env.hand_position("right")) > 0.12
        reachable = SHELF_HEIGHT < position[2] < SHELF_HEIGHT + 0.2
        if (lost and reachable and self.may_try_again) or (lost and self.steps > 15) or self.steps > _STUCK:
            self.fail()
        return reached


def make(
    env: Env, seed: int | Sequence[int], quality: float = 0.0, retries: bool = True, plans: tuple[Plan, ...] = ()
) -> Teleoperator:
    """The operator for `env`'s task; call it after env.reset. `quality` 0 is clean, 1 is clumsy (percept error,
    action noise, weak grips); with retries=False a lost object is not picked up again unless a plan says so."""
    kind = ToteOperator if env.task.name == "tote" else PickOperator
    return kind(env, seed, quality, retries, plans)
