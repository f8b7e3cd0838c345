"""The sub-tasks of carrying an object from the shelf to the goal, judged from contacts and positions."""

import abc

import mujoco as mj
import numpy as np
from jaxtyping import Float

from hvd.sim import scene
from hvd.sim.env import Env

SUBTASKS = ("reached", "grasped", "lifted", "placed")

_REACH_NEAR, _REACH_FAR = 0.12, 0.30  # metres from a hand to the object's surface: reached below, no longer above
_LIFT_CLEARANCE = 0.05  # the object's lowest point above the shelf
_LOST_AFTER = 4  # control steps without a grip before a grasp counts as lost: a slip of less is part of carrying
_STILL = 0.15  # m/s and rad/s
_HOLD_STEPS = 3  # control steps that the object must stay placed


class Carry(abc.ABC):
    """Judges SUBTASKS in `env` (hvd.sim.tasks.Progress); each task says how its object must rest.

    Attributes:
        goal: the middle of the goal, x and y; its half sizes are scene.GOAL_HALF.
        clear: a hand must be this far from the object's centre, in metres, before the object counts as placed.
    """

    goal = scene.TABLE_XY
    clear: float

    def __init__(self, env: Env):
        self.env = env
        model = env.model
        first = model.joint("object").dofadr[0]
        self._object_dofs = slice(first, first + (6 if model.joint("object").type[0] == mj.mjtJoint.mjJNT_FREE else 1))
        self._object_body = model.body("object").id
        # Which grip surface a body is: left/right hand, and in a one-handed task its two fingers.
        hands, self._grip_of_body = env.task.hands, {}
        for side in hands:
            for finger in ("fa", "fb"):
                self._grip_of_body[model.body(f"{side}_{finger}").id] = side if len(hands) == 2 else finger
            if len(hands) == 2:
                self._grip_of_body[model.body(f"{side}_link6").id] = side
        self.reset()

    @abc.abstractmethod
    def rests_on_goal(self, position: Float[np.ndarray, "3"], upright: float) -> bool:
        """Whether the object, which is over the goal, lies on it. `upright`: cosine of its tilt."""

    def reset(self) -> None:
        self._placed_steps = self._loose_steps = 0

    def judge(self, stage: int) -> tuple[int, str]:
        self._follow_grip()
        if self._is_placed():
            return len(SUBTASKS), "placed"
        if stage >= 2 and (self.env.dropped or (self._loose_steps > _LOST_AFTER and not self._on_goal())):
            return (1 if self._is_near() else 0), "lost"
        if stage == 1 and not self._is_near():
            return 0, "lost"
        if stage < 3 and not self.env.dropped and self._next_is_done(stage):
            return stage + 1, SUBTASKS[stage]
        return stage, ""

    def _is_near(self) -> bool:
        """Not so far away that a reached object is no longer reached."""
        return self._hands_within(_REACH_FAR)

    def _is_reached(self) -> bool:
        return self._hands_within(_REACH_NEAR)

    def _next_is_done(self, stage: int) -> bool:
        if stage == 0:
            return self._is_reached()
        if stage == 1:
            return self._loose_steps == 0
        return self._loose_steps == 0 and self._lowest_point() > scene.SHELF_HEIGHT + _LIFT_CLEARANCE

    def _follow_grip(self) -> None:
        """Count the steps since the object was last held from both sides."""
        grips = {self._grip_of_body.get(int(body)) for body in self._touching()} - {None}
        self._loose_steps = 0 if len(grips) == 2 else self._loose_steps + 1

    def _touching(self) -> np.ndarray:
        """The bodies in contact with the object."""
        bodies = self.env.model.geom_bodyid[self.env.data.contact.geom.reshape(-1, 2)]
        with_object = bodies[(bodies == self._object_body).any(axis=1)]
        return with_object[with_object != self._object_body]

    def _hands_within(self, distance: float) -> bool:
        """Whether every hand that the task needs is nearer than `distance` to the object's surface."""
        position, quat = self.env.object_pose()
        rotation = np.zeros(9)
        mj.mju_quat2Mat(rotation, quat)
        for side in self.env.task.hands:
            local = rotation.reshape(3, 3).T @ (self.env.hand_position(side) - position)
            if np.linalg.norm(np.maximum(np.abs(local) - self.env.task.half, 0)) > distance:
                return False
        return True

    def _lowest_point(self) -> float:
        position, quat = self.env.object_pose()
        rotation = np.zeros(9)
        mj.mju_quat2Mat(rotation, quat)
        return float(position[2] - np.abs(rotation.reshape(3, 3)[2]) @ self.env.task.half)

    def _on_goal(self) -> bool:
        position, quat = self.env.object_pose()
        upright = 1 - 2 * (quat[1] ** 2 + quat[2] ** 2)
        over = bool(np.all(np.abs(position[:2] - self.goal) < scene.GOAL_HALF))
        return over and self.rests_on_goal(position, float(upright))

    def _is_placed(self) -> bool:
        """On the goal, at rest, touched by nothing but the room, the hands away, for three steps in a row."""
        here = self._on_goal() and not self._touching().any()  # body 0 is the room
        if here:
            velocity = self.env.data.qvel[self._object_dofs]
            position, _ = self.env.object_pose()
            nearest = min(np.linalg.norm(self.env.hand_position(side) - position) for side in scene.SIDES)
            here = bool(np.abs(velocity).max() < _STILL and nearest > self.clear)
        self._placed_steps = self._placed_steps + 1 if here else 0
        return self._placed_steps >= _HOLD_STEPS
