"""The places where a stage can run, behind one interface. The launcher, `hvd jobs` and the owner check know no other.

Each module of hvd.clusters beside this one is such a place. Its name is the value of `--cluster` and the prefix of its
settings on the command line (`--slurm.partition gpu`); its `CLUSTER` is the class. A new scheduler is one more module.
"""

import datetime
import importlib
import os
import pkgutil
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import hvd.clusters
from hvd.configs import Experiment
from hvd.errors import EXIT_COMPLETE, EXIT_FAILED, Failed, UserError, nearest
from hvd.overrides import Flag

JOBS_DIR = "HVD_JOBS_DIR"
EXIT_TIMEOUT = 124  # as of timeout(1)
_WAIT_S = (1.0, 5.0)  # first and longest pause between two questions about the same state


class Unreachable(Failed):
    """A cluster does not answer. This says nothing about any job."""


class Absent(Unreachable):
    """The programs of the cluster are not on this machine: trying again does not help."""


@dataclass(frozen=True)
class Request:
    """A stage to be run.

    Attributes:
        options: tell a step of hvd the config: `--config-file PATH`, or as the user gave it (`--config NAME
            --dotted.field value ...`) where it is printed, or where a job does not see the launcher's files.
        after: id of a job that must complete first; "" = none.
    """

    cfg: Experiment
    stage: str
    options: tuple[str, ...]
    nodes: int = 1
    overwrite: bool = False
    after: str = ""


@dataclass(frozen=True)
class Planned:
    """What a request comes to at a cluster; nothing has been done for it yet.

    Attributes:
        text: what --dry-run prints: commands, a batch script or manifests, to be run by hand.
        devices, processes: over all nodes.
        hardware, hardware_nodes: as `hvd plan --devices --nodes` takes them (`8xh100-80gb`, 2); "" = not known.
        parts: of `submit` only, each cluster's own.
    """

    request: Request
    text: str
    devices: int
    processes: int
    hardware: str = ""
    hardware_nodes: int = 1
    parts: Sequence[Any] = ()


@dataclass(frozen=True)
class Submitted:
    """A job that the cluster has taken.

    Attributes:
        log: a file, or the command that shows it; "" = it is shown at once.
        where: options with which `hvd jobs` finds it, each behind a space.
    """

    id: str
    stage: str
    log: str = ""
    after: str = ""
    where: str = ""


@dataclass(frozen=True)
class JobState:
    """What is known of a job; the names are those of `hvd jobs --json`.

    Attributes:
        state: PENDING, RUNNING, COMPLETED, FAILED, ... in the cluster's words; UNKNOWN where it has forgotten the job.
        reason: why it waits or how it ended.
        exit_code: as a shell has it (128 + signal); None while it is not known.
        step, total, steps_per_s, last_checkpoint, complete: of the run folder, whichever job brought it there.
        eta_s: seconds of training that are left at the last rate.
        causes: of its restarts: cause -> how often.
        waiting_for: ids of jobs that must end first.
        ended: it has ended and will not start again (not printed).
        never: why it will never start although it is queued; "" = it may (not printed).
    """

    id: str
    state: str
    stage: str = ""
    name: str = ""
    experiment: str = ""
    reason: str = ""
    exit_code: int | None = None
    nodes: str = ""
    step: int | None = None
    total: int | None = None
    steps_per_s: float | None = None
    eta_s: float | None = None
    restarts: int = 0
    causes: dict[str, int] = field(default_factory=dict)
    last_checkpoint: int | None = None
    complete: bool = False
    waiting_for: list[str] = field(default_factory=list)
    submitted: str = ""
    log: str = ""
    ended: bool = False
    never: str = ""

    def describe(self) -> str:
        """`RUNNING on node[1-2], restart 1`, `FAILED, exit code 7: NonZeroExitCode`."""
        text = self.state
        if self.nodes and not self.ended:
            text += f" on {self.nodes}"
        if self.restarts and not self.ended:
            text += f", restart {self.restarts}"
        if self.state == "FAILED" and self.exit_code:
            text += f", exit code {self.exit_code}"
        return f"{text}: {self.reason}" if self.reason else text

    def result(self) -> int:
        """What `hvd jobs wait` ends with once the job has ended."""
        if self.state == "COMPLETED":
            return EXIT_COMPLETE
        return (self.state == "FAILED" and self.exit_code) or EXIT_FAILED


@runtime_checkable
class Cluster(Protocol):
    """A place where jobs run. It is made with the user's flags `--NAME.setting`, and with `hvd jobs --jobs-dir`.

    `auto`: may `--cluster auto` choose it? `stays`: does the launcher stay until the jobs have ended (without
    --detach)? `shares_files`: do its jobs see the launcher's files?
    """

    name: ClassVar[str]
    auto: ClassVar[bool]
    stays: ClassVar[bool]
    shares_files: ClassVar[bool]

    def __init__(self, flags: Sequence[Flag] = (), jobs_dir: str = "") -> None: ...

    def available(self) -> bool:
        """Can jobs be submitted from here? Answers within a second where the cluster is not used."""
        ...

    def plan(self, request: Request) -> Planned:
        """What the request comes to; no side effects. UserError where it makes no sense here."""
        ...

    def check(self, planned: Planned) -> None:
        """Ask the cluster whether it could run this at all; says what is asked for, and the cluster's warnings.

        Raises:
            UserError: it never could.
            Unreachable: it does not answer.
        """
        ...

    def submit(self, planned: Planned, again: Sequence[str] = ()) -> list[Submitted]:
        """Hand the jobs over, in their order: all of them or none.

        Args:
            again: the launcher's own command line, for a cluster that must start the launcher in the background;
                () = it may stay.

        Raises:
            UserError: the cluster refuses one.
            Unreachable: it does not answer.
        """
        ...

    def owns(self, job: str) -> bool:
        """Does the text look like an id of this cluster?"""
        ...

    def states(self, days: float | None) -> tuple[list[JobState], int]:
        """Our jobs, oldest first, without those that ended more than `days` ago, and how many those are; none where the
        cluster is not used."""
        ...

    def dependents(self, job: str) -> list[JobState]:
        """The job and those that cannot go on without it, each after the one it waits for. UserError: it has ended."""
        ...

    def cancel(self, jobs: Sequence[str]) -> None:
        """Cancel the jobs in this order; a job that has ended already is left alone."""
        ...

    def logs(self, job: str, lines: int, follow: bool) -> int:
        """Print the log's last lines (0: all), with `follow` until the job has ended; the exit code of `hvd jobs`."""
        ...

    def wait(self, job: str, timeout: float | None) -> int:
        """Until the job has ended for good, a line for each change; its exit code, EXIT_TIMEOUT after `timeout`."""
        ...

    def alive(self, job: str) -> bool | None:
        """Has the job of that id not ended? None where the cluster cannot be asked from here (the owner check)."""
        ...


def names() -> list[str]:
    """Of all clusters; the order is that in which `auto` asks them, this machine last."""
    found = sorted(module.name for module in pkgutil.iter_modules(hvd.clusters.__path__) if module.name != "base")
    return [*(name for name in found if name != "local"), "local"]


def get(name: str, flags: Sequence[Flag] = (), jobs_dir: str = "") -> Cluster:
    """The cluster of that name, made with those of the flags that are its own; UserError for an unknown one."""
    if name not in names():
        raise UserError(f"--cluster: unknown cluster {name!r}{nearest(name, ['auto', *names()])}")
    return importlib.import_module(f"hvd.clusters.{name}").CLUSTER(
        [flag for flag in flags if flag.field.startswith(f"{name}.")], jobs_dir
    )


def choose(name: str) -> str:
    """The name that was asked for; for "auto" that of the first cluster that answers, else this machine's."""
    if name != "auto":
        return name
    clusters = sorted(map(get, names()), key=lambda cluster: not cluster.auto)
    for cluster in clusters:
        if cluster.auto and cluster.name != "local" and cluster.available():
            return cluster.name
    for cluster in clusters:
        if not cluster.auto and cluster.available():
            print(f"--cluster auto: running on this machine (--cluster {cluster.name} would use {cluster.name})")
    return "local"


def owner_of(job: str, jobs_dir: str = "", flags: Sequence[Flag] = ()) -> Cluster:
    """The cluster that an id belongs to by its form; where it fits several, the first of them that answers."""
    fitting = [one for one in (get(name, flags, jobs_dir) for name in names()) if one.owns(job)]
    if not fitting:
        raise UserError(f"{job!r} is not the id of a job: a number such as 123, or a name (`hvd jobs` lists them)")
    if len(fitting) == 1:
        return fitting[0]
    return next((cluster for cluster in fitting if cluster.available()), fitting[0])


def alive(scheduler: str, job: str) -> bool | None:
    """Has the job not ended? None where it cannot be asked from here. `scheduler`: one of `names`."""
    return get(scheduler).alive(job) if scheduler in names() else None


def jobs_folder(given: str = "") -> Path:
    """Where jobs leave their records: --jobs-dir, else $HVD_JOBS_DIR, else slurm/jobs here."""
    return Path(given or os.environ.get(JOBS_DIR) or Path("slurm", "jobs"))


def start_again(again: Sequence[str], log_dir: Path) -> None:
    """Start the launcher's command line in a session of its own; say how to follow and to stop it."""
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / "submit.log"
    with open(log, "a", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "hvd.launch.submit", *again],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    print(f"running in the background: process {process.pid}, log {log}")
    print(f"follow it: tail -f {shlex.quote(str(log))}; stop it (it saves): kill {process.pid}")


def recent(seen: datetime.datetime | None, days: float | None) -> bool:
    """Was it within the last days? Yes where the time is not known, or `days` is None."""
    return seen is None or days is None or datetime.datetime.now(datetime.UTC) - seen < datetime.timedelta(days=days)


class Asking[T]:
    """Puts a question to a cluster again and again. That it does not answer is said once and waited out.

    Args:
        ends: a silence of this kind is raised.
    """

    def __init__(self, ask: Callable[[], T], ends: type[Unreachable] | tuple[()] = ()):
        self._ask, self._ends, self._silent = ask, ends, False

    def __call__(self) -> T | None:
        """The answer; None while there is none."""
        try:
            answer = self._ask()
        except self._ends:
            raise
        except Unreachable as error:
            if not self._silent:
                print(f"{error}; going on until it answers", file=sys.stderr, flush=True)
            self._silent = True
            return None
        self._silent = False
        return answer


def wait_for(job: str, timeout: float | None, ask: Callable[[], JobState]) -> int:
    """`Cluster.wait` for a cluster that is asked again and again; Unreachable of `ask` is said once and waited out."""
    began, pause, asking = time.monotonic(), _WAIT_S[0], Asking(ask, ends=Absent)
    said, never, name = "", 0, f"job {job}"
    while True:
        state = asking()
        if state is not None:
            text = state.describe() + (f" ({state.never})" if state.never else "")
            if text != said:
                print(f"{time.strftime('%H:%M:%S')} {name}: {text}", flush=True)
                said, pause = text, _WAIT_S[0]
            if state.ended:
                return state.result()
            never = never + 1 if state.never else 0
            if never > 1:  # not at the first sight: the cluster may be about to cancel it
                print(f"{name} will never start ({state.never}); `hvd jobs cancel {job}` removes it", flush=True)
                return state.exit_code or EXIT_FAILED
        left = None if timeout is None else began + timeout - time.monotonic()
        if left is not None and left <= 0:
            about = f", which is {said}," if said else ""
            print(f"{name}{about} has not ended within {timeout:g} s; it is left alone", file=sys.stderr)
            return EXIT_TIMEOUT
        time.sleep(pause if left is None else min(pause, left))
        pause = min(pause * 1.5, _WAIT_S[1])
