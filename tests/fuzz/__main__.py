"""python -m tests.fuzz [--door NAME] [--inputs N] [--seconds S] [--seed N]: damaged inputs for each reader, counted.

An input ends as "accepted", "line" (an error of one line), or wrongly: "wrong" (accepted with another value than an
oracle's), "traceback", "hang" (20 s), "memory" (2 GB), "crash". Exit code 1 when any ended wrongly; the input of each
kind that did is printed with the seed that makes it again.
"""

import argparse
import sys

from tests.fuzz.doors import DOORS
from tests.fuzz.harness import WRONGLY, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--door", action="append", choices=sorted(DOORS), help="may be repeated; all without it")
    parser.add_argument("--inputs", type=int, default=10_000, help="of each door")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each door at most")
    parser.add_argument("--seed", type=int, default=0, help="of the first input; those that follow have the next ones")
    options = parser.parse_args()
    bad = 0
    for name in options.door or DOORS:
        tally, examples = run(name, options.inputs, options.seconds, options.seed)
        print(f"{name}: " + ", ".join(f"{count} {end}" for end, count in sorted(tally.items())), flush=True)
        for place, example in examples.items():
            print(f"  {place}: {example}", flush=True)
        bad += sum(tally[end] for end in WRONGLY)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
