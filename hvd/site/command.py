"""hvd site check [--nodes N] [--config NAME] [--cluster NAME] [--slurm.NAME ...] [--kubernetes.NAME ...]

Tries a cluster by one small job with the flags and site files of the launcher, before anything expensive is queued.
"""

import contextlib
import importlib
import inspect
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from hvd import overrides
from hvd.clusters import base
from hvd.clusters.base import JobState
from hvd.errors import EXIT_COMPLETE, EXIT_FAILED, Failed, UserError
from hvd.launch import submit
from hvd.site import findings
from hvd.site.findings import Asked, Finding, Report, Seen
from hvd.site.options import CLUSTERS, Check, Probe

_POLL_S = 0.5
_WORK_S = 600  # that the job may run


@runtime_checkable
class Trial(Protocol):
    """The small job at one cluster."""

    asked: Asked

    def queue(self) -> str:
        """What the cluster says to a job like a training's, in words. UserError: it refuses; Failed: no answer."""
        ...

    def start(self) -> None: ...

    def state(self) -> JobState: ...

    def reports(self) -> list[Report]:
        """What its processes have reported so far."""
        ...

    def last_words(self) -> str:
        """The last line of its log."""
        ...

    def images(self) -> dict[str, str]:
        """Node -> the image that runs there; {} where the cluster does not tell."""
        ...

    def remove(self) -> None:
        """End the job, where it was begun, and delete all that it has left."""
        ...


def main(argv: Sequence[str]) -> int:
    """`hvd site ...`; returns its exit code."""
    name, *rest = argv or ["help"]
    if name == "probe" and not overrides.asks_help(argv):
        from hvd.site import probe

        asked = overrides.parse(Probe(), rest)
        probe.Probe(Path(asked.folder), asked.patience).run()
        return EXIT_COMPLETE
    if name in ("help", "-h", "--help") or (name == "check" and overrides.asks_help(rest)):
        overrides.print_help("hvd site check", inspect.getdoc(Check) or "", Check(), overrides.Choice("demo"))
        return EXIT_COMPLETE
    if name != "check":
        raise UserError(f"hvd site: unknown command {name!r}; there is hvd site check")
    with contextlib.suppress(ValueError):  # not the main thread: signals are somebody else's
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # the terminal is closed: as for SIGTERM
            signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    return check(rest)


def check(argv: Sequence[str]) -> int:
    options, rest, settings = submit.parse(argv, Check())
    cluster = submit.choose(options.cluster, settings)
    if cluster not in CLUSTERS:
        names = " or ".join(f"--cluster {name}" for name in CLUSTERS)
        raise UserError(f"hvd site check tries a cluster, and none answers here: {names}")
    cfg = overrides.experiment(rest, here=base.get(cluster).shares_files)
    module = importlib.import_module(f"hvd.clusters.{cluster}.trial")
    trial: Trial = module.Trial(cfg, settings, options, _WORK_S)
    failed = False
    for finding in look(trial, options.timeout):
        print(finding.line(), flush=True)
        failed |= finding.state == "FAILED"
    return EXIT_FAILED if failed else EXIT_COMPLETE


def look(trial: Trial, timeout: float) -> Iterator[Finding]:
    """All findings, in their order. `timeout`: seconds in the queue."""
    yield findings.time_limit(trial.asked)
    try:
        said = trial.queue()
    except (UserError, Failed) as error:
        yield Finding("queue", "FAILED", str(error))
        yield from (Finding(name, "not checked", "there was no job") for name in findings.NAMES)
        return
    yield Finding("queue", "ok", said)
    seen = Seen()
    try:
        run(trial, timeout, seen)
    except (UserError, Failed) as error:
        seen.trouble = str(error)
    yield from findings.judge(seen, trial.asked)


def run(trial: Trial, timeout: float, seen: Seen) -> None:
    """The job from its start to its removal."""
    try:
        trial.start()
        _follow(trial, timeout, seen)
    finally:
        with _undisturbed():
            trial.remove()


def _follow(trial: Trial, timeout: float, seen: Seen) -> None:
    """Until every process is done, the job has ended, or it has waited too long."""
    began, asked, said = time.monotonic(), None, ""
    while True:
        state, before = trial.state(), time.time()
        seen.take(trial.reports(), asked, time.time())
        asked = before
        if state.describe() != said:
            said = state.describe()
            print(f"job {state.id}: {said}", flush=True)
        done = [one for one in seen.reports.values() if one.done]
        if len(done) >= trial.asked.processes:
            break
        waited = time.monotonic() - began
        if state.ended or state.never:
            seen.trouble = f"{said}{f' ({state.never})' if state.never else ''}: {trial.last_words()}"
            break
        if waited > timeout + (_WORK_S if seen.reports else 0):
            what = "did not end" if seen.reports else "has not started"
            seen.trouble = f"it {what} within {waited:.0f} s ({said}); --timeout lets it wait longer"
            break
        time.sleep(_POLL_S)
    seen.images = trial.images()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C does not leave the job behind that the first one takes back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
