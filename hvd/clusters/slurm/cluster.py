"""Slurm as a cluster: a batch job for each part of a stage, known by what Slurm and the job's folder say of it."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from hvd import stages
from hvd.clusters import base
from hvd.clusters.base import JobState, Planned, Request, Submitted, Unreachable
from hvd.clusters.slurm import handover, log, options, queue, records, script, site
from hvd.clusters.slurm.queue import Queued, Status
from hvd.clusters.slurm.script import BatchJob
from hvd.errors import UserError
from hvd.overrides import Flag

_NAMED = 12
_PREFIX = "hvd-"  # of the names of our jobs
# Slurm leaves standing why a job waited when it ends. "Dependency" stays: so accounting has one that never could start.
_OF_WAITING = ("Priority", "Resources", "BeginTime")


class Slurm:
    """`--cluster slurm`. An id is Slurm's number; slurm/jobs has a folder for each job (hvd.clusters.slurm.records)."""

    name: ClassVar[str] = "slurm"
    auto: ClassVar[bool] = True
    stays: ClassVar[bool] = False
    shares_files: ClassVar[bool] = True

    def __init__(self, flags: Sequence[Flag] = (), jobs_dir: str = "") -> None:
        self._flags = flags
        self._folder = base.jobs_folder(jobs_dir)

    # --------------------------------------------------------------------------------------------------- submitting

    def available(self) -> bool:
        """Is this a login node of a cluster that answers? Inside of a job it is not one."""
        return "SLURM_JOB_ID" not in os.environ and handover.answers()

    def plan(self, request: Request) -> Planned:
        if request.after and not request.after.isdigit():
            raise UserError(f"--after {request.after!r} is not the id of a job")
        settings = site.load(self._flags)
        asked = any(flag.field == "slurm.gpus_per_node" for flag in self._flags)
        # configs that are made for CPUs get no GPUs, unless the user asks for them by name
        gpus = settings.gpus_per_node if asked or request.cfg.accelerator == "gpu" else 0
        jobs = batch_jobs(request, settings, gpus)
        devices, processes = jobs[0].devices
        hardware = f"{gpus}x{settings.gpu}" if gpus and settings.gpu else ""
        return Planned(request, _text(jobs, request.after), devices, processes, hardware, request.nodes, jobs)

    def check(self, planned: Planned) -> None:
        for job in planned.parts:
            print(job.describe(), flush=True)
        handover.check(planned.parts)

    def submit(self, planned: Planned, again: Sequence[str] = ()) -> list[Submitted]:
        return [
            Submitted(number, job.stage, f"{site.JOBS_DIR}/{number}.log", job.after)
            for job, number in handover.submit(planned.parts, planned.request.after)
        ]

    # ------------------------------------------------------------------------------------------------------- asking

    def owns(self, job: str) -> bool:
        return records.is_id(job)

    def states(self, days: float | None) -> tuple[list[JobState], int]:
        known = records.ids(self._folder)
        queued, error = _queue()
        here = str(records.base(self._folder))
        ours = [one.id for one in queued.values() if one.name.startswith(_PREFIX) and one.folder == here]
        jobs = [self._read(job, queued.get(job)) for job in sorted({*known, *ours}, key=int)]
        statuses: dict[str, Status] = {}
        try:
            if error is None:
                statuses = queue.states([job.id for job in jobs])
        except Unreachable as refused:
            error = refused
        if error is not None and jobs:
            log.complain(f"{error}; states are what the jobs' folders say")
        shown = [
            _state(job, statuses.get(job.id), queued.get(job.id))
            for job in jobs
            if not _status(job, statuses.get(job.id)).ended or base.recent(records.last_sign(self._folder, job), days)
        ]
        return shown, len(jobs) - len(shown)

    def look(self, job: str, tries: int = 1) -> JobState:
        """What Slurm says, else what the job has recorded of its end; Unreachable where there is neither."""
        record = records.read(self._folder, job)
        try:
            status = queue.states([job], tries).get(job)
        except Unreachable:
            if record.end is None:
                raise
            status = None
        return _state(record, status, None)

    def alive(self, job: str) -> bool | None:
        # slurm/job.sh asks before a container, which has no squeue; all jobs of a site are too many for a variable
        if listed := os.environ.get("HVD_LIVE_JOBS_FILE"):
            try:
                return job in Path(listed).read_text().split()
            except OSError:
                return None
        return queue.alive(job)

    def _read(self, job: str, queued: Queued | None) -> records.JobRecord:
        """What the folder says, else what Slurm's queue does: a job of plain sbatch has no folder before it starts."""
        record = records.read(self._folder, job)
        if queued is None or record.stage or record.name:
            return record
        stage = queued.name.removeprefix(_PREFIX)
        return dataclasses.replace(record, name=queued.name, stage=stage if queued.name.startswith(_PREFIX) else "")

    def _known(self, text: str) -> str:
        """The id in Slurm's form; UserError for one that has no folder and that Slurm does not know."""
        job, known = str(int(text)), records.ids(self._folder)
        try:
            if job in known or queue.states([job]):
                return job
            why = ""
        except Unreachable as error:
            why = f" ({error})"
        if not known:
            raise UserError(f"no job {job}, nor any other, in {self._folder}{why}")
        more = f" and {len(known) - _NAMED} older ones" if len(known) > _NAMED else ""
        raise UserError(f"no job {job} in {self._folder}; known: {', '.join(known[: -_NAMED - 1 : -1])}{more}{why}")

    # -------------------------------------------------------------------------------------------- cancel, wait, logs

    def dependents(self, job: str) -> list[JobState]:
        job = self._known(job)
        queued = {one.id: one for one in queue.queue()}
        depths = self._depths(job, queued)
        order = sorted(depths, key=lambda one: depths[one])
        if job not in queued:
            state = self.look(job, tries=3)
            if state.ended:
                waiting = ", ".join(order[1:])
                left = f"; waiting for it still, and not cancelled: {waiting}" if waiting else ""
                raise UserError(f"job {job} has ended ({state.describe()}): there is nothing to cancel{left}")
        jobs = [self._read(one, queued.get(one)) for one in order]
        return [
            JobState(one.id, queued[one.id].state if one.id in queued else "", one.stage, one.name, one.experiment)
            for one in jobs
        ]

    def _depths(self, job: str, queued: dict[str, Queued]) -> dict[str, int]:
        """The job and all in the queue that wait for it or for one that does: id -> length of the longest way to it."""
        waits = {
            one.id: {
                *one.after,
                *(records.read(self._folder, one.id).after if one.state == "PENDING" else ()),
            }
            for one in queued.values()
        }
        depths, grown = {job: 0}, True
        while grown and max(depths.values()) <= len(waits):  # a wrong job.json may close a circle
            grown = False
            for one, after in waits.items():
                depth = max((depths[other] + 1 for other in after if other in depths), default=0)
                if one != job and depth > depths.get(one, 0):
                    depths[one], grown = depth, True
        return depths

    def cancel(self, jobs: Sequence[str]) -> None:
        queue.cancel(jobs)

    def wait(self, job: str, timeout: float | None) -> int:
        job = self._known(job)
        return base.wait_for(job, timeout, functools.partial(self.look, job))

    def logs(self, job: str, lines: int, follow: bool) -> int:
        job = self._known(job)
        path = records.read(self._folder, job).log
        return (log.follow if follow else log.show)(functools.partial(self.look, job), job, path, lines)


def batch_jobs(request: Request, settings: site.Site, gpus: int) -> list[BatchJob]:
    """The stage's jobs in their order: for "all" value, policy and, on one node, evaluation and report."""
    cfg, settings = request.cfg, script.with_command(settings)
    run_dirs = {"value": cfg.value_dir, "policy": cfg.policy_dir, "evaluate": ""}
    jobs: list[BatchJob] = []
    for name, groups in stages.parts(cfg, request.stage, overwrite=request.overwrite).items():
        steps = [step for group in groups for step in group]
        nodes, site_, devices = request.nodes, settings, gpus
        if name == "evaluate":
            nodes = 1
            own = settings.exclusive or any(options.kind(option) == "gpus" for option in settings.extra)
            if gpus and not own and not any(step.spread for step in steps):  # no training: a step takes one GPU
                site_, devices = dataclasses.replace(settings, tasks_per_node=1), 1
        after = jobs[-1].stage if jobs else ""
        jobs.append(BatchJob(name, steps, request.options, nodes, devices, site_, run_dirs[name], after, cfg.exp_dir))
    return jobs


def _text(jobs: Sequence[BatchJob], after: str) -> str:
    """The scripts, each below the line that submits it where there are several or one that waits."""
    text = ""
    for job in jobs:
        waits = handover.dependency(f"<id of the {job.after} job>" if job.after else after)
        if len(jobs) > 1 or waits:
            text += f"# ---- sbatch {' '.join([*waits, f'{job.stage}.sbatch'])}\n"
        text += script.render(job)
    return text


def _queue() -> tuple[dict[str, Queued], Unreachable | None]:
    try:
        return {one.id: one for one in queue.queue()}, None
    except Unreachable as error:
        return {}, error


def _state(job: records.JobRecord, status: Status | None, queued: Queued | None) -> JobState:
    """What Slurm says; where it has forgotten the job, what the job has recorded. Reads the run folder."""
    status = _status(job, status)
    done = records.progress(job)
    if status.ended or done.get("complete"):
        done["eta_s"] = None
    ended = status.ended
    waits = queued.after if queued else job.after
    never = ""
    if status.reason == queue.NEVER and waits:
        never = f"job {' and '.join(waits)}, which it waits for, did not complete"
    return JobState(
        id=job.id,
        state=status.state,
        stage=job.stage,
        name=job.name,
        experiment=job.experiment,
        reason=status.reason,
        exit_code=status.exit_code,
        nodes=status.nodes,
        restarts=max(status.restarts, sum(job.causes.values())),
        causes=dict(job.causes),
        waiting_for=[] if ended else list(waits),
        submitted=job.submitted,
        log=str(job.log),
        ended=ended,
        never=never,
        **done,
    )


def _status(job: records.JobRecord, status: Status | None) -> Status:
    end = job.end
    if status is not None and status.ended:
        # "value: loss is not finite" says more than NonZeroExitCode
        reason = end.text if end and end.text else status.reason
        return dataclasses.replace(status, reason="" if reason in _OF_WAITING else reason)
    if status is not None:
        return status
    if end is not None:
        return Status(job.id, "FAILED" if end.exit_code else "COMPLETED", end.text, end.exit_code)
    return Status(job.id, "UNKNOWN", "Slurm has forgotten the job, and its folder does not say how it ended")
