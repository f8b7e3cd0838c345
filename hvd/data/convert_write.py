"""The last part of a conversion: the encoded videos and the recordings' numbers become one LeRobot dataset."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hvd.data.convert_plan import ConversionPlan, ConvertConfig, PlannedEpisode
from hvd.data.labels import episode_path, write_labels
from hvd.data.lerobot_writer import Feature, LeRobotWriter, Segment
from hvd.data.recordings import Recording, RecordingRef
from hvd.robots import get_robot


def write_dataset(
    folder: Path,
    config: ConvertConfig,
    plan: ConversionPlan,
    episodes: Sequence[PlannedEpisode],
    segments: Mapping[tuple[RecordingRef, str], Segment],
) -> int:
    """Write the dataset into the new folder `folder`; returns its number of frames.

    Args:
        episodes: those of the plan whose images could be read.
        segments: the encoded frames by recording and camera.
    """
    writer = LeRobotWriter(
        folder,
        fps=plan.fps,
        robot_type=config.robot,
        features=_features(config, plan),
        codec=config.codec,
        crf=config.crf,
    )
    with writer:
        (folder / "labels").mkdir()
        for i, episode in enumerate(tqdm(episodes, desc="write", unit="episode", mininterval=0.5)):
            with config.open(episode.ref) as recording:
                columns = _columns(recording, episode)
            videos = {_image_key(camera): segments[episode.ref, camera] for camera in config.cameras}
            labels, sidecar = episode.labels, episode_path(folder / "labels", i)
            extra = {"success": labels.success, "quality": labels.quality}
            writer.add_episode(columns, episode.prompt, videos, extra)
            if episode.sidecar is None:
                write_labels(sidecar, labels)
            else:
                shutil.copyfile(episode.sidecar, sidecar)
    return writer.num_frames


def _image_key(camera: str) -> str:
    return f"observation.images.{camera}"


def _features(config: ConvertConfig, plan: ConversionPlan) -> dict[str, Feature]:
    names = get_robot(config.robot).action_names
    features = {
        _image_key(camera): Feature("video", (*size, 3), ("height", "width", "channels"))
        for camera, size in zip(config.cameras, plan.image_sizes, strict=True)
    }
    features["observation.state"] = Feature("float32", (len(names),), names)
    if plan.environment_dim:
        features["observation.environment_state"] = Feature("float32", (plan.environment_dim,))
    features["action"] = Feature("float32", (len(names),), names)
    features["next.reward"] = Feature("float32", (1,))
    features["terminal"] = Feature("bool", (1,))
    features["truncated"] = Feature("bool", (1,))
    return features


def _columns(recording: Recording, episode: PlannedEpisode) -> dict[str, np.ndarray]:
    """The episode's numeric columns: [T, d], or [T] for reward, terminal and truncated."""
    last = np.arange(recording.num_frames) == recording.num_frames - 1
    columns = {"observation.state": recording.state()}
    environment = recording.environment_state()
    if environment is not None:
        columns["observation.environment_state"] = environment
    columns["action"] = recording.actions()
    columns["next.reward"] = episode.labels.rewards(recording.num_frames)
    columns["terminal"] = last & episode.labels.is_terminal
    columns["truncated"] = last & (not episode.labels.is_terminal)
    return columns
