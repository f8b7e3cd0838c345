"""python -m tests.kills [--count N] [--seed N] [--commands NAME...] [--workers N] [--results FILE] [--keep FOLDER]

SIGKILL, SIGTERM, SIGINT and SIGUSR1, to the process or to its group, reach each command of a tiny experiment at random
moments between its start and its end, up to five times; then the same command runs to its end. After each signal no
process may be left, nor a file that says that it is whole and is not; the end must be what an undisturbed command
leaves, bit for bit, without temporary files. Exit code 1 when something was otherwise.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hvd.files import JsonLines
from tests.kills.commands import COMMANDS
from tests.kills.strikes import Found, Round, Strikes

MOST = 5  # signals until a command may end


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500, help="signals, shared by the commands")
    parser.add_argument("--seed", type=int, default=0, help="of the kinds of signals and their moments")
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS), help="all without it")
    parser.add_argument("--workers", type=int, default=1, help="commands that are struck side by side")
    parser.add_argument("--results", type=Path, help="lines of JSON: rounds that are in it are not played again")
    parser.add_argument(
        "--keep", type=Path, help="folder to work in, which keeps the world of each round that went wrong"
    )
    options = parser.parse_args()
    tickets = _tickets(options.commands, options.count, options.seed)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kills-")))
        folder.mkdir(parents=True, exist_ok=True)
        results = JsonLines(options.results or folder / "results.jsonl")
        stack.callback(results.close)
        stack.enter_context(_store())
        found = [Found(**line) for line in results.records()]
        there = {(each.command, each.number) for each in found}
        strikes = Strikes(folder, options.seed)
        strikes.prepare(max(options.commands, key=list(COMMANDS).index))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(options.workers))
        rounds = [pool.submit(strikes.play, each) for each in tickets if (each.command, each.number) not in there]
        stack.callback(lambda: [each.cancel() for each in rounds])
        for each in concurrent.futures.as_completed(rounds):
            results.write(dataclasses.asdict(each.result()))
            found.append(each.result())
            for text in each.result().problems:
                print(f"{each.result().command} {each.result().number}: {text}", flush=True)
    print(_table(found, strikes.usual))
    return 1 if any(each.problems for each in found) else 0


def _tickets(names: list[str], count: int, seed: int) -> list[Round]:
    """Rounds of one to MOST signals, the commands by turns, with `count` signals in all."""
    rng, tickets, left = random.Random(seed), list[Round](), count
    given, rounds = dict.fromkeys(names, 0), collections.Counter[str]()
    while left:
        name = min(names, key=given.__getitem__)
        signals = min(left, rng.randint(1, MOST), max(1, -(-count // len(names)) - given[name]))
        tickets.append(Round(name, rounds[name], signals))
        rounds[name] += 1
        given[name] += signals
        left -= signals
    return tickets


def _table(found: list[Found], usual: dict[str, float]) -> str:
    lines = [f"{'command':<14}{'signals':>8}{'ends':>6}{'wrong':>6}{'usual s':>9}{'struck after s':>16}{'s':>7}"]
    for name in (*COMMANDS, "all"):
        mine = [each for each in found if name in (each.command, "all")]
        if mine:
            moments = sorted(moment for each in mine for moment in each.moments) or [0.0]
            lines.append(
                f"{name:<14}{sum(f.signals for f in mine):>8}{sum(f.ends for f in mine):>6}"
                f"{sum(len(f.problems) for f in mine):>6}{usual.get(name, 0):>9.1f}"
                f"{f'{moments[0]:.1f} to {moments[-1]:.1f}':>16}{sum(f.seconds for f in mine):>7.0f}"
            )
    return "\n".join(lines)


@contextlib.contextmanager
def _store() -> Iterator[None]:
    """A slow object store on loopback, named by the environment, for what is fetched."""
    from tests.storage.servers import Fault, google_put, google_server, noise, proxy_before

    files = {"params/a": noise(3 << 20, 1), "params/b": noise(70_001, 2), "params/c/small": b"small"}
    with google_server() as address, proxy_before(*address) as proxy:
        google_put(address, files)
        proxy.fault = lambda request, n: Fault(slow_s=0.01)
        os.environ["STORAGE_EMULATOR_HOST"] = proxy.address
        yield


if __name__ == "__main__":
    os.environ["PYTHONWARNINGS"] = "ignore:resource_tracker"  # killed commands leave semaphores to it
    sys.exit(main())
