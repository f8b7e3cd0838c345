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
from hvd.sim.scene import BASE, GRIPPERS, JOINTS, TORSO
from hvd.sim.tasks import get_task

ACTION_DIM = 21

_RAMP = np.arange(1, scene.SUBSTEPS + 1)[:, None] / scene.SUBSTEPS  # targets move evenly within a control step


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
        stage: sub-tasks completed now; falls when the object is lost.
        best_stage: the highest stage of this episode, the "stage score".
        time: control steps since reset.
    """

    def __init__(self, task: str, horizon: int = 200):
        self.task = get_task(task)
        self.horizon = horizon
        self.model = scene.build_model(self.task)
        self.data = mj.MjData(self.model)
        model = self.model
        joints = [model.joint(name) for name in scene.ACTUATED]
        self.qpos_index = np.array([joint.qposadr[0] for joint in joints])
        self.dof_index = np.array([joint.dofadr[0] for joint in joints])
        self.limits = np.array([model.jnt_range[joint.id] for joint in joints])  # [21, 2]
        self.object_qpos = model.joint("object").qposadr[0]
        fixed = model.joint("object").type[0] != mj.mjtJoint.mjJNT_FREE
        self._slides_from = model.body("object").pos.copy() if fixed else None  # of an object that slides along x
        self._hand_site = {side: model.site(f"{side}_hand").id for side in scene.SIDES}
        self._step_limit = np.full(ACTION_DIM, scene.ARM_V * scene.CONTROL_DT)
        self._step_limit[TORSO] = scene.TORSO_V * scene.CONTROL_DT
        self._step_limit[GRIPPERS] = np.inf
        self._base_limit = np.array([scene.BASE_V, scene.BASE_V, scene.BASE_W])
        self._progress = self.task.progress(self)

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
        if self._slides_from is None:
            self._place_object(rng)
        mj.mj_forward(self.model, self.data)
        self.command = home.copy()
        self.command[BASE] = 0
        self.time = self.stage = self.best_stage = 0
        self.success = self.dropped = False
        self._progress.reset()

    def _place_object(self, rng: np.random.Generator) -> None:
        """On the shelf."""
        turned = self.task.turned
        yaw = rng.uniform(-turned, turned) if turned else 0.0
        x, y = scene.SHELF_X - 0.06 + rng.uniform(-0.03, 0.03), rng.uniform(-0.25, 0.2)
        z = scene.SHELF_HEIGHT + self.task.half[2]
        pose = [x, y, z, np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
        self.data.qpos[self.object_qpos : self.object_qpos + 7] = pose

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
        if self._slides_from is not None:
            return self._slides_from + [self.data.qpos[self.object_qpos], 0, 0], np.array([1.0, 0, 0, 0])
        q = self.data.qpos[self.object_qpos : self.object_qpos + 7]
        return q[:3].copy(), q[3:].copy()

    def hand_position(self, side: str) -> Float[np.ndarray, "3"]:
        """Between the finger tips of the `side` hand, in the world."""
        return self.data.site_xpos[self._hand_site[side]].copy()

    def _judge(self) -> Step:
        self.dropped = bool(self.object_pose()[0][2] < scene.SHELF_HEIGHT - 0.1)
        before = self.stage
        self.stage, event = self._progress.judge(before)
        self.success = self.success or self.stage == len(self.task.subtasks)
        self.best_stage = max(self.best_stage, self.stage)
        done = self.success or self.dropped or self.time >= self.horizon
        return Step(float(self.stage - before), self.success, self.dropped, done, event)


def canonical_quat(quat: Float[np.ndarray, "4"], symmetries: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "4"]:
    """Of `quat` times each of an object's `symmetries` (all look alike) the one nearest to the identity, w >= 0."""
    alike = np.stack([_quat_multiply(quat, s) for s in symmetries])
    best = alike[np.argmax(np.abs(alike[:, 0]))]
    return best if best[0] >= 0 else -best


def _quat_multiply(a: Float[np.ndarray, "4"], b: Float[np.ndarray, "4"]) -> Float[np.ndarray, "4"]:
    out = np.zeros(4)
    mj.mju_mulQuat(out, np.asarray(a, np.float64), np.asarray(b, np.float64))
    return out
