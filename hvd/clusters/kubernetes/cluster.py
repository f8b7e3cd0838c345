"""Kubernetes as a cluster: the manifests of k8s/ as Jobs, known by their labels, asked for by the user's kubectl."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from hvd.clusters import base
from hvd.clusters.base import JobState, Planned, Request, Submitted, wait_for
from hvd.clusters.kubernetes import kubectl, manifests, site, submission
from hvd.clusters.kubernetes.queue import PODS, KubernetesJob, Queue, is_name
from hvd.errors import EXIT_COMPLETE, UserError
from hvd.overrides import Flag


class Kubernetes:
    """`--cluster kubernetes`. An id is the name of a Job in the namespace of the settings or of kubectl's context."""

    name: ClassVar[str] = "kubernetes"
    auto: ClassVar[bool] = False
    stays: ClassVar[bool] = True
    shares_files: ClassVar[bool] = False

    def __init__(self, flags: Sequence[Flag] = (), jobs_dir: str = "") -> None:
        self._flags = flags
        self._known: kubectl.Target | None = None

    @property
    def _target(self) -> kubectl.Target:
        if self._known is None:
            asked = site.load(self._flags)
            self._known = kubectl.Target(asked.context, asked.namespace)
        return self._known

    def available(self) -> bool:
        return kubectl.available()

    def plan(self, request: Request) -> Planned:
        asked = site.load(self._flags)
        if request.after and not is_name(request.after):
            raise UserError(f"--after {request.after!r} is not the name of a Job")
        if request.after and request.stage != "policy":
            raise UserError(
                f"--after {request.after}: on Kubernetes only --stage policy waits for a Job. --stage all evaluates "
                f"after the policy; for any other stage wait first: hvd jobs wait {request.after}"
            )
        docs = manifests.render(request, asked)
        self._known = kubectl.Target(asked.context, manifests.namespace(docs))
        gpus = manifests.gpus(docs, asked.gpu_resource)
        hardware = f"{gpus}x{asked.gpu}" if gpus and asked.gpu else ""
        nodes = 1 if request.stage == "evaluate" else request.nodes
        return Planned(request, manifests.to_yaml(docs), nodes * max(1, gpus), nodes, hardware, nodes, docs)

    def check(self, planned: Planned) -> None:
        self._target.ask("version", "--client")  # it is there; what it says of the manifests comes with `submit`
        print(f"kubernetes: {self._target.describe()}", flush=True)

    def submit(self, planned: Planned, again: Sequence[str] = ()) -> list[Submitted]:
        done = submission.submit(planned.parts, self._target)
        if done.ours_to_release and again:
            base.start_again(again, Path("runs") / (planned.request.cfg.exp_name or planned.request.cfg.name) / "logs")
        asked = {"context": self._target.context, "namespace": self._target.namespace}
        given = {name: value for name, value in asked.items() if value}
        kubectl_, ours = ("".join(f" --{start}{k} {v}" for k, v in given.items()) for start in ("", "kubernetes."))
        logs = {
            name: f"kubectl logs job/{name}{' --all-containers' * (stage == 'evaluate')}" for stage, name in done.stages
        }
        return [Submitted(name, stage, logs[name] + kubectl_, where=ours) for stage, name in done.stages]

    def owns(self, job: str) -> bool:
        return is_name(job)

    def states(self, days: float | None) -> tuple[list[JobState], int]:
        if not kubectl.available():
            return [], 0
        queue = Queue(self._target)
        shown = [queue.state(name) for name, job in queue.jobs.items() if job.within(days)]
        return shown, len(queue.jobs) - len(shown)

    def state(self, job: str) -> JobState:
        return Queue(self._target).state(job)

    def dependents(self, job: str) -> list[JobState]:
        """One that has ended too: to delete it makes room for its successor."""
        queue = Queue(self._target)
        return [queue.state(name, steps=False) for name in queue.dependents(job)]

    def cancel(self, jobs: Sequence[str]) -> None:
        """Delete the Jobs: their pods get SIGTERM and save."""
        self._target.ask("delete", "jobs", *jobs, "--ignore-not-found", "--wait=false", "--cascade=background")

    def logs(self, job: str, lines: int, follow: bool) -> int:
        """The newest pod's log; with `follow` that of its successors too."""
        queue, shown, asking = Queue(self._target), "", base.Asking(lambda: Queue(self._target))
        while True:
            found = queue.job(job)
            pod = next((pod for pod in reversed(found.pods) if pod["status"].get("phase") != "Pending"), None)
            if pod is not None and pod["metadata"]["name"] != shown:
                shown = pod["metadata"]["name"]
                options = [f"--tail={lines or -1}", "--all-containers", *(["--follow"] if follow else [])]
                self._target.show("logs", shown, *options)
            elif not follow and pod is None:
                raise UserError(f"Job {job} has no log yet: it is {queue.state(job, steps=False).describe()}")
            if not follow or found.ended:
                return EXIT_COMPLETE
            time.sleep(1)
            queue = asking() or queue

    def wait(self, job: str, timeout: float | None) -> int:
        def ask() -> JobState:
            queue = Queue(self._target)
            self._release(queue, queue.job(job))
            return queue.state(job, steps=False)

        self.state(job)  # a mistyped name or a cluster that does not answer is said at once
        return wait_for(job, timeout, ask)

    def _release(self, queue: Queue, job: KubernetesJob) -> None:
        """Set a Job going that has no gate once the one before it is complete; its first step verifies that one's run.
        The one before it likewise."""
        before = queue.jobs.get(job.after) if job.after else None
        if before is not None:
            self._release(queue, before)
        if (
            job.after is None
            or job.state != "PAUSED"
            or (job.after and (before is None or before.state != "COMPLETED"))
        ):
            return
        pods = int(job.job["metadata"]["annotations"].get(PODS, "1"))
        self._target.ask("patch", "job", job.name, "-p", json.dumps({"spec": {"parallelism": pods}}))
        print(f"Job {job.name} is released: {pods} pod(s)", flush=True)

    def alive(self, job: str) -> bool | None:
        return None  # a pod may not ask; it is known by its sign of life (hvd.runtime.heartbeat)
