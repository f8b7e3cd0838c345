"""`hvd jobs list`: a line a job."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

from hvd.clusters.base import JobState
from hvd.tables import aligned

_REASON = 40  # characters in the table; --json has all
_NOT_PRINTED = ("ended", "never")


def as_json(rows: Iterable[JobState]) -> str:
    """A JSON list, one object a job."""
    printed = [
        {name: value for name, value in dataclasses.asdict(one).items() if name not in _NOT_PRINTED} for one in rows
    ]
    return json.dumps(printed, indent=2)


def as_table(rows: Iterable[JobState]) -> str:
    """Columns as wide as what is in them."""
    head = ["id", "stage", "experiment", "state", "reason", "step", "step/s", "ETA", "restarts", "checkpoint", "after"]
    return "\n".join(aligned([head, *([cell or "-" for cell in _cells(one)] for one in rows)]))


def _cells(one: JobState) -> Sequence[str]:
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
