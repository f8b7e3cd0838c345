"""One simulated episode as a JoyLo / BEHAVIOR Robot Suite HDF5 recording (FORMATS 1) with its label sidecar.

Frame t holds what was observed before action t. Beyond the usual groups there is `obs/sim/environment_state` (T, 11),
see Env.environment_state.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np

from hvd.data.labels import Labels, Subtask, sidecar_path, write_labels
from hvd.sim import scene
from hvd.sim.env import Env
from hvd.sim.render import Cameras
from hvd.sim.scene import BASE, LEFT_ARM, LEFT_GRIPPER, RIGHT_ARM, RIGHT_GRIPPER, TORSO
from hvd.sim.teleoperator import Teleoperator

_EPOCH = 1_700_000_000.0  # fixed, so that the same seed writes the same bytes
_PARTS = {"left_arm": LEFT_ARM, "right_arm": RIGHT_ARM, "torso": TORSO}
_GRIPPERS = {"left_gripper": LEFT_GRIPPER, "right_gripper": RIGHT_GRIPPER}


@dataclass
class Episode:
    """What a rollout produced: per-frame arrays (lists, frame by frame) and its labels."""

    state: list[np.ndarray] = field(default_factory=list)
    velocity: list[np.ndarray] = field(default_factory=list)
    effort: list[np.ndarray] = field(default_factory=list)
    base_pose: list[np.ndarray] = field(default_factory=list)
    environment_state: list[np.ndarray] = field(default_factory=list)
    action: list[np.ndarray] = field(default_factory=list)
    images: dict[str, list[np.ndarray]] = field(default_factory=dict)
    labels: Labels | None = None


def roll_out(env: Env, operator: Teleoperator, cameras: Cameras | None, quality: str) -> Episode:
    """Let `operator` act until the task is over, time is up or it gives up. `env` was reset and `operator` made for it."""
    episode = Episode(images={name: [] for name in scene.CAMERAS} if cameras else {})
    subtasks, start = [], 0
    while True:
        data = env.data
        episode.state.append(env.state())
        velocity = data.qvel[env.dof_index].copy()
        velocity[BASE] = env.base_velocity()
        episode.velocity.append(velocity)
        episode.effort.append(data.actuator_force.copy())
        episode.base_pose.append(env.base_pose())
        episode.environment_state.append(env.environment_state())
        for name, frames in episode.images.items():
            frames.append(cameras.image(data, name))
        step = env.step(operator.act())
        episode.action.append(env.as_action(env.command))  # what was really followed: within limits and speeds
        if step.event:
            subtasks.append(Subtask(step.event, start, env.time, step.reward))
            start = env.time
        if step.done or operator.done:
            break
    operator.log.close()
    episode.labels = Labels(
        task=env.task.prompt,
        success=step.success,
        subtasks=tuple(subtasks),
        quality=quality,
        terminal=step.success or step.dropped,
        mistakes=tuple(operator.log.mistakes),
    )
    return episode


def write(episode: Episode, path: Path) -> None:
    """Write `episode` to `path` (.hdf5) and its sidecar beside it, each atomically, the recording last."""
    write_labels(sidecar_path(path), episode.labels)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w", libver="latest") as file:
            _fill(file, episode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _fill(file: h5py.File, episode: Episode) -> None:
    count = len(episode.action)
    hz = round(1 / scene.CONTROL_DT)
    file.attrs.update(collected_time=_EPOCH, horizon=count, recording_freq=hz)
    file.attrs["obs_freq/joint_state"] = file.attrs["obs_freq/odom"] = file.attrs["obs_freq/rgb"] = hz
    seq, stamp = np.arange(count), _EPOCH + np.arange(count) * scene.CONTROL_DT
    state, action = np.stack(episode.state), np.stack(episode.action).astype(np.float32)
    velocity, effort = (np.stack(x).astype(np.float32) for x in (episode.velocity, episode.effort))
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
    pose, base = np.stack(episode.base_pose), velocity[:, BASE]
    half = pose[:, 2] / 2
    nothing = np.zeros(count)
    odom = file.create_group("obs/odom")
    odom["position"] = np.stack([pose[:, 0], pose[:, 1], nothing], 1)
    odom["orientation"] = np.stack([nothing, nothing, np.sin(half), np.cos(half)], 1)  # xyzw
    odom["linear_velocity"] = np.stack([base[:, 0], base[:, 1], nothing], 1)
    odom["angular_velocity"] = np.stack([nothing, nothing, base[:, 2]], 1)
    odom["base_velocity"], odom["stamp"] = base, stamp
    file["obs/sim/environment_state"] = np.stack(episode.environment_state)
    for name, frames in episode.images.items():
        height, width, _ = frames[0].shape
        file.create_dataset(  # a chunk per frame: readers never need more than the frames they ask for
            f"obs/rgb/{name}/img", data=np.stack(frames), chunks=(1, height, width, 3), compression="lzf"
        )
        file[f"obs/rgb/{name}/stamp"] = stamp
