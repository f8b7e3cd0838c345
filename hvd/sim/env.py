"""The simulated R1 as an environment: reset(seed), step(action), what it observes, and how far the task has come.

Units are the recordings' and the policies': grippers 0 (closed) .. 100 (open), base velocities in the robot's own
frame, everything else radians and metres.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mujoco as mj
import numpy as np
from jaxtyping import Float, Float32

from hvd.sim import scene
from hvd.sim.scene import BASE, GRIPPERS, JOINTS, TABLE_HEIGHT, TABLE_XY, TASKS, TORSO

SUBTASKS = ("reached", "grasped", "lifted", "placed")
STATE_DIM, ENVIRONMENT_DIM, ACTION_DIM = 21, 11, 21

_REACH_NEAR, _REACH_FAR = 0.12, 0.30  # metres from a hand to the object's surface: reached below, no longer above
_LIFT_CLEARANCE = 0.05  # the object's lowest point above the shelf
_LOST_AFTER = 4  # control steps without a grip before a grasp counts as lost: a slip of less is part of carrying
_RAMP = np.arange(1, scene.SUBSTEPS + 1)[:, None] / scene.SUBSTEPS  # targets move evenly within a control step
_STILL = 0.15  # m/s and rad/s
_HOLD_STEPS = 3  # control steps that the object must stay placed


@dataclass(frozen=True)
class Step:
    """What one control step did. `reward` is +1 per sub-task completed and -1 per sub-task undone (a lost object), so
    that a return tells how much of the task remains from any state, and dropping is never worth repeating."""

    reward: float
    success: bool
    dropped: bool  # the object fell to the floor: the task cannot succeed any more
    done: bool  # success, dropped or out of time
    event: str  # the sub-task completed in this step, "lost", or ""


class Env:
    """One simulated robot. Deterministic: the same seed and actions give the same states, bit by bit.

    Attributes:
        task: what is to be done.
        command: float64 [21] targets that the actuators now follow (joint radians, finger metres, base m/s and rad/s).
        stage: sub-tasks completed now (0..4); falls when the object is lost.
        best_stage: the highest stage of this episode, the "stage score".
        time: control steps since reset.
    """

    def __init__(self, task: str, horizon: int = 200):
        self.task = TASKS[task]
        self.horizon = horizon
        self.model = scene.build_model(self.task)
        self.data = mj.MjData(self.model)
        model = self.model
        joints = [model.joint(name) for name in scene.ACTUATED]
        self.qpos_index = np.array([joint.qposadr[0] for joint in joints])
        self.dof_index = np.array([joint.dofadr[0] for joint in joints])
        self.limits = np.array([model.jnt_range[joint.id] for joint in joints])  # [21, 2]
        self.object_qpos = model.joint("object").qposadr[0]
        self._object_dof = model.joint("object").dofadr[0]
        self._object_body = model.body("object").id
        self._hand_site = {side: model.site(f"{side}_hand").id for side in scene.SIDES}
        # Which grip surface a body is: left/right hand, and in a one-handed task its two fingers.
        self._grip_of_body = {}
        for side in self.task.hands:
            for finger in ("fa", "fb"):
                grip = side if len(self.task.hands) == 2 else finger
                self._grip_of_body[model.body(f"{side}_{finger}").id] = grip
            if len(self.task.hands) == 2:
                self._grip_of_body[model.body(f"{side}_link6").id] = side
        self._step_limit = np.full(ACTION_DIM, scene.ARM_V * scene.CONTROL_DT)
        self._step_limit[TORSO] = scene.TORSO_V * scene.CONTROL_DT
        self._step_limit[GRIPPERS] = np.inf
        self._base_limit = np.array([scene.BASE_V, scene.BASE_V, scene.BASE_W])

    # ---- the episode

    def reset(self, seed: int | Sequence[int]) -> None:
        """A new episode: base and object are placed at random by `seed` (anything numpy's default_rng takes)."""
        rng = np.random.default_rng(seed)
        mj.mj_resetData(self.model, self.data)
        q = self.data.qpos
        home = np.zeros(ACTION_DIM)
        home[scene.LEFT_ARM], home[scene.RIGHT_ARM], home[TORSO] = scene.HOME_LEFT, scene.HOME_RIGHT, scene.HOME_TORSO
        home[GRIPPERS] = scene.HOME_FINGER
        home[BASE] = rng.uniform([-0.15, -0.35, -0.3], [0.15, 0.35, 0.3])
        q[self.qpos_index] = home
        for side in scene.SIDES:
            q[self.model.joint(f"{side}_fb").qposadr[0]] = scene.HOME_FINGER
        yaw = rng.uniform(-0.25, 0.25) if self.task.name == "tote" else 0.0
        x, y = scene.SHELF_X - 0.06 + rng.uniform(-0.03, 0.03), rng.uniform(-0.25, 0.2)
        z = scene.SHELF_HEIGHT + self.task.half[2]
        q[self.object_qpos : self.object_qpos + 7] = [x, y, z, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        mj.mj_forward(self.model, self.data)
        self.command = home.copy()
        self.command[BASE] = 0
        self.time = self.stage = self.best_stage = 0
        self._placed_steps = self._loose_steps = 0
        self.success = self.dropped = False

    def limit(self, action: Float[np.ndarray, "21"]) -> Float[np.ndarray, "21"]:
        """The targets that `action` (grippers 0..100) comes down to: within joint limits, speeds, one step's travel."""
        target = np.asarray(action, np.float64).copy()
        target[GRIPPERS] = np.clip(target[GRIPPERS], 0, 100) * (scene.GRIPPER_STROKE / 100)
        target[JOINTS] = np.clip(
            target[JOINTS], (self.command - self._step_limit)[JOINTS], (self.command + self._step_limit)[JOINTS]
        )
        target[JOINTS] = np.clip(target[JOINTS], self.limits[JOINTS, 0], self.limits[JOINTS, 1])
        target[BASE] = np.clip(target[BASE], -self._base_limit, self._base_limit)
        return target

    def as_action(self, targets: Float[np.ndarray, "21"]) -> Float[np.ndarray, "21"]:
        """`targets` as `limit` returns them, in an action's units (grippers 0..100)."""
        action = targets.copy()
        action[GRIPPERS] *= 100 / scene.GRIPPER_STROKE
        return action

    def step(self, action: Float[np.ndarray, "21"]) -> Step:
        """Follow `action` for one control step (0.1 s): joint targets in radians, grippers 0..100, base velocities."""
        if not np.all(np.isfinite(action)):
            raise ValueError("the action holds NaN or infinite values")
        previous, target = self.command, self.limit(action)
        self.command = target
        vx, vy, wz = (float(v) for v in target[BASE])
        x, y, turn = (int(i) for i in BASE)
        yaw = int(self.qpos_index[turn])
        model, data, control = self.model, self.data, self.data.ctrl
        for targets in previous + _RAMP * (target - previous):
            control[:] = targets
            angle = data.qpos[yaw]
            c, s = math.cos(angle), math.sin(angle)
            control[x], control[y], control[turn] = c * vx - s * vy, s * vx + c * vy, wz
            mj.mj_step(model, data)
        self.time += 1
        return self._judge()

    # ---- what the robot observes

    def state(self) -> Float32[np.ndarray, "21"]:
        """Proprioception in action order: joint positions, grippers 0..100, base velocities in the robot's frame."""
        q = self.data.qpos[self.qpos_index]
        q[GRIPPERS] *= 100 / scene.GRIPPER_STROKE
        q[BASE] = self.base_velocity()
        return q.astype(np.float32)

    def environment_state(self) -> Float32[np.ndarray, "11"]:
        """Base pose in the world (x, y, sin yaw, cos yaw), object position and quaternion wxyz in the base frame.

        The object is symmetric: of all quaternions that look the same, the one nearest to the identity is given.
        """
        x, y, yaw = self.base_pose()
        position, quat = self.object_pose()
        c, s = np.cos(yaw), np.sin(yaw)
        dx, dy, dz = position - [x, y, 0]
        to_base = np.array([np.cos(yaw / 2), 0, 0, -np.sin(yaw / 2)])
        quat = canonical_quat(_quat_multiply(to_base, quat), self.task.symmetries)
        return np.array([x, y, s, c, c * dx + s * dy, -s * dx + c * dy, dz, *quat], np.float32)

    def base_pose(self) -> Float[np.ndarray, "3"]:
        """x, y, yaw in the world."""
        return self.data.qpos[self.qpos_index[BASE]]

    def base_velocity(self) -> Float[np.ndarray, "3"]:
        """vx, vy, wz in the robot's frame."""
        vx, vy, wz = self.data.qvel[self.dof_index[BASE]]
        yaw = self.base_pose()[2]
        c, s = np.cos(yaw), np.sin(yaw)
        return np.array([c * vx + s * vy, -s * vx + c * vy, wz])

    def object_pose(self) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "4"]]:
        """Position and quaternion (wxyz) in the world."""
        q = self.data.qpos[self.object_qpos : self.object_qpos + 7]
        return q[:3].copy(), q[3:].copy()

    def hand_position(self, side: str) -> Float[np.ndarray, "3"]:
        """Between the finger tips of the `side` hand, in the world."""
        return self.data.site_xpos[self._hand_site[side]].copy()

    # ---- how far the task has come

    def _judge(self) -> Step:
        self._follow_grip()
        placed = self._is_placed()
        self.dropped = bool(self.data.qpos[self.object_qpos + 2] < scene.SHELF_HEIGHT - 0.1)
        before, event = self.stage, ""
        if placed:
            self.success, self.stage, event = True, len(SUBTASKS), "placed"
        elif self.stage >= 2 and (self.dropped or (self._loose_steps > _LOST_AFTER and not self._on_goal())):
            self.stage, event = (1 if self._hands_within(_REACH_FAR) else 0), "lost"
        elif self.stage == 1 and not self._hands_within(_REACH_FAR):
            self.stage, event = 0, "lost"
        elif self.stage < 3 and not self.dropped and self._next_is_done():
            self.stage += 1
            event = SUBTASKS[self.stage - 1]
        self.best_stage = max(self.best_stage, self.stage)
        done = self.success or self.dropped or self.time >= self.horizon
        return Step(float(self.stage - before), self.success, self.dropped, done, event)

    def _next_is_done(self) -> bool:
        if self.stage == 0:
            return self._hands_within(_REACH_NEAR)
        if self.stage == 1:
            return self._loose_steps == 0
        return self._loose_steps == 0 and self._lowest_point() > scene.SHELF_HEIGHT + _LIFT_CLEARANCE

    def _follow_grip(self) -> None:
        """Count the steps since the object was last held from both sides."""
        grips = {self._grip_of_body.get(int(body)) for body in self._touching()} - {None}
        self._loose_steps = 0 if len(grips) == 2 else self._loose_steps + 1

    def _touching(self) -> np.ndarray:
        """The bodies in contact with the object."""
        bodies = self.model.geom_bodyid[self.data.contact.geom.reshape(-1, 2)]
        with_object = bodies[(bodies == self._object_body).any(axis=1)]
        return with_object[with_object != self._object_body]

    def _hands_within(self, distance: float) -> bool:
        """Whether every hand that the task needs is nearer than `distance` to the object's surface."""
        position, quat = self.object_pose()
        rotation = np.zeros(9)
        mj.mju_quat2Mat(rotation, quat)
        for side in self.task.hands:
            local = rotation.reshape(3, 3).T @ (self.hand_position(side) - position)
            if np.linalg.norm(np.maximum(np.abs(local) - self.task.half, 0)) > distance:
                return False
        return True

    def _lowest_point(self) -> float:
        position, quat = self.object_pose()
        rotation = np.zeros(9)
        mj.mju_quat2Mat(rotation, quat)
        return float(position[2] - np.abs(rotation.reshape(3, 3)[2]) @ self.task.half)

    def _on_goal(self) -> bool:
        position, quat = self.object_pose()
        upright = 1 - 2 * (quat[1] ** 2 + quat[2] ** 2)
        if not np.all(np.abs(position[:2] - TABLE_XY) < scene.GOAL_HALF):
            return False
        if self.task.name == "tote":
            return bool(abs(position[2] - TABLE_HEIGHT - self.task.half[2]) < 0.02 and upright > 0.9)
        return bool(TABLE_HEIGHT < position[2] < TABLE_HEIGHT + self.task.half[2] + 0.02)  # a bar may lie down

    def _is_placed(self) -> bool:
        """On the goal, at rest, touched by nothing but the room, the hands away, for three steps in a row."""
        here = self._on_goal() and not self._touching().any()  # body 0 is the room
        if here:
            velocity = self.data.qvel[self._object_dof : self._object_dof + 6]
            position, _ = self.object_pose()
            nearest = min(np.linalg.norm(self.hand_position(side) - position) for side in scene.SIDES)
            here = bool(np.abs(velocity).max() < _STILL and nearest > self.task.clear)
        self._placed_steps = self._placed_steps + 1 if here else 0
        return self._placed_steps >= _HOLD_STEPS


def canonical_quat(quat: Float[np.ndarray, "4"], symmetries: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "4"]:
    """Of `quat` times each of an object's `symmetries` (all look alike) the one nearest to the identity, w >= 0."""
    alike = np.stack([_quat_multiply(quat, s) for s in symmetries])
    best = alike[np.argmax(np.abs(alike[:, 0]))]
    return best if best[0] >= 0 else -best


def _quat_multiply(a: Float[np.ndarray, "4"], b: Float[np.ndarray, "4"]) -> Float[np.ndarray, "4"]:
    out = np.zeros(4)
    mj.mju_mulQuat(out, np.asarray(a, np.float64), np.asarray(b, np.float64))
    return out
