"""The scripted teleoperator: a machine of phases that drives the base and solves torso and arms by inverse kinematics.

It sees the simulator's true state through an error that `quality` scales (0 = clean), notices a lost object and tries
again, and makes the structured mistakes it is given (hvd.sim.mistakes).
"""

import abc
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from hvd.sim.env import Env
from hvd.sim.kinematics import BODY, BodyIK, Pose, base_velocity, rot_z
from hvd.sim.mistakes import Log, PlannedMistake
from hvd.sim.scene import BASE, GRIPPERS, LEFT_ARM, RIGHT_ARM, SHELF_HEIGHT, SHELF_X, TORSO

# Torso postures: at the shelf, while lifting, at the table.
CROUCH = np.array([1.15, -2.15, 1.25, 0.0])
CARRY = np.array([0.75, -1.45, 0.85, 0.0])
STAND = np.array([0.55, -1.1, 0.6, 0.0])

TURN_X = SHELF_X - 1.05  # here the base drives sideways to the table: the object is clear of shelf and table
STUCK = 60  # steps of a carrying phase after which the operator sees that something blocks the way

_ARMS = np.concatenate([LEFT_ARM, RIGHT_ARM])
_PERCEPT = np.array([0.022, 0.03, 0.012])  # std of the error in the object's position at quality 1, metres
_NOISE = np.zeros(21)  # std of the action noise at quality 1
_NOISE[_ARMS], _NOISE[TORSO], _NOISE[BASE] = 0.012, 0.005, [0.03, 0.03, 0.04]
_MAX_RETRIES = 3
_GIVE_UP_FRAMES = 12  # the operator stands still before the recording of a failed attempt stops
# A mistake is noted where it changed the action by more than this: base m/s (rad/s), torso rad, arms rad.
_WRONG_BASE, _WRONG_TORSO = 0.1, 0.1


class Teleoperator(abc.ABC):
    """Acts on `env` from its state right after reset; each task has a subclass with a method for each of its phases.

    Args:
        quality: 0 is clean, 1 is clumsy (percept error, action noise, weak grips).
        retries: whether a lost object is picked up again without a plan saying so.
        plans: the mistakes to make.

    Attributes:
        phase: what it is doing now.
        done: it has given up; the recording should stop.
        log: the mistakes made so far, with frames.
    """

    first = "approach"

    def __init__(
        self,
        env: Env,
        seed: int | Sequence[int],
        quality: float = 0.0,
        retries: bool = True,
        plans: tuple[PlannedMistake, ...] = (),
    ):
        self.env, self.quality = env, quality
        self.rng = np.random.default_rng([77, *np.atleast_1d(seed)])
        self.may_retry, self.retries = retries, 0
        self.ik = BodyIK(env)
        self.log, self.done = Log(), False
        self._plans = list(plans)
        self._mistake: PlannedMistake | None = None
        self._mistake_steps = 0
        self._waypoint = np.zeros(3)
        self._torso_plan: np.ndarray | None = None  # where the torso should be, while a mistake keeps it elsewhere
        self._noise = np.zeros(21)
        self.phase, self.steps = self.first, 0
        self.look()

    # ---- one control step

    def act(self) -> Float[np.ndarray, "21"]:
        """The action for the env's present state: joint targets, grippers 0..100, base velocities."""
        self._start_mistake()
        if not self._blocked or self._torso_plan is not None:  # the arms go on while the torso lags behind
            self.steps += 1
        action = self.env.as_action(self.env.command)
        action[BASE] = 0
        action[GRIPPERS] = self.open_grip
        if self.phase == "give_up":
            self._hold(action)
        else:
            getattr(self, f"phase_{self.phase}")(action)
        self._end_mistake()
        if self.quality:
            self._noise = 0.8 * self._noise + self.rng.normal(0, 0.6, 21)
            action = action + self.quality * _NOISE * self._noise
        return action

    def look(self) -> None:
        """Estimate the object's position and yaw; every retry looks closer."""
        position, quat = self.env.object_pose()
        w, x, y, z = quat
        yaw = float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))
        scale = self.quality * 0.4**self.retries
        self.object = position + self.rng.normal(0, _PERCEPT) * scale
        self.object_yaw = self.seen_yaw(yaw) + float(self.rng.normal(0, 0.08)) * scale

    def go(self, phase: str) -> None:
        """Enter `phase`, unless a mistake holds the task up. One made before the grasp that did no harm is over."""
        if self._blocked:
            return
        if phase == "back_away" and self._mistake is not None and self._mistake.phase in ("approach", "reach"):
            self._clear_mistake()
        self.phase, self.steps = phase, 0

    def fail(self) -> None:
        """The attempt has failed: try again if the operator does that, else give up."""
        if self._blocked:
            return
        reachable = SHELF_HEIGHT < self.env.object_pose()[0][2] < SHELF_HEIGHT + 0.2
        if reachable and self.may_try_again:
            self.retries += 1
            self._clear_mistake()
            self.look()
            self.go("regroup")
        else:
            self.go("give_up")

    @property
    def may_try_again(self) -> bool:
        willing = self.may_retry if self._mistake is None else self._mistake.noticed
        return willing and self.retries < _MAX_RETRIES

    def _hold(self, action: np.ndarray) -> None:
        action[GRIPPERS] = self.env.as_action(self.env.command)[GRIPPERS]
        self.done = self.steps >= _GIVE_UP_FRAMES
        if self._mistake is not None:
            self.log.wrong(self._mistake, self.env.time)

    # ---- intentions, through the mistake that is being made

    def drive(self, action: np.ndarray, goal: np.ndarray, speed: float) -> tuple[float, float]:
        """Sets the base velocity towards `goal` (x, y, yaw); returns the distance to go and the yaw error."""
        velocity, distance, turn = base_velocity(self.env, goal, speed)
        plan = self._mistake
        if plan is not None and plan.level == "base":
            if plan.kind == "detour":
                wrong, _, _ = base_velocity(self.env, self._waypoint, speed)
            else:  # believes to have arrived where it should be
                wrong_goal = goal + [*(rot_z(goal[2])[:2, :2] @ plan.offset), 0]
                wrong, distance, turn = base_velocity(self.env, wrong_goal, speed)
            if np.abs(wrong - velocity).max() > _WRONG_BASE:
                self.log.wrong(plan, self.env.time)
            velocity = wrong
        action[BASE] = velocity
        return distance, turn

    def hands_to(self, action: np.ndarray, targets: dict[str, Pose], torso: np.ndarray) -> float:
        """Sets torso and arms towards the hands' `targets`; returns the largest hand error in metres."""
        plan = self._mistake
        command = self.env.command[BODY]
        if self._torso_plan is not None:  # the arms move as if the torso had done its part
            command = np.concatenate([self._torso_plan, command[4:]])
        q, error = self.ik.solve(command, targets, torso)
        action[BODY] = q
        if self._torso_plan is not None:
            self._torso_plan = q[:4]
            held = self.env.command[TORSO]
            if plan is not None and plan.level == "torso":
                action[TORSO] = held
                if np.abs(self._torso_plan - held).max() > _WRONG_TORSO:
                    self.log.wrong(plan, self.env.time)
        if plan is not None and plan.level == "arms" and (plan.kind != "releases_early" or self.let_go):
            self._wrong_arms(action, plan, targets, torso)
        return error

    def _wrong_arms(
        self, action: np.ndarray, plan: PlannedMistake, targets: dict[str, Pose], torso: np.ndarray
    ) -> None:
        if plan.kind == "hesitates":
            action[_ARMS] = self.env.command[_ARMS]
        else:
            wide, up = (self.let_go, 0.0) if plan.kind == "releases_early" else plan.offset
            shifted = {side: self.shift_hand(side, pose, wide, up) for side, pose in targets.items()}
            start = np.concatenate([action[TORSO], self.env.command[_ARMS]])
            action[_ARMS] = self.ik.solve(start, shifted, torso, torso_free=False)[0][4:]
        self.log.wrong(plan, self.env.time)

    @property
    def releasing(self) -> bool:
        """Whether a gripper is letting go too early."""
        if self._mistake is None or self._mistake.kind != "releases_early":
            return False
        self.log.wrong(self._mistake, self.env.time)
        return True

    # ---- beginning and end of mistakes

    @property
    def _blocked(self) -> bool:
        """A mistake that will be noticed holds the task up until it is; the others go on as if all were well."""
        if self._mistake is None:
            return self._torso_plan is not None
        return self._mistake.noticed and self._mistake.kind not in ("too_high", "too_wide", "releases_early")

    def _start_mistake(self) -> None:
        if self._mistake is not None or self._torso_plan is not None or not self._plans:
            return
        plan = self._plans[0]
        if plan.phase != self.phase or self.steps < plan.delay:
            return
        self._mistake, self._mistake_steps = self._plans.pop(0), 0
        if plan.level == "torso":
            self._torso_plan = self.env.command[TORSO].copy()
        if plan.kind == "detour":
            pose = self.env.base_pose()
            self._waypoint = pose + [*(rot_z(pose[2])[:2, :2] @ plan.offset), 0]

    def _end_mistake(self) -> None:
        """A mistake held up by `_blocked` ends by itself; the torso then has to catch up before the task goes on."""
        self._mistake_steps += 1
        if self._mistake is not None and self._blocked and self._mistake_steps >= self._mistake.frames:
            self._clear_mistake()
        elif self._mistake is None and self._torso_plan is not None:
            if np.abs(self._torso_plan - self.env.command[TORSO]).max() < 0.1:
                self._torso_plan = None

    def _clear_mistake(self) -> None:
        self._mistake = None
        self.log.close()

    # ---- what the tasks fill in

    open_grip = 0.0  # gripper command while nothing is to be held
    let_go = 0.0  # metres that a hand moves outwards to let go; 0 = the gripper opens instead

    @abc.abstractmethod
    def seen_yaw(self, yaw: float) -> float:
        """The yaw to grasp at: an object that looks the same from several sides is taken from the nearest."""

    @abc.abstractmethod
    def shift_hand(self, side: str, pose: Pose, wide: float, up: float) -> Pose:
        """The `side` hand's target, wrong by `wide` metres sideways and `up` metres upwards."""
