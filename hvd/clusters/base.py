"""The places where a stage can run, behind one interface. The launcher, `hvd jobs` and the owner check know no other.

Each module of hvd.clusters beside this one is such a place. Its name is the value of `--cluster` and the prefix of its
settings on the command line (`--slurm.partition gpu`); its `CLUSTER` is the class. A new scheduler is one more module.
"""

import importlib
import pkgutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import hvd.clusters
from hvd.configs import Experiment
from hvd.errors import EXIT_COMPLETE, EXIT_FAILED, Failed, UserError, nearest
from hvd.overrides import Flag

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
        hardware: of a node, as `hvd plan --devices` takes it (`8xh100-80gb`); "" = not known.
        parts: of `submit` only, each cluster's own.
    """

    request: Request
    text: str
    devices: int
    processes: int
    hardware: str = ""
    parts: Sequence[Any] = ()


@dataclass(frozen=True)
class Submitted:
    """A job that the cluster has taken. `log`: a file, or the command that shows it."""

    id: str
    stage: str
    log: str = ""
    after: str = ""


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

    def submit(self, planned: Planned, again: Sequence[str] = ()) -> list[Submitted]:
        """Hand the jobs over, in their order: all of them or none. Says what is asked for, and the cluster's warnings.

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

    def states(self, everything: bool) -> list[JobState]:
        """Our jobs, oldest first; [] where the cluster is not used. `everything`: those that ended long ago too."""
        ...

    def state(self, job: str) -> JobState:
        """One job, once. UserError where there is none of that id, Unreachable where the cluster does not answer."""
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


def get(name: str) -> type[Cluster]:
    """The class of that name; UserError for an unknown one."""
    if name not in names():
        raise UserError(f"--cluster {name!r} is not one of auto, {', '.join(names())}{nearest(name, names())}")
    return importlib.import_module(f"hvd.clusters.{name}").CLUSTER


def choose(name: str) -> type[Cluster]:
    """The class that was asked for; "auto" is the first one that answers, else this machine."""
    if name != "auto":
        return get(name)
    for kind in map(get, names()):
        if not kind().available():
            continue
        if kind.auto:
            return kind
        print(f"--cluster auto: {kind.name} is there and is used only when asked for: --cluster {kind.name}")
    return get("local")


def owner_of(job: str, jobs_dir: str = "") -> Cluster:
    """The cluster that an id belongs to by its form; UserError where it is none of an id."""
    for kind in map(get, names()):
        if (cluster := kind(jobs_dir=jobs_dir)).owns(job):
            return cluster
    raise UserError(f"{job!r} is not the id of a job: a number such as 123, or a name (`hvd jobs` lists them)")


def alive(scheduler: str, job: str) -> bool | None:
    """Has the job not ended? None where nothing here can tell. `scheduler`: a name of `names`."""
    return get(scheduler)().alive(job) if scheduler in names() else None


def wait_for(job: str, timeout: float | None, ask: Callable[[], JobState | None]) -> int:
    """`Cluster.wait` for a cluster that is asked again and again. `ask`: None while it does not answer."""
    began, pause = time.monotonic(), _WAIT_S[0]
    said, never, name = "", 0, f"job {job}"
    while True:
        state = ask()
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
