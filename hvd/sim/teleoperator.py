"""The scripted teleoperator: a machine of phases that drives the base and solves torso and arms by inverse kinematics.

It sees the simulator's true state through an error that `quality` scales (0 = clean), notices a lost object and tries
again, and makes the structured mistakes it is given (hvd.sim.mistakes, hvd.sim.slots).
"""

import abc
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from hvd.sim.env import Env
from hvd.sim.kinematics import BodyIK, Pose
from hvd.sim.mistakes import Log, PlannedMistake
from hvd.sim.scene import BASE, GRIPPERS, SHELF_HEIGHT, SHELF_X, TORSO
from hvd.sim.slots import ARMS, Concurrent, OneSlot

# Torso postures: at the shelf, while lifting, at the table.
CROUCH = np.array([1.15, -2.15, 1.25, 0.0])
CARRY = np.array([0.75, -1.45, 0.85, 0.0])
STAND = np.array([0.55, -1.1, 0.6, 0.0])

TURN_X = SHELF_X - 1.05  # here the base drives sideways to the table: the object is clear of shelf and table
STUCK = 60  # steps of a carrying phase after which the operator sees that something blocks the way

_PERCEPT = np.array([0.022, 0.03, 0.012])  # std of the error in the object's position at quality 1, metres
_NOISE = np.zeros(21)  # std of the action noise at quality 1
_NOISE[ARMS], _NOISE[TORSO], _NOISE[BASE] = 0.012, 0.005, [0.03, 0.03, 0.04]
_MAX_RETRIES = 3
_GIVE_UP_FRAMES = 12  # the operator stands still before the recording of a failed attempt stops


class Teleoperator(abc.ABC):
    """Acts on `env` from its state right after reset; each task has a subclass with a method for each of its phases.

    Args:
        quality: 0 is clean, 1 is clumsy (percept error, action noise, weak grips).
        retries: whether a lost object is picked up again without a plan saying so.
        plans: the mistakes to make.
        concurrent: a mistake of each level at a time, instead of one that stops the others.

    Attributes:
        phase: what it is doing now.
        done: it has given up; the recording should stop.
        slots: the mistakes being made.
    """

    first = "approach"

    def __init__(
        self,
        env: Env,
        seed: int | Sequence[int],
        quality: float = 0.0,
        retries: bool = True,
        plans: tuple[PlannedMistake, ...] = (),
        concurrent: bool = False,
    ):
        self.env, self.quality = env, quality
        self.rng = np.random.default_rng([77, *np.atleast_1d(seed)])
        self.may_retry, self.retries = retries, 0
        self.ik = BodyIK(env)
        self.slots, self.done = (Concurrent if concurrent else OneSlot)(self, plans), False
        self._noise = np.zeros(21)
        self.phase, self.steps = self.first, 0
        self.look()

    # ---- one control step

    def act(self) -> Float[np.ndarray, "21"]:
        """The action for the env's present state: joint targets, grippers 0..100, base velocities."""
        self.slots.start()
        if self.slots.counts:
            self.steps += 1
        action = self.env.as_action(self.env.command)
        action[BASE] = 0
        action[GRIPPERS] = self.open_grip
        if self.phase == "give_up":
            self._hold(action)
        else:
            getattr(self, f"phase_{self.phase}")(action)
        self.slots.end(action)
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

    @property
    def log(self) -> Log:
        """The mistakes made so far, with frames."""
        return self.slots.log

    def go(self, phase: str) -> None:
        """Enter `phase`, unless a mistake holds the task up."""
        if self.slots.may_go():
            self._enter(phase)

    def late(self, most: int, after_mistake: int = 15) -> bool:
        """Whether the hands have tried for so many steps that the next phase begins anyway."""
        return self.slots.late(self.steps, most, after_mistake)

    def fail(self) -> None:
        """The attempt has failed: try again if the operator does that, else give up."""
        if self.slots.holds_up:
            return
        reachable = SHELF_HEIGHT < self.env.object_pose()[0][2] < SHELF_HEIGHT + 0.2
        if reachable and self.may_try_again:
            self.retries += 1
            self.slots.clear()
            self.look()
            self._enter("regroup")
        else:
            self.give_up()

    def give_up(self) -> None:
        self._enter("give_up")

    @property
    def may_try_again(self) -> bool:
        willing = self.slots.all_noticed if self.slots.active else self.may_retry
        return willing and self.retries < _MAX_RETRIES

    def _enter(self, phase: str) -> None:
        self.slots.entered(phase)
        self.phase, self.steps = phase, 0

    def _hold(self, action: np.ndarray) -> None:
        action[GRIPPERS] = self.env.as_action(self.env.command)[GRIPPERS]
        self.done = self.steps >= _GIVE_UP_FRAMES
        self.slots.give_up()

    # ---- intentions, through the mistakes that are being made

    def drive(self, action: np.ndarray, goal: np.ndarray, speed: float) -> tuple[float, float]:
        """Sets the base velocity towards `goal` (x, y, yaw); returns the distance to go and the yaw error."""
        action[BASE], distance, turn = self.slots.arrive(goal, speed)
        return distance, turn

    def hands_to(self, action: np.ndarray, targets: dict[str, Pose], torso: np.ndarray) -> float:
        """Sets torso and arms towards the hands' `targets`; returns the largest hand error in metres."""
        return self.slots.body(action, targets, torso)

    @property
    def releasing(self) -> bool:
        """Whether a gripper is letting go too early."""
        return self.slots.releasing

    # ---- what the tasks fill in

    open_grip = 0.0  # gripper command while nothing is to be held
    let_go = 0.0  # metres that a hand moves outwards to let go; 0 = the gripper opens instead

    @abc.abstractmethod
    def seen_yaw(self, yaw: float) -> float:
        """The yaw to grasp at: an object that looks the same from several sides is taken from the nearest."""

    @abc.abstractmethod
    def shift_hand(self, side: str, pose: Pose, wide: float, up: float) -> Pose:
        """The `side` hand's target, wrong by `wide` metres sideways and `up` metres upwards."""
