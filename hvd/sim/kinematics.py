"""Inverse kinematics of the simulated R1: torso and both arms together, by damped least squares."""

from collections.abc import Mapping

import mujoco as mj
import numpy as np
from jaxtyping import Float

from hvd.sim.env import Env
from hvd.sim.scene import ARM_V, CONTROL_DT, HOME_LEFT, HOME_RIGHT, LEFT_ARM, RIGHT_ARM, TORSO, TORSO_V

Pose = tuple[np.ndarray, np.ndarray]  # position [3] and rotation matrix [3, 3] in the world
BODY = np.concatenate([TORSO, LEFT_ARM, RIGHT_ARM])  # the 16 action dims that are solved for

_ITERATIONS = 5
_DAMPING = 2e-4
_ROTATION_WEIGHT = 0.3  # metres per radian
_TRAVEL = np.concatenate([np.full(4, TORSO_V), np.full(12, ARM_V)]) * CONTROL_DT  # of one control step
_WEIGHT = np.concatenate([np.full(4, 0.5), np.ones(12)])  # the torso moves less readily than the arms
_POSTURE_GAIN = np.concatenate([np.full(4, 0.35), np.full(12, 0.05)])


def rot_x(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def rot_y(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def rot_z(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def wrap(angle: float) -> float:
    """`angle` in [-pi, pi)."""
    return float((angle + np.pi) % (2 * np.pi) - np.pi)


class BodyIK:
    """Solves for one control step of torso and arms: as near to the hands' targets as the speed limits allow."""

    def __init__(self, env: Env):
        self._env = env
        self._data = mj.MjData(env.model)
        self._site = {side: env.model.site(f"{side}_hand").id for side in ("left", "right")}
        self._dofs = env.dof_index[BODY]
        self._low, self._high = env.limits[BODY].T + [[0.02], [-0.02]]
        elbows_in = np.array([0.3, 1, 1, 1, 1, 1])
        homes = {"left": HOME_LEFT, "right": HOME_RIGHT}
        self._rest = np.concatenate(
            [home * elbows_in if side in env.task.hands else home for side, home in homes.items()]
        )

    def solve(
        self,
        start: Float[np.ndarray, "16"],
        targets: Mapping[str, Pose],
        torso: Float[np.ndarray, "4"],
        torso_free: bool = True,
    ) -> tuple[Float[np.ndarray, "16"], float]:
        """Joint targets [16] (torso, left, right) one step from `start`, and the largest hand error left, in metres.

        `torso` is the posture that the null space pulls towards; with torso_free=False the torso stays at `start`.
        """
        model, data, env = self._env.model, self._data, self._env
        data.qpos[:] = env.data.qpos
        body_qpos = env.qpos_index[BODY]
        q = start.copy()
        travel = _TRAVEL.copy()
        weight = _WEIGHT.copy()
        if not torso_free:
            travel[:4] = weight[:4] = 0
        low, high = np.maximum(start - travel, self._low), np.minimum(start + travel, self._high)
        jacobian = np.zeros((6, model.nv))
        worst = 0.0
        for _ in range(_ITERATIONS):
            data.qpos[body_qpos] = q
            mj.mj_kinematics(model, data)
            mj.mj_comPos(model, data)
            rows, errors, worst = [], [], 0.0
            for side, (position, rotation) in targets.items():
                site = self._site[side]
                mj.mj_jacSite(model, data, jacobian[:3], jacobian[3:], site)
                shift = position - data.site_xpos[site]
                turn = _rotation_vector(rotation @ data.site_xmat[site].reshape(3, 3).T)
                worst = max(worst, float(np.linalg.norm(shift)))
                rows += [jacobian[:3, self._dofs], _ROTATION_WEIGHT * jacobian[3:, self._dofs]]
                errors += [_shorten(shift, 0.08), _ROTATION_WEIGHT * _shorten(turn, 0.3)]
            weighted = np.vstack(rows) * weight
            error = np.concatenate(errors)
            gram = weighted @ weighted.T + _DAMPING * np.eye(len(error))
            rest = _POSTURE_GAIN * (np.concatenate([torso, self._rest]) - q) / _WEIGHT
            # weighted^T gram^-1 (error - weighted rest) + rest: the step, plus the rest posture in its null space
            step = weight * (weighted.T @ np.linalg.solve(gram, error - weighted @ rest) + rest)
            q = np.minimum(np.maximum(q + np.clip(step, -0.25, 0.25), low), high)
        return q, worst


def base_velocity(env: Env, goal: Float[np.ndarray, "3"], speed: float) -> tuple[Float[np.ndarray, "3"], float, float]:
    """Proportional control of the base towards `goal` (x, y, yaw in the world).

    Velocity (m/s, m/s, rad/s in the robot's frame), distance to go and the yaw error's size.
    """
    pose = env.base_pose()
    error = (rot_z(pose[2]).T @ [*(goal[:2] - pose[:2]), 0])[:2]
    turn = wrap(goal[2] - pose[2])
    linear = 2.2 * error
    linear *= min(1.0, speed / max(float(np.linalg.norm(linear)), 1e-6))
    return np.array([*linear, np.clip(2.5 * turn, -1, 1)]), float(np.linalg.norm(error)), abs(turn)


def _shorten(vector: np.ndarray, length: float) -> np.ndarray:
    return vector * min(1.0, length / max(float(np.linalg.norm(vector)), 1e-6))


def _rotation_vector(rotation: np.ndarray) -> np.ndarray:
    quat, vector = np.zeros(4), np.zeros(3)
    mj.mju_mat2Quat(quat, rotation.ravel())
    mj.mju_quat2Vel(vector, quat, 1.0)
    return vector
