"""Start-up, norm stats and conversion of another checkout and of this one, in turns on the same cores.

    python -m tests.benchmarks.side_by_side OLD [--rounds 3] [--folder DIR]

OLD: a checkout with an environment of its own (`uv sync --extra lerobot` there, and here). Wall and CPU milliseconds,
children included, least and median of the rounds. Norm stats: the median of 15 copies of bench_loader's AV1 dataset
that no cache knows, after a first one, in one process. Conversion: bench_convert's recordings of 4 and 16 episodes.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.bench_convert import write_recordings
from tests.benchmarks.bench_loader import write

HERE = Path(__file__).parents[2]
HELPS = ("", "train-value", "export", "norm-stats", "convert", "report", "jobs")
DRY_RUN = ["launch/submit.py", "--stage", "value", "--config", "demo", "--dry-run"]
NORM_STATS = """
import statistics, sys, tempfile, time
from pathlib import Path
from tests.benchmarks.bench_norm_stats import linked, ours
def once():
    with tempfile.TemporaryDirectory() as folder:
        data = linked(Path(sys.argv[1]), Path(folder) / "data")
        begin, cpu = time.perf_counter(), time.process_time()
        ours(data, Path(folder) / "assets")
        return time.perf_counter() - begin, time.process_time() - cpu
found = [once() for _ in range(16)][1:]
print(*map(statistics.median, zip(*found)))
"""
CONVERT = """
import sys, tempfile
from pathlib import Path
from tests.benchmarks.bench_convert import measure, with_hvd
with tempfile.TemporaryDirectory() as folder:
    print()
    found = measure(lambda: with_hvd(Path(sys.argv[1]), Path(folder) / "set", sys.argv[2]))
    print(*found)
"""


def cases(folder: Path) -> dict[str, tuple[list[str], bool]]:
    """Name -> arguments of Python, and whether its last line is (wall, CPU) seconds; else the whole process counts."""
    data = folder / "av1"
    if not data.exists():
        write(data, "av1", 3, 6, 200)
    found = {
        " ".join(f"hvd {step} --help".split()): (["-m", "hvd.cli", *step.split(), "--help"], False) for step in HELPS
    }
    found[" ".join(DRY_RUN)] = DRY_RUN, False
    found["norm stats, 1,200 frames"] = ["-c", NORM_STATS, str(data)], True
    for episodes, codec in ((4, "h264"), (16, "h264"), (4, "av1")):
        raw = folder / f"raw-{episodes}"
        if not raw.exists():
            write_recordings(raw, episodes, 150, 224)
        found[f"conversion, {450 * episodes} frames, {codec}"] = ["-c", CONVERT, str(raw), codec], True
    return found


def run(checkout: Path, arguments: list[str], says: bool) -> tuple[float, float]:
    """Wall and CPU seconds."""

    def cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    begin, before = time.perf_counter(), cpu()
    command = [str(checkout / ".venv" / "bin" / "python"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(arguments)[:200]} failed:\n{done.stderr[-2000:]}")
    wall, used = time.perf_counter() - begin, cpu() - before
    if says:
        wall, used = map(float, done.stdout.splitlines()[-1].split())
    return wall, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default="", help="datasets and recordings, kept here")
    args = parser.parse_args()
    sides = {"old": args.old.resolve(), "new": HERE}
    print("| command | side | wall ms, least | median | CPU ms, least | median |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for name, (arguments, says) in cases(Path(args.folder or temporary)).items():
            for checkout in sides.values():  # writes bytecode, fills the system's cache
                run(checkout, arguments, says)
            rounds = [{s: run(checkout, arguments, says) for s, checkout in sides.items()} for _ in range(args.rounds)]
            for side in sides:
                walls, cpus = zip(*(round[side] for round in rounds), strict=True)
                numbers = [f(x) for x in (walls, cpus) for f in (min, statistics.median)]
                print(f"| {name} | {side} | {' | '.join(f'{x * 1e3:,.0f}' for x in numbers)} |", flush=True)


if __name__ == "__main__":
    main()
