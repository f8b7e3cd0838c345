"""hvd jobs [list | logs ID | cancel ID | wait ID]: the jobs that launch/submit.py handed to a cluster.

Which cluster an id belongs to is told by its form (hvd.clusters.base.owner_of).
"""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from hvd import overrides
from hvd.clusters import base
from hvd.errors import EXIT_COMPLETE, EXIT_FAILED, UserError, nearest
from hvd.fields import NOT_NEGATIVE, between, option
from hvd.jobs import listing

_DAYS = 7


@dataclass(frozen=True)
class List:
    """Jobs that have not ended, and those that have within a week. Steps, rate, time left and checkpoint are the run
    folder's."""

    all: bool = option(False, "those that ended earlier, too")
    json: bool = option(False, "print them as a JSON list")
    jobs_dir: str = option("", f"where the folders of Slurm's jobs are (default: ${base.JOBS_DIR}, else slurm/jobs)")


@dataclass(frozen=True)
class One:
    """A job: `id` is Slurm's number, or the name of a Kubernetes Job (of kubectl's cluster and namespace)."""

    id: str = option("", "Slurm's number, or the name of a Kubernetes Job (of kubectl's cluster and namespace)")
    jobs_dir: str = option("", f"where the folders of Slurm's jobs are (default: ${base.JOBS_DIR}, else slurm/jobs)")


@dataclass(frozen=True)
class Logs(One):
    """The end of the job's log."""

    follow: bool = option(False, "-f: until the job has ended")
    lines: int = option(200, NOT_NEGATIVE, "-n: so many; 0 = all of it")


@dataclass(frozen=True)
class Cancel(One):
    """Cancel the job and those that wait for it, after asking."""

    yes: bool = option(False, "-y: without asking")


@dataclass(frozen=True)
class Wait(One):
    """Wait until the job has ended for good, and end with its exit code. A job that is requeued has not ended.

    The code is 1 for a job that was cancelled, ran out of time or lost its node, and 124 after --timeout.
    """

    timeout: float = option(-1.0, between(-1, 1e9), "seconds; -1 = for ever")


COMMANDS = {"list": List(), "logs": Logs(), "cancel": Cancel(), "wait": Wait()}
_PLACE = ("--kubernetes.namespace", "--kubernetes.context")
_SHORT = {"-f": "--follow", "-n": "--lines", "-y": "--yes"}


def main(argv: Sequence[str]) -> int:
    """`hvd jobs ...`; returns its exit code."""
    argv, place = _placed(argv)
    words = [*argv[2:], *argv[:2]] if argv[:1] == ["--jobs-dir"] else list(argv)
    name = words.pop(0) if words and not words[0].startswith("-") else "list"
    if overrides.asks_help(argv) or name == "help":
        print_help(name if argv and argv[0] in COMMANDS else "")
        return EXIT_COMPLETE
    if name not in COMMANDS:
        raise UserError(f"hvd jobs: unknown command {name!r}{nearest(name, COMMANDS)}")
    if name == "list":
        listed = overrides.parse(List(), words)
        return show(listed.jobs_dir, place, everything=listed.all, as_json=listed.json)
    options = overrides.parse(COMMANDS[name], words, positional="id", short=_SHORT)
    assert isinstance(options, One)
    if not options.id:
        raise UserError(f"hvd jobs {name} ID: the id is missing (`hvd jobs` lists them)")
    cluster = base.owner_of(options.id, options.jobs_dir, place)
    match options:
        case Cancel():
            return cancel(cluster, options.id, yes=options.yes)
        case Logs():
            return cluster.logs(options.id, options.lines, options.follow)
        case Wait():
            return cluster.wait(options.id, None if options.timeout < 0 else options.timeout)
    raise AssertionError(name)


def _placed(argv: Sequence[str]) -> tuple[list[str], list[overrides.Flag]]:
    """(the other words, the flags that say in which cluster and namespace of Kubernetes to look)."""
    words, place, rest = [], [], iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in _PLACE:
            given = value if equals else next(rest, "")
            place += overrides.split_flags([name, given] if given else [name])
        else:
            words.append(word)
    return words, place


def print_help(name: str) -> None:
    """Of one command, or ("") what there is."""
    if name:
        usage = f"hvd jobs {name}" + ("" if name == "list" else " ID")
        overrides.print_help(usage, inspect.getdoc(COMMANDS[name]) or "", COMMANDS[name])
        return
    print("usage: hvd jobs [list] | logs ID | cancel ID | wait ID\n")
    for command, options in COMMANDS.items():
        print(f"  {command:<7} {(inspect.getdoc(options) or '').replace('\n', ' ').split('. ')[0].rstrip('.')}")
    print(
        "\nhvd jobs COMMAND --help lists its options. On Kubernetes each takes --kubernetes.namespace and .context too."
    )


def show(jobs_dir: str, place: Sequence[overrides.Flag], *, everything: bool, as_json: bool) -> int:
    """The table, or the JSON list, of all clusters' jobs."""
    rows, older = _states(jobs_dir, place, None if everything else _DAYS)
    if as_json:
        print(listing.as_json(rows))
    elif rows:
        print(listing.as_table(rows))
    elif older:
        print(f"no job is queued, runs or has ended within {_DAYS} days; --all shows {older} older")
    else:
        folder = base.jobs_folder(jobs_dir)
        print(f"no jobs in {folder}; --jobs-dir or ${base.JOBS_DIR} name another folder")
    return EXIT_COMPLETE


def _states(jobs_dir: str, place: Sequence[overrides.Flag], days: float | None) -> tuple[list[base.JobState], int]:
    """Of every cluster that is used, and how many jobs are older; a cluster that does not answer is said."""
    rows: list[base.JobState] = []
    older = 0
    for name in base.names():
        try:
            shown, left_out = base.get(name, place, jobs_dir).states(days)
            rows, older = rows + shown, older + left_out
        except base.Unreachable as error:
            print(f"{name}: {error}", file=sys.stderr)
    return rows, older


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
