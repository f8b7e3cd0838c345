"""Kills a real `hvd benchmark` at five random moments and compares its end with that of an undisturbed run, by hand:

    python -m tests.benchmarks.kill_benchmark FOLDER [SEED]

One task, one data seed, three policies, stages of 40 steps: about 6 CPU-minutes.
"""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

MATRIX = """
title = "killed"
config = "demo"
tasks = ["tote"]
data_seeds = [1]
rollouts = 10

[common]
"sim.num_optimal" = 3
"sim.num_mixed" = 9
"value.num_train_steps" = 40
"policy.num_train_steps" = 40

[policies.mixed]
"policy.weighting" = "none"

[policies.ratio]
"policy.extractor" = "filter"
"policy.score" = "ratio"

[policies.awr]
"policy.weighting" = "awr"
"""


def main(folder: Path, seed: int) -> None:
    """Print a line a kill and whether both tables are the same, byte for byte."""
    folder.mkdir(parents=True, exist_ok=True)
    matrix = folder / "matrix.toml"
    matrix.write_text(MATRIX)
    rng = random.Random(seed)
    started = time.monotonic()
    run(matrix, folder / "undisturbed")
    whole = time.monotonic() - started
    moments = sorted(rng.uniform(0, whole) for _ in range(5))
    for before, moment in zip([0.0, *moments], moments, strict=False):
        number = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        process = subprocess.Popen(command(matrix, folder / "killed"), stdout=subprocess.DEVNULL)
        time.sleep(moment - before)
        process.send_signal(number)
        print(f"{number.name} after {moment - before:.1f} s: exit code {process.wait()}", flush=True)
    run(matrix, folder / "killed")
    ours, theirs = ((folder / name / "results.parquet").read_bytes() for name in ("killed", "undisturbed"))
    print("the same table, byte for byte" if ours == theirs else "THE TABLES DIFFER", flush=True)
    sys.exit(ours != theirs)


def command(matrix: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "hvd.cli", "benchmark", str(matrix), "--out", str(out)]


def run(matrix: Path, out: Path) -> None:
    subprocess.run(command(matrix, out), check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
