"""Time of `hvd norm-stats` against passes over the same data that decode images, as openpi's script does.

    python -m tests.benchmarks.bench_norm_stats [--folder DIR] [--workers 2]

needs the extra `lerobot`. Rows: hvd on a dataset seen for the first time (it reads and hashes the data files) and again
(memory-mapped columns); LeRobot's reader with its DataLoader feeding the same statistics, on the dataset that
bench_loader writes (v3.0, AV1, 3 cameras); plain sequential decoding of every video, the least that any pass with
images costs, also on the real humanoid's recordings where they are there.
"""

import argparse
import contextlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hvd.configs import DataConfig, Experiment, KeyMap, ModelConfig
from hvd.data import normalize
from tests.benchmarks.bench_loader import CHUNK, cpu_seconds, lerobot_batches, write
from tests.folders import folder


def ours(data: Path, assets: Path) -> None:
    """The command itself."""
    config = DataConfig(repo_id="bench", root=str(data), keys=KeyMap(), reward="success_at_end")
    model = ModelConfig(action_horizon=CHUNK)
    with contextlib.redirect_stdout(io.StringIO()):
        normalize.main(Experiment(name="bench", robot="g1", assets_dir=str(assets), model=model, optimal_data=config))


def lerobot_pass(data: Path, frames: int, workers: int) -> None:
    """openpi's way: every sample of the training loader, images and all, for the numbers in it."""
    state, actions = normalize.RunningStats(), normalize.RunningStats()
    batches, batch = lerobot_batches(data, "av1", 3, workers, 32, "pyav"), 32
    for _ in range(frames // batch):
        item = next(batches)
        state.update(item["observation.state"].numpy())
        actions.update(item["action"].numpy().reshape(-1, item["action"].shape[-1]))
    batches.close()
    state.result(), actions.result()


def decode_pass(data: Path) -> None:
    """Only the decoding, file after file, with all cores."""
    import av

    for path in sorted(data.glob("videos/**/*.mp4")):
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "AUTO"
            for frame in container.decode(video=0):
                frame.to_ndarray(format="rgb24")


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds, workers included."""
    begin, cpu = time.perf_counter(), cpu_seconds()
    call()
    return time.perf_counter() - begin, cpu_seconds() - cpu


def linked(data: Path, to: Path) -> Path:
    """The dataset without a cache, and without touching its folder."""
    to.mkdir()
    for name in ("meta", "data", "videos"):
        os.symlink((data / name).resolve(), to / name)
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="", help="datasets of bench_loader, kept here")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print(
        "| dataset | frames | pass | seconds | CPU-s | times hvd's first run (wall, CPU) |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(args.folder or temporary) / "av1"
        if not place.exists():
            write(place, "av1", 3, 6, 200)
        g1 = folder("HVD_G1_DATA")
        for name, data in (("3 cameras 224x224", place), ("G1, 1 camera 640x480", g1)):
            if data is None:
                continue
            copy = linked(data, Path(temporary) / f"copy-{name[:2]}")
            tables = sorted(copy.glob("data/**/*.parquet"))
            frames = sum(np.int64(_rows(path)) for path in tables)
            rows = {"hvd, first run": timed(lambda c=copy: ours(c, Path(temporary) / "assets"))}
            rows["hvd, again"] = timed(lambda c=copy: ours(c, Path(temporary) / "assets"))
            rows["decoding every frame"] = timed(lambda c=copy: decode_pass(c))
            if data == place:
                rows["LeRobot's reader"] = timed(lambda d=data, n=int(frames): lerobot_pass(d, n, args.workers))
            first = rows["hvd, first run"]
            for what, (wall, cpu) in rows.items():
                ratio = "" if what.startswith("hvd") else f"{wall / first[0]:,.0f}x, {cpu / first[1]:,.0f}x"
                print(f"| {name} | {frames} | {what} | {wall:.3f} | {cpu:.3f} | {ratio} |")
            shutil.rmtree(copy)


def _rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return pq.read_metadata(path).num_rows


if __name__ == "__main__":
    main()
