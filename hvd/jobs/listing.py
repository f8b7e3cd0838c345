"""`hvd jobs list`: a line a job."""

import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hvd.clusters.slurm.queue import Queued, Status
from hvd.jobs import registry
from hvd.jobs.registry import Job
from hvd.tables import aligned

_REASON = 40  # characters in the table; --json has all


@dataclass(frozen=True)
class Row:
    """A job as it is shown; the names are those of --json.

    Attributes:
        step, total, steps_per_s, last_checkpoint, complete: of the run folder, whichever job brought it there.
        eta_s: seconds of training that are left at the last rate.
        restarts: by Slurm's count or the job's own, whichever knows of more.
        waiting_for: jobs that must end first.
    """

    id: str
    stage: str
    name: str
    experiment: str
    state: str
    reason: str
    exit_code: int | None
    nodes: str
    step: int | None
    total: int | None
    steps_per_s: float | None
    eta_s: float | None
    restarts: int
    causes: dict[str, int]
    last_checkpoint: int | None
    complete: bool
    waiting_for: list[str]
    submitted: str
    log: str


def row(job: Job, status: Status, queued: Queued | None) -> Row:
    """What is shown of a job. Reads the run folder."""
    done = registry.progress(job)
    waits = (queued.after if queued else job.after) if not status.ended else ()
    return Row(
        id=job.id,
        stage=job.stage,
        name=job.name,
        experiment=job.experiment,
        state=status.state,
        reason=status.reason,
        exit_code=status.exit_code,
        nodes=status.nodes,
        step=done.step,
        total=done.total,
        steps_per_s=None if done.step_s is None else 1 / done.step_s,
        eta_s=None if status.ended or done.complete else done.eta_s,
        restarts=max(status.restarts, sum(job.causes.values())),
        causes=dict(job.causes),
        last_checkpoint=done.checkpoint,
        complete=done.complete,
        waiting_for=list(waits),
        submitted=job.submitted,
        log=str(job.log),
    )


def as_json(rows: Iterable[Row]) -> str:
    """A JSON list, one object a job."""
    return json.dumps([dataclasses.asdict(one) for one in rows], indent=2)


def as_table(rows: Iterable[Row]) -> str:
    """Columns as wide as what is in them."""
    head = ["id", "stage", "experiment", "state", "reason", "step", "step/s", "ETA", "restarts", "checkpoint", "after"]
    return "\n".join(aligned([head, *([cell or "-" for cell in _cells(one)] for one in rows)]))


def _cells(one: Row) -> Sequence[str]:
    reason = one.reason if len(one.reason) <= _REASON else one.reason[: _REASON - 3] + "..."
    step = "" if one.step is None and one.total is None else f"{_shown(one.step)}/{_shown(one.total)}"
    return [
        one.id,
        one.stage,
        one.experiment,
        one.state,
        reason,
        step,
        "" if one.steps_per_s is None else f"{one.steps_per_s:.3g}",
        "" if one.eta_s is None else duration(one.eta_s),
        restarts(one.restarts, one.causes),
        "complete" if one.complete else "" if one.last_checkpoint is None else str(one.last_checkpoint),
        ", ".join(one.waiting_for),
    ]


def _shown(number: int | None) -> str:
    return "-" if number is None else str(number)


def restarts(count: int, causes: Mapping[str, int]) -> str:
    """`2 (1 preempted, 1 node-failure)`."""
    said = ", ".join(f"{number} {cause}" for cause, number in causes.items())
    return f"{count} ({said})" if said else str(count) if count else ""


def duration(seconds: float) -> str:
    """`1d 4h`, `3h 20m`, `12m 5s`, `40s`."""
    if seconds >= 1e9:  # a rate measured while the machine slept
        return "years"
    days, rest = divmod(round(seconds), 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (left, "s")]
    first = next((index for index, (value, _) in enumerate(parts) if value), 3)
    return " ".join(f"{value}{unit}" for value, unit in parts[first : first + 2] if value) or "0s"


def recent(seen: datetime.datetime | None, days: float) -> bool:
    """Was it within the last days? What nobody can date is."""
    return seen is None or datetime.datetime.now(datetime.UTC) - seen < datetime.timedelta(days=days)
