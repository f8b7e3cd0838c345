"""A job's state: what its cluster says, else what the job itself left in its folder."""

import dataclasses
from collections.abc import Iterable, Mapping

from hvd.clusters.slurm import queue as slurm
from hvd.clusters.slurm.queue import Status, Unreachable
from hvd.jobs.registry import Job

# Slurm leaves standing why a job waited when it ends. "Dependency" stays: so accounting has one that never could start.
_OF_WAITING = ("Priority", "Resources", "BeginTime")


def look(jobs: Iterable[Job], tries: int = 3) -> tuple[dict[str, Status], Unreachable | None]:
    """Status of each job by id, and why the cluster could not be asked (None: it was)."""
    jobs = list(jobs)
    try:
        # The seam: another cluster is asked here about the jobs that are its own.
        found, error = slurm.states([job.id for job in jobs if job.cluster == "slurm"], tries), None
    except Unreachable as refused:
        found, error = {}, refused
    return from_folders(jobs, found), error


def from_folders(jobs: Iterable[Job], found: Mapping[str, Status]) -> dict[str, Status]:
    """`found`, and where the cluster has forgotten a job its own last word; UNKNOWN where there is neither."""
    return {job.id: _status(job, found.get(job.id)) for job in jobs}


def _status(job: Job, found: Status | None) -> Status:
    end = job.end
    if found is not None and found.ended:
        # "value: loss is not finite" says more than NonZeroExitCode
        reason = end.text if end and end.text else found.reason
        return dataclasses.replace(found, reason="" if reason in _OF_WAITING else reason)
    if found is not None:
        return found
    if end is not None:
        return Status(job.id, "FAILED" if end.exit_code else "COMPLETED", end.text, end.exit_code)
    return Status(job.id, "UNKNOWN")


def exit_code(status: Status) -> int:
    """What `hvd jobs wait` ends with for a job that has ended so."""
    if status.state == "COMPLETED":
        return 0
    return (status.state == "FAILED" and status.exit_code) or 1


def describe(status: Status) -> str:
    """`RUNNING on node[1-2], restart 1`, `FAILED, exit code 7: NonZeroExitCode`."""
    text = status.state
    if status.nodes and not status.ended:
        text += f" on {status.nodes}"
    if status.restarts and not status.ended:
        text += f", restart {status.restarts}"
    if status.state == "FAILED" and status.exit_code:
        text += f", exit code {status.exit_code}"
    if status.state == "UNKNOWN":
        return f"{text}: nobody knows it any more, and it left no word of its end"
    return f"{text}: {status.reason}" if status.reason else text
