"""Kubernetes as a cluster: the manifests of k8s/ as Jobs, known by their labels, asked for by the user's kubectl."""

import dataclasses
import shutil
from collections.abc import Sequence
from typing import ClassVar

from hvd.clusters.base import JobState, Planned, Request, Submitted
from hvd.clusters.kubernetes import manifests, queue
from hvd.errors import UserError
from hvd.overrides import Flag


class Kubernetes:
    """`--cluster kubernetes`. An id is the name of a Job in the namespace of kubectl's context."""

    name: ClassVar[str] = "kubernetes"
    auto: ClassVar[bool] = False
    stays: ClassVar[bool] = True
    shares_files: ClassVar[bool] = False

    def __init__(self, flags: Sequence[Flag] = (), jobs_dir: str = "") -> None:
        self._flags = flags

    def available(self) -> bool:
        return queue.available()

    def plan(self, request: Request) -> Planned:
        asked = manifests.settings(self._flags)
        if request.after and (request.stage != "policy" or not queue.is_name(request.after)):
            raise UserError(f"--after {request.after!r}: it names the value Job that --stage policy waits for")
        found = manifests.render(
            request.cfg,
            request.stage,
            request.options,
            request.nodes,
            asked,
            after=request.after,
            overwrite=request.overwrite,
        )
        gpus = manifests.gpus(found)
        hardware = f"{gpus}x{asked.gpu}" if gpus and asked.gpu else ""
        devices = request.nodes * max(1, gpus)
        return Planned(request, manifests.to_yaml(found), devices, request.nodes, hardware, request.nodes, found)

    def check(self, planned: Planned) -> None:
        if not shutil.which("kubectl"):
            raise UserError("--cluster kubernetes: there is no kubectl on this machine")

    def submit(self, planned: Planned, again: Sequence[str] = ()) -> list[Submitted]:
        return [Submitted(name, stage, f"kubectl logs job/{name}") for stage, name in manifests.submit(planned.parts)]

    def owns(self, job: str) -> bool:
        return queue.is_name(job)

    def states(self, days: float | None) -> list[JobState]:
        if not queue.available():
            return []
        return queue.rows({name: job for name, job in queue.find().items() if days is None or queue.recent(job, days)})

    def state(self, job: str) -> JobState:
        jobs = queue.find()
        queue.one(job, jobs)
        return queue.rows({job: jobs[job]})[0]

    def dependents(self, job: str) -> list[JobState]:
        jobs = queue.find()
        queue.one(job, jobs)
        names = queue.doomed(jobs, job)
        return [dataclasses.replace(state, experiment="") for state in queue.rows({name: jobs[name] for name in names})]

    def cancel(self, jobs: Sequence[str]) -> None:
        queue.delete(jobs)

    def logs(self, job: str, lines: int, follow: bool) -> int:
        return queue.logs(job, lines, follow)

    def wait(self, job: str, timeout: float | None) -> int:
        return queue.wait(job, timeout)

    def alive(self, job: str) -> bool | None:
        return None  # a pod may not ask; it is known by its sign of life (hvd.runtime.heartbeat)
