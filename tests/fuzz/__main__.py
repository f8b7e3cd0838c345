"""python -m tests.fuzz [--doors NAME...] [--inputs N] [--seconds S] [--seed N] [--jobs N] [--workers N] [--keep FOLDER]

Gives each reader damaged inputs, and counts what becomes of them.

An input ends as "same" (accepted, with the numbers that the file holds), "refused" (an error of one line), or wrongly:
"wrong" (accepted with other numbers), "traceback", "hang" (20 s), "memory" (2 GB), "crash". Exit code 1 when any ended
wrongly; of each kind one is printed with the command that makes it again.
"""

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # a process with threads must not fork

from tests.fuzz.doors import DOORS
from tests.fuzz.harness import WRONGLY, run_shared


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--doors", nargs="+", choices=sorted(DOORS), help="all without it")
    parser.add_argument("--inputs", type=int, default=10_000, help="of each door")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each door at most")
    parser.add_argument("--seed", type=int, default=0, help="of the first input; those that follow have the next ones")
    parser.add_argument("--jobs", type=int, default=1, help="doors at once")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the inputs of a door")
    parser.add_argument("--keep", type=Path, help="folder for the files of each input that ended wrongly")
    options = parser.parse_args()
    names = options.doors or list(DOORS)
    print(f"{'door':<11}{'inputs':>7}{'refused':>8}{'same':>7}{'wrongly':>8}{'s':>6}{'MB':>6}", flush=True)
    lanes = [names[i :: options.jobs] for i in range(options.jobs)]
    pids = [_started(lane, options) for lane in lanes]
    return 1 if sum(os.waitpid(pid, 0)[1] for pid in pids) else 0


def _started(lane: list[str], options: argparse.Namespace) -> int:
    with warnings.catch_warnings():  # of a thread: it is that of pyarrow's allocator
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        bad = 1
        try:
            bad = sum(_door(name, options) for name in lane)
        finally:
            os._exit(1 if bad else 0)
    return pid


def _door(name: str, options: argparse.Namespace) -> int:
    """A line for one door; how many inputs ended wrongly."""
    begin = time.monotonic()
    tally = run_shared(name, options.inputs, options.seconds, options.seed, options.keep, options.workers)
    ends, bad = tally.ends, sum(tally.ends[end] for end in WRONGLY)
    seconds = time.monotonic() - begin
    row = f"{name:<11}{ends.total():>7}{ends['refused']:>8}{ends['same']:>7}{bad:>8}{seconds:>6.0f}{tally.peak:>6}"
    found = [f"  {ends[place.split()[0]]} x {place}: {example}" for place, example in tally.examples.items()]
    print("\n".join([row, *found]), flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
