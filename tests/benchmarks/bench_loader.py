"""Samples per second of the loader against LeRobot's own reader, on the same dataset, cores and number of workers.

    python -m tests.benchmarks.bench_loader [--cameras 3] [--workers 2] [--seconds 15] [--folder DIR]

needs the extra `lerobot`. A sample is the state, a chunk of 20 actions and the current image of each camera at 224x224.
LeRobot writes the datasets, as it does by default (PNG in parquet; AV1, a keyframe in two frames) and with the codec of
`hvd convert` (H.264). LeRobot reads through a shuffled torch DataLoader with delta_timestamps for the 20 actions and
uint8 images (its fastest); hvd reads through its Loader, and in one row also the next observation's images, which the
value stage needs. Every reader runs in its own process; CPU seconds include its workers.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.folders import folder

SIZE, FPS, CHUNK, DIMS = 224, 30, 20, 26
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
KINDS = ("image", "av1", "h264")


def source_frames(count: int) -> np.ndarray:
    """uint8 [count,240,320,3]: the real humanoid's camera where it is there, else a drifting texture."""
    import av
    from PIL import Image

    data = folder("HVD_G1_DATA")
    if data is None:
        texture = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
        big = np.asarray(Image.fromarray(texture).resize((320, 240), Image.Resampling.BICUBIC))
        return np.stack([np.roll(big, (i, 2 * i), (0, 1)) for i in range(count)])
    frames: list[np.ndarray] = []
    for path in sorted(data.glob("videos/**/*.mp4")):
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                frames.append(frame.reformat(320, 240, "rgb24").to_ndarray())
                if len(frames) == count:
                    return np.stack(frames)
    return np.stack(frames)


def write(root: Path, kind: str, cameras: int, episodes: int, length: int) -> None:
    """The same dataset of real frames (crops of one camera) as LeRobot writes it."""
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dtype = "image" if kind == "image" else "video"
    features: dict[str, Any] = {
        name: {"dtype": "float32", "shape": (DIMS,), "names": None} for name in ("observation.state", "action")
    }
    keys = [f"observation.images.cam{i}" for i in range(cameras)]
    features |= {k: {"dtype": dtype, "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]} for k in keys}
    h264 = RGBEncoderConfig(vcodec="h264", preset="ultrafast", crf=20, g=2)
    dataset = LeRobotDataset.create(
        f"bench/{kind}",
        FPS,
        features,
        root=root,
        use_videos=dtype == "video",
        image_writer_threads=4,
        rgb_encoder=h264 if kind == "h264" else None,
    )
    frames = source_frames(episodes * length)
    rng = np.random.default_rng(0)
    for episode in range(episodes):
        for i in range(length):
            picture = frames[episode * length + i]
            crops = {k: np.ascontiguousarray(picture[:SIZE, 40 * n : 40 * n + SIZE]) for n, k in enumerate(keys)}
            numbers = {k: rng.normal(size=DIMS).astype(np.float32) for k in ("observation.state", "action")}
            dataset.add_frame({**numbers, **crops, "task": "pick up the bottle"})
        dataset.save_episode()
    dataset.finalize()


def lerobot_batches(root: Path, kind: str, cameras: int, workers: int, batch: int, backend: str):
    import torch
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset(
        f"bench/{kind}",
        root=root,
        delta_timestamps={"action": [i / FPS for i in range(CHUNK)]},
        video_backend=None if backend == "-" else backend,
        return_uint8=True,
    )
    while True:
        loader = torch.utils.data.DataLoader(
            dataset, batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=False
        )
        for item in loader:
            assert item["action"].shape == (batch, CHUNK, DIMS)
            assert item["observation.images.cam0"].shape[0] == batch
            yield item


def hvd_batches(root: Path, kind: str, cameras: int, workers: int, batch: int, backend: str):
    from hvd.configs import DataConfig, KeyMap, ModelConfig, NormConfig
    from hvd.data import normalize
    from hvd.data.dataset import Dataset
    from hvd.data.loader import Loader, SampleSpec, Source
    from hvd.data.tokenizer import Tokenizer
    from hvd.data.transforms import InputTransform
    from hvd.robots import get_robot

    names = () if backend == "numbers" else CAMERAS[:cameras]
    model = ModelConfig(tokenizer="words", cameras=names, image_size=SIZE, action_horizon=CHUNK)
    keys = KeyMap(images={c: f"observation.images.cam{i}" for i, c in enumerate(names)})
    config = DataConfig(repo_id=f"bench/{kind}", root=str(root), keys=keys, reward="success_at_end")
    dataset = Dataset.open(config, cameras=names, robot="g1", horizon=CHUNK)
    robot, norm = get_robot("g1"), NormConfig()
    transform = InputTransform(model, norm, robot, normalize.compute([dataset], norm, robot, CHUNK), Tokenizer(model))
    spec = SampleSpec(
        transform, next_images="true" if backend == "next" else "none", image_cache=backend.startswith("cache")
    )
    with Loader([Source(dataset, dataset.rows(), batch)], spec, batch, seed=0, num_workers=workers) as loader:
        for _, item in loader:
            yield item


def ffmpeg_of_pyav(links: Path) -> dict[str, str]:
    """The environment in which torchcodec finds an FFmpeg: it brings none, PyAV does, under names of its own."""
    import av

    libraries = Path(av.__file__).parent.parent / "av.libs"
    links.mkdir(exist_ok=True)
    for library in libraries.glob("*.so*"):
        plain = re.sub(r"-[0-9a-f]{8}(\.so\.\d+)[.\d]*$", r"\1", library.name)
        for name in {library.name, plain}:
            if not (links / name).exists():
                (links / name).symlink_to(library)
    return os.environ | {"LD_LIBRARY_PATH": f"{links}:{sysconfig.get_config_var('LIBDIR')}", "HF_HUB_OFFLINE": "1"}


READERS = {"lerobot": lerobot_batches, "hvd": hvd_batches}


def cpu_seconds() -> float:
    """CPU time of this process and its children, living ones included."""
    me = psutil.Process()
    own = me.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in me.children(recursive=True):
        times = child.cpu_times()
        total += times.user + times.system
    return total


def measure(reader: str, backend: str, root: Path, kind: str, cameras: int, workers: int, batch: int, seconds: float):
    batches = READERS[reader](root, kind, cameras, workers, batch, backend)
    for _ in range(3):
        next(batches)
    samples, begin, cpu = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - begin < seconds:
        next(batches)
        samples += batch
    wall, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    batches.close()
    return {"samples_per_s": samples / wall, "samples_per_cpu_s": samples / cpu}


ROWS = (
    ("image", "lerobot", "-"),
    ("image", "hvd", "decode"),
    ("image", "hvd", "next"),
    ("image", "hvd", "cache"),
    ("av1", "lerobot", "pyav"),
    ("av1", "lerobot", "torchcodec"),
    ("av1", "hvd", "decode"),
    ("av1", "hvd", "next"),
    ("av1", "hvd", "cache"),
    ("h264", "lerobot", "pyav"),
    ("h264", "lerobot", "torchcodec"),
    ("h264", "hvd", "decode"),
    ("h264", "hvd", "next"),
    ("h264", "hvd", "cache"),
    ("image", "hvd", "numbers"),
)


def table(results: dict[tuple[str, str, str], dict[str, float]], goals: dict[str, float]) -> str:
    lines = [
        "| dataset | reader | samples/s | samples per CPU-s | CPU-ms per sample | times LeRobot's best (wall, CPU) |",
        "|---|---|---|---|---|---|",
    ]
    for (kind, reader, backend), r in results.items():
        best = [x for (k, name, _), x in results.items() if k == kind and name == "lerobot"]
        ratio = ""
        if reader == "hvd" and best and backend != "numbers":
            wall = r["samples_per_s"] / max(x["samples_per_s"] for x in best)
            cpu = r["samples_per_cpu_s"] / max(x["samples_per_cpu_s"] for x in best)
            goal = f" (goal {goals[kind]:g}x)" if backend == "decode" else ""
            ratio = f"{wall:.1f}x, {cpu:.1f}x{goal}"
        ms = 1e3 / r["samples_per_cpu_s"]
        kind = "any" if backend == "numbers" else kind
        name = f"{reader} {backend}".removesuffix(" -")
        lines.append(
            f"| {kind} | {name} | {r['samples_per_s']:,.0f} | {r['samples_per_cpu_s']:,.0f} | {ms:.2f} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cameras", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--episodes", type=int, default=6)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=1, help="all readers in turn, this often; the best counts")
    parser.add_argument("--folder", default="", help="keep the datasets here")
    parser.add_argument("--only", default="", help="only the rows that hold one of these words: av1,torchcodec")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, reader, backend = args.one
        root = Path(args.folder) / kind
        result = measure(reader, backend, root, kind, args.cameras, args.workers, args.batch, args.seconds)
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(args.folder or temporary)
        for kind in KINDS:
            if not (place / kind).exists():
                write(place / kind, kind, args.cameras, args.episodes, args.length)
        wanted = [r for r in ROWS if not args.only or set(r) & set(args.only.split(","))]
        results: dict[tuple[str, str, str], dict[str, float]] = {}
        environment = ffmpeg_of_pyav(Path(temporary) / "ffmpeg")
        for _ in range(args.rounds):
            for row in wanted:
                command = [sys.executable, "-m", "tests.benchmarks.bench_loader", "--folder", str(place), "--one", *row]
                for name in ("cameras", "workers", "batch", "seconds"):
                    command += [f"--{name}", str(getattr(args, name))]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                result = json.loads(done.stdout.splitlines()[-1])
                best = results.setdefault(row, result)
                results[row] = {k: max(v, best[k]) for k, v in result.items()}
                print(*row, results[row], file=sys.stderr)
        frames = args.episodes * args.length
        print(f"{args.cameras} cameras {SIZE}x{SIZE}, {frames} frames, {args.workers} workers, batch {args.batch}\n")
        print(table(results, {"image": 5.0, "av1": 2.0, "h264": 2.0}))


if __name__ == "__main__":
    main()
