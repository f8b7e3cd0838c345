"""hvd convert against lerobot's own writer, on the same recordings and cores.

    python -m tests.benchmarks.bench_convert [--episodes 6] [--frames 150] [--size 224]

needs the `lerobot` extra. The frames are those of the real humanoid's videos (HVD_G1_DATA, or ../shared/data/g1_bottle)
where they are there, else generated. Every row writes a whole dataset of 3 cameras from JoyLo files: reading, checking,
encoding, statistics, tables. lerobot's import time is not counted; starting our processes is. CPU seconds include those
of child processes. PSNR: of the decoded videos against the recorded frames, mean over a sample.
"""

import argparse
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import h5py
import numpy as np

from hvd.data.convert import ConvertConfig, convert
from hvd.data.convert_work import num_cores
from hvd.data.recordings import CAMERAS, RecordingRef, open_recording, recording_files
from hvd.robots import get_robot
from tests.data import joylo
from tests.folders import folder

TASK = "stack the boxes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=6)
    parser.add_argument("--frames", type=int, default=150, help="of each episode and camera")
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw"
        source = write_recordings(raw, args.episodes, args.frames, args.size)
        frames = args.episodes * args.frames * len(CAMERAS)
        print(f"{frames} frames ({args.episodes} episodes, 3 cameras, {args.size}x{args.size}, {source}), ", end="")
        print(f"{num_cores()} cores")
        target = Path(scratch) / "set"
        ways: dict[str, Callable[[], None]] = {
            "lerobot, default settings": lambda: with_lerobot(raw, target),
            "lerobot, streaming_encoding": lambda: with_lerobot(raw, target, streaming_encoding=True),
            "hvd convert --codec av1": lambda: with_hvd(raw, target, "av1"),
            "hvd convert": lambda: with_hvd(raw, target, "h264"),
        }
        print(f"{'':28} {'frames/s':>9} {'frames/CPU-s':>13} {'faster':>7} {'MB':>6} {'PSNR':>6}")
        base = 0.0
        for name, way in ways.items():
            wall, cpu = measure(way)
            base = base or wall
            size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file()) / 1e6
            print(f"{name:28} {frames / wall:9.0f} {frames / cpu:13.0f} {base / wall:6.1f}x {size:6.1f} ", end="")
            print(f"{psnr(raw, target, args.frames):6.1f}", flush=True)
            shutil.rmtree(target)


def write_recordings(raw: Path, episodes: int, frames: int, size: int) -> str:
    real = folder("HVD_G1_DATA")
    for i in range(episodes):
        path = raw / f"demo_{i:04d}.hdf5"
        joylo.write_recording(path, frames, seed=i, size=(size, size))
        if real is not None:
            with h5py.File(path, "r+") as file:
                for j, camera in enumerate(CAMERAS):
                    del file[f"obs/rgb/{camera}/img"]
                    file[f"obs/rgb/{camera}/img"] = real_frames(real, 3 * i + j, frames, size)
    return "generated frames" if real is None else "frames of real videos"


def real_frames(dataset: Path, number: int, frames: int, size: int) -> np.ndarray:
    """`frames` frames of the dataset's videos, one after another beginning with video `number`."""
    paths = sorted(dataset.glob("videos/**/*.mp4"))
    found: list[np.ndarray] = []
    while len(found) < frames:
        with av.open(str(paths[number % len(paths)])) as container:
            for frame in container.decode(video=0):
                found.append(frame.reformat(size, size, "rgb24").to_ndarray())
                if len(found) == frames:
                    break
        number += 1
    return np.stack(found)


def with_hvd(raw: Path, target: Path, codec: str) -> None:
    config = ConvertConfig((str(raw),), "me/set", root=str(target), codec=codec, workers=num_cores())
    convert(config)


def with_lerobot(raw: Path, target: Path, **options: bool) -> None:
    """As lerobot's documentation writes a dataset: add_frame, save_episode, finalize."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    robot = get_robot("r1")
    vector = {"dtype": "float32", "shape": (21,), "names": list(robot.action_names)}
    features = {"observation.state": vector, "action": vector}
    features |= {name: {"dtype": "bool", "shape": (1,), "names": None} for name in ("terminal", "truncated")}
    features["next.reward"] = {"dtype": "float32", "shape": (1,), "names": None}
    paths = recording_files(raw)
    with open_recording(RecordingRef(paths[0], "joylo"), robot) as recording:
        for camera in CAMERAS:
            shape = (*recording.image_size(camera), 3)
            names = ["height", "width", "channels"]
            features[f"observation.images.{camera}"] = {"dtype": "video", "shape": shape, "names": names}
    dataset = LeRobotDataset.create("me/set", 10, features, root=target, robot_type="r1", **options)
    for path in paths:
        with open_recording(RecordingRef(path, "joylo"), robot) as recording:
            state, actions, length = recording.state(), recording.actions(), recording.num_frames
            blocks = zip(*(recording.frames(camera) for camera in CAMERAS), strict=True)
            t = 0
            for block in blocks:
                for images in zip(*block, strict=True):
                    frame = {f"observation.images.{c}": image for c, image in zip(CAMERAS, images, strict=True)}
                    frame |= {"observation.state": state[t], "action": actions[t], "task": TASK}
                    frame["next.reward"] = np.array([t == length - 1], np.float32)
                    frame |= {"terminal": np.array([t == length - 1]), "truncated": np.array([False])}
                    dataset.add_frame(frame)
                    t += 1
        dataset.save_episode()
    dataset.finalize()


def measure(way: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds (all processes) of way(), whose chatter is swallowed."""

    def cpu() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        began, before = time.perf_counter(), cpu()
        way()
        return time.perf_counter() - began, cpu() - before
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def psnr(raw: Path, target: Path, frames: int) -> float:
    """Of every 10th frame of the head camera."""
    path = target / "videos/observation.images.head/chunk-000/file-000.mp4"
    files = recording_files(raw)
    values = []
    with av.open(str(path)) as container:
        for i, frame in enumerate(container.decode(video=0)):
            if i % 10 == 0:
                with h5py.File(files[i // frames]) as file:
                    images = file["obs/rgb/head/img"]
                    assert isinstance(images, h5py.Dataset)
                    truth = np.asarray(images[i % frames], np.float64)
                error = np.mean(np.square(frame.to_ndarray(format="rgb24") - truth))
                values.append(10 * np.log10(255**2 / max(error, 1e-9)))
    return float(np.mean(values))


if __name__ == "__main__":
    import lerobot.datasets.lerobot_dataset  # noqa: F401  (before any clock runs)

    sys.exit(main())
