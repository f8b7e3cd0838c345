"""hvd jobs [list | logs ID | cancel ID | wait ID]: the jobs that launch/submit.py handed to a cluster.

Which cluster an id belongs to is told by its form (hvd.clusters.base.owner_of).
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from hvd.clusters import base
from hvd.errors import EXIT_COMPLETE, EXIT_FAILED, UserError, nearest
from hvd.jobs import listing

COMMANDS = ("list", "logs", "cancel", "wait")
_DAYS = 7
_LINES = 200


def main(argv: Sequence[str]) -> int:
    """`hvd jobs ...`; returns its exit code."""
    if "-h" in argv or "--help" in argv or argv[:1] == ["help"]:
        print(usage())
        return EXIT_COMPLETE
    jobs_dir, rest = take_jobs_dir(argv)
    if rest and not rest[0].startswith("-") and rest[0] not in COMMANDS:
        raise UserError(f"hvd jobs: unknown command {rest[0]!r}{nearest(rest[0], COMMANDS)}")
    command, *rest = rest if rest and rest[0] in COMMANDS else ["list", *rest]
    parser = _Parser(prog=f"hvd jobs {command}", add_help=False, allow_abbrev=False)
    if command == "list":
        parser.add_argument("--all", action="store_true")
        parser.add_argument("--json", action="store_true")
        options = parser.parse_args(rest)
        return show(jobs_dir, everything=options.all, as_json=options.json)
    parser.add_argument("id")
    if command == "logs":
        parser.add_argument("-f", "--follow", action="store_true")
        parser.add_argument("-n", "--lines", type=_count, default=_LINES)
    elif command == "cancel":
        parser.add_argument("-y", "--yes", action="store_true")
    else:
        parser.add_argument("--timeout", type=_seconds)
    options = parser.parse_args(rest)
    cluster = base.owner_of(options.id, jobs_dir)
    if command == "cancel":
        return cancel(cluster, options.id, yes=options.yes)
    if command == "logs":
        return cluster.logs(options.id, options.lines, options.follow)
    return cluster.wait(options.id, options.timeout)


def usage() -> str:
    return f"""\
usage: hvd jobs [list] [--all] [--json]
       hvd jobs logs ID [-f] [-n LINES]
       hvd jobs cancel ID [--yes]
       hvd jobs wait ID [--timeout SECONDS]

  list    jobs that have not ended, and those that have within {_DAYS} days (--all: every one). Steps, rate, time left
          and checkpoint are the run folder's; --json prints them as a list
  logs    the last {_LINES} lines of the job's log (-n LINES; 0: all of it); -f follows it until the job has ended
  cancel  the job and those that wait for it, after asking (--yes: without)
  wait    until the job has ended for good; ends with its exit code, 1 for a job that was cancelled, ran out of time or
          lost its node, 124 after --timeout SECONDS. A job that is requeued has not ended

  ID is Slurm's number, or the name of a Kubernetes Job (of the cluster and namespace of kubectl's context)
  --jobs-dir PATH  where the folders of Slurm's jobs are (default: ${base.JOBS_DIR}, else slurm/jobs)"""


def take_jobs_dir(argv: Sequence[str]) -> tuple[str, list[str]]:
    """--jobs-dir, wherever it stands, and the other arguments."""
    given, rest = "", []
    left = list(argv)
    while left:
        arg = left.pop(0)
        name, equals, value = arg.partition("=")
        if name not in ("--jobs-dir", "--jobs_dir"):
            rest.append(arg)
            continue
        given = value if equals else left.pop(0) if left else ""
        if not given:
            raise UserError("--jobs-dir needs a folder")
    return given, rest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; `hvd jobs --help` shows how")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of lines")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def show(jobs_dir: str, *, everything: bool, as_json: bool) -> int:
    """The table, or the JSON list, of all clusters' jobs."""
    rows = _states(jobs_dir, None if everything else _DAYS)
    if as_json:
        print(listing.as_json(rows))
    elif rows:
        print(listing.as_table(rows))
    elif older := 0 if everything else len(_states(jobs_dir, None)):
        print(f"no job is queued, runs or has ended within {_DAYS} days; --all shows {older} older")
    else:
        folder = base.jobs_folder(jobs_dir)
        print(f"no jobs in {folder}; --jobs-dir or ${base.JOBS_DIR} name another folder")
    return EXIT_COMPLETE


def _states(jobs_dir: str, days: float | None) -> list[base.JobState]:
    """Of every cluster that is used; one that does not answer is said."""
    found: list[base.JobState] = []
    for name in base.names():
        try:
            found += base.get(name, jobs_dir=jobs_dir).states(days)
        except base.Unreachable as error:
            print(f"{name}: {error}", file=sys.stderr)
    return found


def cancel(cluster: base.Cluster, job: str, *, yes: bool) -> int:
    """Cancel the job and all that wait for it, those first; asks before."""
    jobs = cluster.dependents(job)
    for number, one in enumerate(jobs):
        about = "  ".join(text for text in (one.state, one.stage or one.name, one.experiment) if text)
        print(f"{'  and, waiting for it,' if number else 'cancel'} {one.id}  {about}")
    if not yes and not _confirmed(len(jobs)):
        print("nothing is cancelled")
        return EXIT_FAILED
    order = [one.id for one in reversed(jobs)]
    cluster.cancel(order)
    print(f"cancelled {', '.join(order)}")
    return EXIT_COMPLETE


def _confirmed(number: int) -> bool:
    if not sys.stdin.isatty():
        raise UserError("hvd jobs cancel asks before it cancels, and there is no terminal to answer at: add --yes")
    try:
        answer = input(f"cancel {'it' if number == 1 else f'these {number} jobs'}? [y/N] ")
    except EOFError:
        answer = ""
    return answer.strip().lower() in ("y", "yes")
