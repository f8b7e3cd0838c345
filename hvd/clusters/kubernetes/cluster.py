"""Kubernetes as a cluster: the manifests of k8s/ as Jobs, known by their labels, asked for by the user's kubectl."""

import contextlib
import time
from collections.abc import Sequence
from typing import ClassVar

from hvd.clusters.base import JobState, Planned, Request, Submitted, Unreachable, wait_for
from hvd.clusters.kubernetes import kubectl, manifests, submission
from hvd.clusters.kubernetes.queue import Queue, is_name
from hvd.errors import EXIT_COMPLETE, UserError
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
        return kubectl.available()

    def plan(self, request: Request) -> Planned:
        asked = manifests.settings(self._flags)
        if request.stage == "evaluate":
            raise UserError("--stage evaluate is no Job: run hvd evaluate and hvd report where the volume is mounted")
        if request.after and (request.stage != "policy" or not is_name(request.after)):
            raise UserError(f"--after {request.after!r}: it names the value Job that --stage policy waits for")
        docs = manifests.render(request, asked)
        gpus = manifests.gpus(docs)
        hardware = f"{gpus}x{asked.gpu}" if gpus and asked.gpu else ""
        devices = request.nodes * max(1, gpus)
        return Planned(request, manifests.to_yaml(docs), devices, request.nodes, hardware, request.nodes, docs)

    def check(self, planned: Planned) -> None:
        kubectl.ask("version", "--client")  # it is there; what it says of the manifests comes with `submit`

    def submit(self, planned: Planned, again: Sequence[str] = ()) -> list[Submitted]:
        names = submission.submit(planned.parts)
        return [Submitted(name, stage, f"kubectl logs job/{name}") for stage, name in names]

    def owns(self, job: str) -> bool:
        return is_name(job)

    def states(self, days: float | None) -> tuple[list[JobState], int]:
        if not kubectl.available():
            return [], 0
        queue = Queue()
        shown = [queue.state(name) for name, job in queue.jobs.items() if job.within(days)]
        return shown, len(queue.jobs) - len(shown)

    def state(self, job: str) -> JobState:
        return Queue().state(job)

    def dependents(self, job: str) -> list[JobState]:
        """One that has ended too: to delete it makes room for its successor."""
        queue = Queue()
        return [queue.state(name, steps=False) for name in queue.dependents(job)]

    def cancel(self, jobs: Sequence[str]) -> None:
        """Delete the Jobs: their pods get SIGTERM and save."""
        kubectl.ask("delete", "jobs", *jobs, "--ignore-not-found", "--wait=false", "--cascade=background")

    def logs(self, job: str, lines: int, follow: bool) -> int:
        """The newest pod's log; with `follow` that of its successors too."""
        queue, shown = Queue(), ""
        while True:
            found = queue.job(job)
            pod = next((pod for pod in reversed(found.pods) if pod["status"].get("phase") != "Pending"), None)
            if pod is not None and pod["metadata"]["name"] != shown:
                shown = pod["metadata"]["name"]
                options = [f"--tail={lines or -1}", "--all-containers", *(["--follow"] if follow else [])]
                kubectl.show("logs", shown, *options)
            elif not follow and pod is None:
                raise UserError(f"Job {job} has no log yet: it is {queue.state(job, steps=False).describe()}")
            if not follow or found.ended:
                return EXIT_COMPLETE
            time.sleep(1)
            with contextlib.suppress(Unreachable):
                queue = Queue()

    def wait(self, job: str, timeout: float | None) -> int:
        def ask() -> JobState | None:
            with contextlib.suppress(Unreachable):
                return Queue().state(job, steps=False)
            return None

        self.state(job)  # a mistyped name or a cluster that does not answer is said at once
        return wait_for(job, timeout, ask)

    def alive(self, job: str) -> bool | None:
        return None  # a pod may not ask; it is known by its sign of life (hvd.runtime.heartbeat)
