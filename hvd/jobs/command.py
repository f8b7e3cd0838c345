"""hvd jobs [list | logs ID | cancel ID | wait ID]: the jobs that launch/submit.py handed to a cluster.

Those of Slurm have a number and are found by the folder that each of them has in slurm/jobs (hvd.jobs.registry). Those
of Kubernetes have a name and are found by their label (hvd.clusters.kubernetes.queue).
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from hvd.clusters.kubernetes import queue as kubernetes
from hvd.clusters.slurm import queue as slurm
from hvd.clusters.slurm.queue import Queued, Unreachable
from hvd.errors import EXIT_COMPLETE, EXIT_FAILED, UserError, nearest
from hvd.jobs import listing, registry, watch
from hvd.jobs.registry import Job
from hvd.jobs.state import describe, from_folders, look

COMMANDS = ("list", "logs", "cancel", "wait")
_DAYS = 7
_LINES = 200
_NAMED = 12
_PREFIX = "hvd-"  # of the names of our jobs at Slurm


def main(argv: Sequence[str]) -> int:
    """`hvd jobs ...`; returns its exit code."""
    if "-h" in argv or "--help" in argv or argv[:1] == ["help"]:
        print(usage())
        return EXIT_COMPLETE
    given, rest = take_jobs_dir(argv)
    jobs = registry.folder(given)
    if rest and not rest[0].startswith("-") and rest[0] not in COMMANDS:
        raise UserError(f"hvd jobs: unknown command {rest[0]!r}{nearest(rest[0], COMMANDS)}")
    command, *rest = rest if rest and rest[0] in COMMANDS else ["list", *rest]
    parser = _Parser(prog=f"hvd jobs {command}", add_help=False, allow_abbrev=False)
    if command == "list":
        parser.add_argument("--all", action="store_true")
        parser.add_argument("--json", action="store_true")
        options = parser.parse_args(rest)
        return show(jobs, everything=options.all, as_json=options.json)
    parser.add_argument("id")
    if command == "logs":
        parser.add_argument("-f", "--follow", action="store_true")
        parser.add_argument("-n", "--lines", type=_count, default=_LINES)
    elif command == "cancel":
        parser.add_argument("-y", "--yes", action="store_true")
    else:
        parser.add_argument("--timeout", type=_seconds)
    options = parser.parse_args(rest)
    if kubernetes.is_name(options.id):
        return on_kubernetes(command, options)
    if command == "cancel":
        return cancel(jobs, checked_id(options.id), yes=options.yes)
    job = checked_id(options.id)
    check_known(jobs, job)
    if command == "logs":
        return watch.logs(jobs, job, options.lines, options.follow)
    return watch.wait(jobs, job, options.timeout)


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
  --jobs-dir PATH  where the folders of Slurm's jobs are (default: ${registry.JOBS_DIR}, else slurm/jobs)"""


def on_kubernetes(command: str, options: argparse.Namespace) -> int:
    """logs, wait or cancel for a Job of Kubernetes."""
    name = options.id
    if command == "logs":
        return kubernetes.logs(name, options.lines, options.follow)
    if command == "wait":
        code = kubernetes.wait(name, options.timeout)
        if code is None:
            print(f"Job {name} has not ended within {options.timeout:g} s; it is left alone", file=sys.stderr)
        return watch.EXIT_TIMEOUT if code is None else code
    found = kubernetes.find()
    kubernetes.one(name, found)
    names = kubernetes.doomed(found, name)
    for number, one in enumerate(names):
        print(f"{'  and with it,' if number else 'delete Job'} {one}  {found[one].state}  {found[one].stage}")
    if not options.yes and not _confirmed(len(names)):
        print("nothing is cancelled")
        return EXIT_FAILED
    kubernetes.delete(reversed(names))
    print(f"deleted {', '.join(names)}; their pods save before they end")
    return EXIT_COMPLETE


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
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value


# -------------------------------------------------------------------------------------------------------------- which


def checked_id(text: str) -> str:
    """A job id as Slurm writes it."""
    if not registry.is_id(text):
        raise UserError(f"{text!r} is no job id: it is a number, such as 123 (`hvd jobs` lists them)")
    return str(int(text))


def check_known(jobs: Path, job: str) -> None:
    """UserError for an id that has no folder and that Slurm does not know either."""
    known = registry.ids(jobs)
    if job in known:
        return
    try:
        found = slurm.states([job])
    except Unreachable as error:
        raise UserError(f"{_unknown(jobs, job, known)} ({error})") from None
    if not found:
        raise UserError(_unknown(jobs, job, known))


def _unknown(jobs: Path, job: str, known: Sequence[str]) -> str:
    if not known:
        return f"no job {job}, nor any other, in {jobs}"
    more = f" and {len(known) - _NAMED} older ones" if len(known) > _NAMED else ""
    return f"no job {job} in {jobs}; known: {', '.join(known[: -_NAMED - 1 : -1])}{more}"


def _read(jobs: Path, job: str, queued: Queued | None) -> Job:
    """What the folder says, else what Slurm's queue does: a job of plain sbatch has no folder before it starts."""
    found = registry.read(jobs, job)
    if queued is None or found.stage or found.name:
        return found
    stage = queued.name.removeprefix(_PREFIX)
    return dataclasses.replace(found, name=queued.name, stage=stage if queued.name.startswith(_PREFIX) else "")


# --------------------------------------------------------------------------------------------------------------- list


def show(jobs: Path, *, everything: bool, as_json: bool) -> int:
    """The table, or the JSON list."""
    queued, error = _queue()
    known = registry.ids(jobs)
    here = str(registry.base(jobs))
    ours = [one.id for one in queued.values() if one.name.startswith(_PREFIX) and one.folder == here]
    found = [_read(jobs, job, queued.get(job)) for job in sorted({*known, *ours}, key=int)]
    if error is None:
        states, error = look(found)
    else:
        states = from_folders(found, {})
    if error is not None and found:
        print(f"{error}; states are what the jobs' folders say", file=sys.stderr)
    rows = [
        listing.row(job, states[job.id], queued.get(job.id))
        for job in found
        if everything or not states[job.id].ended or listing.recent(registry.last_sign(jobs, job), _DAYS)
    ]
    rows += _on_kubernetes(everything)
    if as_json:
        print(listing.as_json(rows))
    elif rows:
        print(listing.as_table(rows))
    elif found:
        print(f"no job in {jobs} lives or has ended within {_DAYS} days; --all shows {len(found)} older")
    else:
        print(f"no jobs in {jobs}; --jobs-dir or ${registry.JOBS_DIR} name another folder")
    return EXIT_COMPLETE


def _on_kubernetes(everything: bool) -> list[listing.Row]:
    """Rows of Kubernetes' Jobs, where kubectl knows a cluster; one that does not answer is said."""
    if not kubernetes.available():
        return []
    try:
        found = kubernetes.find()
    except kubernetes.Silent as error:
        print(f"Kubernetes: {error}", file=sys.stderr)
        return []
    return kubernetes.rows({name: job for name, job in found.items() if everything or kubernetes.recent(job, _DAYS)})


def _queue() -> tuple[dict[str, Queued], Unreachable | None]:
    try:
        return {one.id: one for one in slurm.queue()}, None
    except Unreachable as error:
        return {}, error


# ------------------------------------------------------------------------------------------------------------- cancel


@dataclass(frozen=True)
class Doomed:
    """A job that is to be cancelled; `depth` jobs wait one for the other up to it."""

    job: Job
    state: str
    depth: int


def cancel(jobs: Path, job: str, *, yes: bool) -> int:
    """Cancel the job and all that wait for it, those first; asks before."""
    check_known(jobs, job)
    queued = {one.id: one for one in slurm.queue()}
    chain = doomed(jobs, job, queued)
    if job not in queued:
        states, error = look([chain[0].job])
        if error is not None:
            raise error
        if states[job].ended:
            waiting = ", ".join(one.job.id for one in chain[1:])
            left = f"; waiting for it still, and not cancelled: {waiting}" if waiting else ""
            raise UserError(f"job {job} has ended ({describe(states[job])}): there is nothing to cancel{left}")
    for one in chain:
        about = "  ".join(text for text in (one.state, one.job.stage or one.job.name, one.job.experiment) if text)
        print(f"{'cancel' if one.depth == 0 else '  and, waiting for it,'} {one.job.id}  {about}")
    if not yes and not _confirmed(len(chain)):
        print("nothing is cancelled")
        return EXIT_FAILED
    order = [one.job.id for one in sorted(chain, key=lambda one: -one.depth)]
    slurm.cancel(order)
    print(f"cancelled {', '.join(order)}")
    return EXIT_COMPLETE


def doomed(jobs: Path, job: str, queued: dict[str, Queued]) -> list[Doomed]:
    """The job and, of those in the queue, all that wait for it or for one that does.

    A job's depth is that of the longest way to it: whoever waits for another is deeper than that one.
    """
    waits = {
        one.id: {*one.after, *(registry.read(jobs, one.id).after if one.state == "PENDING" else ())}
        for one in queued.values()
    }
    depths, grown = {job: 0}, True
    while grown and max(depths.values()) <= len(waits):  # a job.json that lies may close a circle
        grown = False
        for one, after in waits.items():
            depth = max((depths[other] + 1 for other in after if other in depths), default=0)
            if one != job and depth > depths.get(one, 0):
                depths[one], grown = depth, True
    return [
        Doomed(_read(jobs, one, queued.get(one)), queued[one].state if one in queued else "", depth)
        for one, depth in sorted(depths.items(), key=lambda item: item[1])
    ]


def _confirmed(number: int) -> bool:
    if not sys.stdin.isatty():
        raise UserError("hvd jobs cancel asks before it cancels, and there is no terminal to answer at: add --yes")
    try:
        answer = input(f"cancel {'it' if number == 1 else f'these {number} jobs'}? [y/N] ")
    except EOFError:
        answer = ""
    return answer.strip().lower() in ("y", "yes")
