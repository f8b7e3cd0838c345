"""One simulated episode as a JoyLo / BEHAVIOR Robot Suite HDF5 recording (docs/data.md) with its label sidecar.

Frame t holds what was observed before action t. Beyond the usual groups there is `obs/sim/environment_state` (T, 11),
see Env.environment_state.
"""

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from hvd.data.labels import Labels, Quality, Subtask, sidecar_path, write_labels
from hvd.files import replacing
from hvd.sim import scene
from hvd.sim.env import Env
from hvd.sim.render import Cameras
from hvd.sim.scene import BASE, LEFT_ARM, LEFT_GRIPPER, RIGHT_ARM, RIGHT_GRIPPER, TORSO
from hvd.sim.teleoperator import Teleoperator

_EPOCH = 1_700_000_000.0  # fixed, so that the same seed writes the same bytes
_PARTS = {"left_arm": LEFT_ARM, "right_arm": RIGHT_ARM, "torso": TORSO}
_GRIPPERS = {"left_gripper": LEFT_GRIPPER, "right_gripper": RIGHT_GRIPPER}


@dataclass(frozen=True)
class RecordedEpisode:
    """What a rollout produced: float arrays with one row a frame, uint8 images [T, H, W, 3] by camera, and labels."""

    state: np.ndarray  # [T, 21] in the units of Env.state
    velocity: np.ndarray  # [T, 21]
    effort: np.ndarray  # [T, 21] of the actuators
    base_pose: np.ndarray  # [T, 3]
    environment_state: np.ndarray  # [T, 11]
    action: np.ndarray  # [T, 21] as they were followed: within joint limits and speeds
    images: dict[str, np.ndarray]
    labels: Labels

    def __len__(self) -> int:
        return len(self.action)


def roll_out(env: Env, operator: Teleoperator, cameras: Cameras | None, quality: Quality) -> RecordedEpisode:
    """Let `operator` act until the task is over (success, dropped, given up: terminal) or time is up (truncated).

    `operator` was made after env.reset.
    """
    names = ("state", "velocity", "effort", "base_pose", "environment_state", "action")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
    images: dict[str, list[np.ndarray]] = {name: [] for name in scene.CAMERAS} if cameras else {}
    subtasks, start = [], 0
    while True:
        columns["state"].append(env.state())
        velocity = env.data.qvel[env.dof_index]
        velocity[BASE] = env.base_velocity()
        columns["velocity"].append(velocity)
        columns["effort"].append(env.data.actuator_force.copy())
        columns["base_pose"].append(env.base_pose())
        columns["environment_state"].append(env.environment_state())
        if cameras:
            for name, frames in images.items():
                frames.append(cameras.image(env.data, name))
        step = env.step(operator.act())
        columns["action"].append(env.as_action(env.command))
        if step.event:
            subtasks.append(Subtask(step.event, start, env.time, step.reward))
            start = env.time
        if step.done or operator.done:
            break
    operator.log.close()
    labels = Labels(
        task=env.task.prompt,
        success=step.success,
        subtasks=tuple(subtasks),
        quality=quality,
        # An operator who has given up stands still for good: nothing more is to be won, as after a drop to the floor.
        terminal=step.success or step.dropped or operator.done,
        mistakes=tuple(operator.log.mistakes),
        waiting=tuple(operator.log.waiting),
    )
    return RecordedEpisode(
        **{name: np.stack(rows).astype(np.float32) for name, rows in columns.items()},
        images={name: np.stack(frames) for name, frames in images.items()},
        labels=labels,
    )


def write(episode: RecordedEpisode, path: Path) -> None:
    """Write `episode` to `path` (.hdf5) and its sidecar beside it, each atomically, the recording last."""
    write_labels(sidecar_path(path), episode.labels)
    with replacing(path) as temporary, h5py.File(temporary, "x", libver="latest") as file:
        _fill(file, episode)


def _fill(file: h5py.File, episode: RecordedEpisode) -> None:
    count = len(episode)
    hz = round(1 / scene.CONTROL_DT)
    file.attrs.update(collected_time=_EPOCH, horizon=count, recording_freq=hz)
    file.attrs["obs_freq/joint_state"] = file.attrs["obs_freq/odom"] = file.attrs["obs_freq/rgb"] = hz
    seq, stamp = np.arange(count), _EPOCH + np.arange(count) * scene.CONTROL_DT
    state, action, velocity, effort = episode.state, episode.action, episode.velocity, episode.effort
    for part, dims in _PARTS.items():
        group = file.create_group(f"obs/joint_state/{part}")
        group["joint_position"], group["joint_velocity"] = state[:, dims], velocity[:, dims]
        group["joint_effort"], group["seq"], group["stamp"] = effort[:, dims], seq, stamp
        file[f"action/{part}"] = action[:, dims]
    for part, dim in _GRIPPERS.items():
        group = file.create_group(f"obs/gripper_state/{part}")
        group["gripper_position"], group["gripper_velocity"] = state[:, dim], velocity[:, dim]
        group["gripper_effort"], group["seq"], group["stamp"] = effort[:, dim], seq, stamp
        file[f"action/{part}"] = action[:, dim]
    file["action/mobile_base"] = action[:, BASE]
    (x, y, yaw), base, nothing = episode.base_pose.T, velocity[:, BASE], np.zeros(count, np.float32)
    odom = file.create_group("obs/odom")
    odom["position"] = np.stack([x, y, nothing], 1)
    odom["orientation"] = np.stack([nothing, nothing, np.sin(yaw / 2), np.cos(yaw / 2)], 1)  # xyzw
    odom["linear_velocity"] = np.stack([base[:, 0], base[:, 1], nothing], 1)
    odom["angular_velocity"] = np.stack([nothing, nothing, base[:, 2]], 1)
    odom["base_velocity"], odom["stamp"] = base, stamp
    file["obs/sim/environment_state"] = episode.environment_state
    for name, frames in episode.images.items():
        # A chunk per frame: readers never need more than the frames they ask for.
        file.create_dataset(f"obs/rgb/{name}/img", data=frames, chunks=(1, *frames.shape[1:]), compression="lzf")
        file[f"obs/rgb/{name}/stamp"] = stamp
