"""Our Jobs of a Kubernetes namespace, with their pods: what state they are in and how far their training is.

A Job is named, not numbered; it is ours by the label app.kubernetes.io/name=hvd.
"""

import contextlib
import dataclasses
import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvd.clusters import base
from hvd.clusters.base import JobState
from hvd.clusters.kubernetes import kubectl
from hvd.errors import Failed, UserError, nearest

OURS = "app.kubernetes.io/name=hvd"
COMPONENT = "app.kubernetes.io/component"
OWN = ("prepare", "train", "gate", "report")  # containers of hvd; an overlay may add others
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,250}[a-z0-9])?")
# The trainer's bar: `value:  52%|####  | 31/60 [00:15<00:14,  2.03step/s, loss=5.4]`
_BAR = re.compile(r"(\d+)/(\d+) \[[^\[\]]*?,\s*([\d.]+)(step/s|s/step)")
_MADE = "ContainerCreating"  # an image, a volume or a secret may be missing: a warning says so
_STARTS = ("PodInitializing",)  # no reason to wait: it passes
# Of a Job that no gate releases, because the user may not give one its rights: the launcher does it (cluster.py)
AFTER, PODS = "hvd/after", "hvd/pods"


@dataclass(frozen=True)
class KubernetesJob:
    """A Job and its pods, as the API has them.

    Attributes:
        pods: oldest first.
        warnings: the cluster's, oldest first, by the name of the Job or of a pod.
    """

    job: Mapping[str, Any]
    pods: Sequence[Mapping[str, Any]] = ()
    warnings: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.job["metadata"]["name"]

    @property
    def component(self) -> str:
        """value, policy, evaluate or gate."""
        return self.job["metadata"].get("labels", {}).get(COMPONENT, "")

    @property
    def ended(self) -> bool:
        return self._end() is not None

    @property
    def state(self) -> str:
        end = self._end()
        if end is not None:
            return {"Complete": "COMPLETED", "Failed": "FAILED"}[end["type"]]
        if self.job["spec"].get("parallelism") == 0 or self.job["spec"].get("suspend"):
            return "PAUSED"
        return "RUNNING" if any(pod["status"].get("phase") == "Running" for pod in self.pods) else "PENDING"

    @property
    def reason(self) -> str:
        """Why it failed, or waits."""
        if self.state == "FAILED":
            end = self._end() or {}
            last = next((word for pod in reversed(self.pods) if (word := _last_word(pod))), "")
            return last or _words(end.get("reason"), end.get("message"))
        if self.state == "PENDING":
            # without a pod (quotas, admission, a missing account) the Job itself has the warning
            names = [pod.get("metadata", {}).get("name", "") for pod in reversed(self.pods)] or [self.name]
            said = next((self.warnings[name][-1] for name in names if self.warnings.get(name)), "")
            waits = next((why for pod in reversed(self.pods) if (why := why_pending(pod))), "")
            return waits if waits and (waits != _MADE or not said) else said
        return ""

    @property
    def exit_code(self) -> int | None:
        """Of the Job's last pod that has ended."""
        ended = [[one["exitCode"] for one in _containers(pod, "terminated")] for pod in self.pods]
        codes = [max(of_pod, key=bool) for of_pod in ended if of_pod]
        return codes[-1] if codes else (0 if self.state == "COMPLETED" else None)

    @property
    def nodes(self) -> str:
        names = {pod["spec"].get("nodeName", "") for pod in self.pods if pod["status"].get("phase") == "Running"}
        return ",".join(sorted(names - {""}))

    @property
    def after(self) -> str | None:
        """The Job behind which the launcher releases this one ("" = none); None where a gate does it."""
        return self.job["metadata"].get("annotations", {}).get(AFTER)

    @property
    def chain(self) -> list[str]:
        """Of a gate: the Job that it waits for ("" = none), then those that it releases, in their order."""
        later = [self.option("policy_job"), self.option("evaluate_job")]
        return [self.option("value_job"), *(name for name in later if name)]

    @property
    def args(self) -> Sequence[str]:
        """Of the container of hvd."""
        return own_container(self.job).get("args") or ()

    def option(self, *names: str) -> str:
        """What the container's arguments give for the first option that they have; "" for none."""
        return value_of(self.args, *names)

    def within(self, days: float | None) -> bool:
        """Does the Job live, or has it ended within the last days?"""
        end = self._end()
        time = end.get("lastTransitionTime") if end else None
        return end is None or base.recent(datetime.datetime.fromisoformat(time) if time else None, days)

    def _end(self) -> Mapping[str, Any] | None:
        """The condition that says that it has ended."""
        conditions = self.job["status"].get("conditions") or ()
        return next((c for c in conditions if c["type"] in ("Complete", "Failed") and c["status"] == "True"), None)


def own_container(job: Mapping[str, Any]) -> Any:
    """The one of hvd that is no init container."""
    containers = job["spec"]["template"]["spec"]["containers"]
    return next((one for one in containers if one.get("name") in OWN), containers[0])


def value_of(args: Sequence[str], *names: str) -> str:
    """What the arguments give for the first of the options (`exp_name`) that they have; "" for none."""
    given = {}
    for word, following in zip(args, [*args[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            given[name[2:].replace("-", "_")] = value if equals else following
    return next((given[name] for name in names if given.get(name)), "")


def _words(*texts: str | None) -> str:
    return ": ".join(text for text in texts if text)


def _containers(pod: Mapping[str, Any], state: str) -> Iterator[Mapping[str, Any]]:
    """What the API says of the pod's containers that are "waiting" or "terminated", init containers first."""
    status = pod["status"]
    for container in [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]:
        if state in container.get("state", {}):
            yield container["state"][state]


def _last_word(pod: Mapping[str, Any]) -> str:
    """The last line that a failed pod's log ends with, `error: ...` or `failed: ...`."""
    for ended in _containers(pod, "terminated"):
        if ended.get("exitCode"):
            lines = [line for line in ended.get("message", "").splitlines() if line.strip()]
            return lines[-1].strip() if lines else f"exit code {ended['exitCode']} ({ended.get('reason', '')})"
    return ""


def why_pending(pod: Mapping[str, Any]) -> str:
    """What the pod itself says of why it does not run yet; "" where it says nothing."""
    for waiting in _containers(pod, "waiting"):
        if waiting.get("reason") and waiting["reason"] not in _STARTS:
            return _words(waiting["reason"], waiting.get("message"))
    for condition in pod["status"].get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return condition.get("message", condition.get("reason", ""))
    return ""


class Queue:
    """The Jobs of the namespace at one moment, oldest first: `jobs` by name, `gates` by the names that they release.

    Raises:
        Unreachable: the cluster does not answer, or refuses.
    """

    def __init__(self, target: kubectl.Target = kubectl.CURRENT) -> None:
        self._target = target
        jobs = self._items("jobs", "-l", OURS)
        pods = self._items("pods", "-l", f"{OURS},job-name") if jobs else []
        pods.sort(key=lambda pod: pod["metadata"]["creationTimestamp"])
        self.jobs: dict[str, KubernetesJob] = {}
        for job in sorted(jobs, key=lambda job: job["metadata"]["creationTimestamp"]):
            name = job["metadata"]["name"]
            self.jobs[name] = KubernetesJob(job, [p for p in pods if p["metadata"]["labels"]["job-name"] == name])
        if any(job.state == "PENDING" for job in self.jobs.values()):
            warnings = self._warnings()
            self.jobs = {name: dataclasses.replace(job, warnings=warnings) for name, job in self.jobs.items()}
        gates = [job for job in self.jobs.values() if job.component == "gate"]
        self.gates = {name: gate for gate in gates for name in gate.chain[1:]}
        for name, job in self.jobs.items():
            if job.after is not None:  # the launcher releases it; a gate was its predecessor's
                self.gates.pop(name, None)

    def _items(self, kind: str, *argv: str) -> list[Mapping[str, Any]]:
        return json.loads(self._target.ask("get", kind, *argv, "-o", "json"))["items"]

    def _warnings(self) -> dict[str, list[str]]:
        """Name of the object -> what the cluster complains of, oldest first; {} for who may not read it."""
        with contextlib.suppress(Failed):
            events = self._items("events", "--field-selector", "type=Warning")
            events.sort(key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
            found: dict[str, list[str]] = {}
            for event in events:
                said = _words(event.get("reason"), event.get("message"))
                found.setdefault(event["involvedObject"].get("name", ""), []).append(said)
            return found
        return {}

    def job(self, name: str) -> KubernetesJob:
        """UserError where there is none of that name."""
        if name not in self.jobs:
            others = nearest(name, self.jobs) if self.jobs else ", nor any other"
            other = "--kubernetes.namespace names another one"
            raise UserError(f"no Job {name} of hvd in this namespace{others} ({self._target.describe()}; {other})")
        return self.jobs[name]

    def state(self, name: str, *, steps: bool = True) -> JobState:
        """What `hvd jobs` shows. Without `steps` the Job's log is not read."""
        job = self.job(name)
        gate = job if job.component == "gate" else self.gates.get(name)
        after = self.after(name)
        step, total, rate = progress(job, self._target) if steps else (None, None, None)
        left = None if job.ended or step is None or total is None or not rate else (total - step) / rate
        state = JobState(
            id=name,
            state=job.state,
            stage=job.component,
            name=name,
            experiment=job.option("exp_name", "config"),
            reason=job.reason,
            exit_code=job.exit_code if job.ended else None,
            nodes=job.nodes,
            step=step,
            total=total,
            steps_per_s=rate,
            eta_s=left,
            restarts=int(job.job["status"].get("failed", 0)),
            complete=job.state == "COMPLETED",
            waiting_for=[after] if after and job.state in ("PAUSED", "PENDING") else [],
            submitted=job.job["metadata"]["creationTimestamp"],
            log=f"kubectl logs job/{name}",
            ended=job.ended,
        )
        return state if state.state != "PAUSED" else self._forever(state, gate)

    def after(self, name: str) -> str:
        """The Job that must be complete before this one may start; "" for none."""
        job, gate = self.jobs[name], self.gates.get(name)
        if gate is None:
            return job.chain[0] if job.component == "gate" else job.after or ""
        return gate.chain[gate.chain.index(name) - 1]

    def _forever(self, state: JobState, gate: KubernetesJob | None) -> JobState:
        """The paused Job's state, with why it never will start where that is known."""
        if gate is not None:
            code = gate.exit_code or 1
            why = f"its gate {gate.name} failed, exit code {code}: {gate.reason}"
            return dataclasses.replace(state, never=why, exit_code=code) if gate.state == "FAILED" else state
        after = self.after(state.id)
        before = self.state(after, steps=False) if after in self.jobs else None
        if before is None or not (before.state == "FAILED" or before.never):
            return state
        why = f"job {after}, which it waits for, {'will never start' if before.never else 'failed'}"
        return dataclasses.replace(state, never=why, exit_code=before.exit_code or 1)

    def dependents(self, name: str) -> list[str]:
        """The Job and those that cannot go on without it: its gate, and what comes behind."""
        names = [self.job(name).name]
        for gate in {one.name: one for one in self.gates.values()}.values():
            order = [gate.name, *gate.chain[1:]] if name == gate.name else gate.chain
            later = order[order.index(name) + 1 :] if name in order else []
            # an evaluation that is cancelled takes nothing along: the gate is the policy's, too
            if later or (len(gate.chain) == 2 and name in order):
                names += [one for one in (gate.name, *later) if one in self.jobs and one not in names]
        for other in names:
            names += [one.name for one in self.jobs.values() if one.after == other and one.name not in names]
        return names


def is_name(text: str) -> bool:
    """May it be the name of a Job? Those of Slurm are numbers only."""
    return bool(_NAME.fullmatch(text)) and not text.isdigit()


def progress(job: KubernetesJob, target: kubectl.Target) -> tuple[int | None, int | None, float | None]:
    """(step, steps, steps a second) of the bar in the newest pod's log; None where it shows none."""
    if job.component != "gate" and job.pods and job.state != "PENDING":
        with contextlib.suppress(Failed):
            name = job.pods[-1]["metadata"]["name"]
            own = ("-c", own_container(job.job).get("name", "train"))
            bars = _BAR.findall(target.ask("logs", name, *own, "--tail=1", "--limit-bytes=200000"))
            if bars:
                step, total, number, unit = bars[-1]
                rate = float(number) if unit == "step/s" else 1 / float(number) if float(number) else None
                return int(step), int(total), rate
    return None, None, None
