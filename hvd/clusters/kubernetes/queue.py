"""Asking Kubernetes, through the user's kubectl: our Jobs, how far they are, their logs; and deleting them.

A Job is named, not numbered; it is ours by the label app.kubernetes.io/name=hvd. Which cluster and namespace, and with
which credentials, is kubectl's business (its current context).
"""

import contextlib
import datetime
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvd.clusters import base
from hvd.clusters.base import JobState, Unreachable
from hvd.errors import Failed, UserError, nearest

OURS = "app.kubernetes.io/name=hvd"
COMPONENT = "app.kubernetes.io/component"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,250}[a-z0-9])?")
_ANSWER_S = 60.0
# `value:  52%|####  | 31/60 [00:15<00:14,  2.03step/s, loss=5.4]`
_BAR = re.compile(r"(\d+)/(\d+) \[[^\[\]]*?,\s*([\d.]+)(step/s|s/step)")


@dataclass(frozen=True)
class KubernetesJob:
    """A Job and its pods, as the API has them. `pods`: oldest first."""

    job: Mapping[str, Any]
    pods: Sequence[Mapping[str, Any]]

    @property
    def name(self) -> str:
        return self.job["metadata"]["name"]

    @property
    def stage(self) -> str:
        return self.job["metadata"].get("labels", {}).get(COMPONENT, "")

    @property
    def args(self) -> Sequence[str]:
        return self.job["spec"]["template"]["spec"]["containers"][0].get("args") or ()

    @property
    def ended(self) -> bool:
        return self.state in ("COMPLETED", "FAILED")

    @property
    def state(self) -> str:
        condition = self._condition()
        if condition:
            return {"Complete": "COMPLETED", "Failed": "FAILED"}[condition["type"]]
        if self.job["spec"].get("parallelism") == 0 or self.job["spec"].get("suspend"):
            return "PAUSED"
        living = [pod for pod in self.pods if pod["status"].get("phase") in ("Pending", "Running")]
        return "RUNNING" if any(pod["status"]["phase"] == "Running" for pod in living) else "PENDING"

    @property
    def reason(self) -> str:
        """Why it failed, or waits."""
        condition = self._condition()
        if condition and condition["type"] == "Failed":
            said = self._last_words()
            return said or ": ".join(word for word in (condition.get("reason"), condition.get("message")) if word)
        if self.state != "PENDING":
            return ""
        for pod in reversed(self.pods):
            status = pod["status"]
            for one in [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]:
                waiting = one.get("state", {}).get("waiting", {})
                if waiting.get("reason") not in (None, "PodInitializing", "ContainerCreating"):
                    return ": ".join(word for word in (waiting["reason"], waiting.get("message")) if word)
            for one in status.get("conditions", ()):
                if one["type"] == "PodScheduled" and one["status"] == "False":
                    return one.get("message", one.get("reason", ""))
        return ""

    @property
    def exit_code(self) -> int | None:
        """Of the Job's last pod that has ended."""
        codes = [code for pod in self.pods for code in _exit_codes(pod)]
        return codes[-1] if codes else (0 if self.state == "COMPLETED" else None)

    @property
    def nodes(self) -> str:
        names = {pod["spec"].get("nodeName", "") for pod in self.pods if pod["status"].get("phase") == "Running"}
        return ",".join(sorted(names - {""}))

    @property
    def restarts(self) -> int:
        return int(self.job["status"].get("failed", 0))

    def option(self, flag: str) -> str:
        """What the container's arguments give for the flag; "" for nothing."""
        for name, value in zip(self.args, [*self.args[1:], ""], strict=False):
            if name == flag:
                return value
            if name.startswith(f"{flag}="):
                return name.partition("=")[2]
        return ""

    def _condition(self) -> Mapping[str, Any] | None:
        conditions = self.job["status"].get("conditions") or ()
        return next((c for c in conditions if c["type"] in ("Complete", "Failed") and c["status"] == "True"), None)

    def _last_words(self) -> str:
        """The last line that a failed pod's log ends with, `error: ...` or `failed: ...`."""
        for pod in reversed(self.pods):
            status = pod["status"]
            for one in [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]:
                ended = one.get("state", {}).get("terminated", {})
                if ended.get("exitCode"):
                    lines = [line for line in ended.get("message", "").splitlines() if line.strip()]
                    return lines[-1].strip() if lines else f"exit code {ended['exitCode']} ({ended.get('reason', '')})"
        return ""


def _exit_codes(pod: Mapping[str, Any]) -> list[int]:
    status = pod["status"]
    found = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    ended = [one["state"]["terminated"]["exitCode"] for one in found if "terminated" in one.get("state", {})]
    return [max(ended, key=bool)] if ended else []


# ------------------------------------------------------------------------------------------------------------- asking


def available() -> bool:
    """Does kubectl know a cluster? Asks no cluster."""
    if not shutil.which("kubectl"):
        return False
    asked = subprocess.run(["kubectl", "config", "current-context"], capture_output=True, text=True, check=False)
    return asked.returncode == 0 and bool(asked.stdout.strip())


def is_name(text: str) -> bool:
    """May it be the name of a Job? Those of Slurm are numbers only."""
    return bool(_NAME.fullmatch(text)) and not text.isdigit()


def find() -> dict[str, KubernetesJob]:
    """Our Jobs of the namespace, oldest first.

    Raises:
        Unreachable: the cluster does not answer, or refuses.
    """
    jobs = json.loads(kubectl("get", "jobs", "-l", OURS, "-o", "json"))["items"]
    pods = json.loads(kubectl("get", "pods", "-l", f"{OURS},job-name", "-o", "json"))["items"] if jobs else []
    pods.sort(key=lambda pod: pod["metadata"]["creationTimestamp"])
    found = [
        KubernetesJob(job, [pod for pod in pods if pod["metadata"]["labels"]["job-name"] == job["metadata"]["name"]])
        for job in sorted(jobs, key=lambda job: job["metadata"]["creationTimestamp"])
    ]
    return {one.name: one for one in found}


def one(name: str, found: Mapping[str, KubernetesJob] | None = None) -> KubernetesJob:
    """Our Job of that name, of those `found` or else asked for; UserError where there is none."""
    found = find() if found is None else found
    if name not in found:
        raise UserError(f"no Job {name} of hvd in this namespace{nearest(name, found) if found else ', nor any other'}")
    return found[name]


def kubectl(*argv: str, stdin: str | None = None) -> str:
    """What it prints.

    Raises:
        Unreachable: it failed; its last line is in the text.
    """
    try:
        done = subprocess.run(
            ["kubectl", *argv], input=stdin, capture_output=True, text=True, timeout=_ANSWER_S, check=False
        )
    except FileNotFoundError:
        raise UserError("there is no kubectl on this machine") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"kubectl {argv[0]} did not answer within {_ANSWER_S:.0f} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Unreachable(f"kubectl {argv[0]}: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout


# ------------------------------------------------------------------------------------------------------------ showing


def rows(jobs: Mapping[str, KubernetesJob]) -> list[JobState]:
    """The Jobs as `hvd jobs list` shows them; steps and rate are those of the log's last progress bar."""
    waits = waiting_for(jobs)
    return [_row(job, waits.get(name, "")) for name, job in jobs.items()]


def waiting_for(jobs: Mapping[str, KubernetesJob]) -> dict[str, str]:
    """Job -> the one it waits for, as the gates have it."""
    gates = [job for job in jobs.values() if job.stage == "gate"]
    found = {job.option("--policy-job"): job.option("--value-job") for job in gates}
    found |= {job.name: job.option("--value-job") for job in gates}
    return {name: other for name, other in found.items() if name and other}


def _row(job: KubernetesJob, after: str) -> JobState:
    step, total, rate = progress(job)
    left = None if step is None or total is None or not rate else (total - step) / rate
    return JobState(
        id=job.name,
        stage=job.stage,
        name=job.name,
        experiment=job.option("--exp_name") or job.option("--exp-name") or job.option("--config"),
        state=job.state,
        reason=job.reason,
        exit_code=job.exit_code if job.ended else None,
        nodes=job.nodes,
        step=step,
        total=total,
        steps_per_s=rate,
        eta_s=None if job.ended else left,
        restarts=job.restarts,
        causes={},
        last_checkpoint=None,
        complete=job.state == "COMPLETED",
        waiting_for=[after] if after and job.state in ("PAUSED", "PENDING") else [],
        submitted=job.job["metadata"]["creationTimestamp"],
        log=f"kubectl logs job/{job.name}",
        ended=job.ended,
    )


def progress(job: KubernetesJob) -> tuple[int | None, int | None, float | None]:
    """(step, steps, steps a second) of the newest pod's log; None where it shows none."""
    if job.stage == "gate" or not job.pods or job.state == "PENDING":
        return None, None, None
    with contextlib.suppress(Failed):
        text = kubectl("logs", job.pods[-1]["metadata"]["name"], "--tail=1", "--limit-bytes=200000")
        found = _BAR.findall(text)
        if found:
            step, total, number, unit = found[-1]
            rate = float(number) if unit == "step/s" else 1 / float(number) if float(number) else None
            return int(step), int(total), rate
    return None, None, None


def recent(job: KubernetesJob, days: float) -> bool:
    """Does the Job live, or has it ended within the last days?"""
    times = [one.get("lastTransitionTime") for one in job.job["status"].get("conditions") or ()]
    return not job.ended or not times[0] or base.recent(datetime.datetime.fromisoformat(times[0]), days)


def describe(job: KubernetesJob) -> str:
    """`RUNNING on node1`, `FAILED, exit code 2: error: ...`."""
    text = job.state + (f" on {job.nodes}" if job.nodes and not job.ended else "")
    text += f", {job.restarts} failed pod(s)" if job.restarts and not job.ended else ""
    text += f", exit code {job.exit_code}" if job.state == "FAILED" and job.exit_code is not None else ""
    return f"{text}: {job.reason}" if job.reason else text


def result(job: KubernetesJob) -> int:
    """What `hvd jobs wait` ends with."""
    return 0 if job.state == "COMPLETED" else job.exit_code or 1


# --------------------------------------------------------------------------------------------------- logs, wait, cancel


def wait(name: str, timeout: float | None) -> int:
    """Until the Job has ended, or its gate has failed; a line for each change of its state.

    Returns:
        Its exit code, or that of the gate; EXIT_TIMEOUT after `timeout` seconds.
    """
    began, said, job = time.monotonic(), "", one(name)
    while True:
        text = describe(job)
        if text != said:
            print(f"{time.strftime('%H:%M:%S')} {name}: {text}", flush=True)
            said = text
        if job.ended:
            return result(job)
        if job.state == "PAUSED" and (gate := _failed_gate(name)):
            print(f"{name} will not start: its gate {gate.name} {describe(gate)}", flush=True)
            return result(gate)
        if timeout is not None and time.monotonic() - began > timeout:
            print(f"Job {name} has not ended within {timeout:g} s; it is left alone", file=sys.stderr)
            return base.EXIT_TIMEOUT
        time.sleep(1)
        job = _again(name, job)


def _failed_gate(name: str) -> KubernetesJob | None:
    """The Job's gate, if that has failed."""
    with contextlib.suppress(Unreachable):
        gates = [job for job in find().values() if job.stage == "gate" and job.option("--policy-job") == name]
        return next((gate for gate in gates if gate.state == "FAILED"), None)
    return None


def _again(name: str, last: KubernetesJob) -> KubernetesJob:
    """The Job once more; as it was while the cluster does not answer. UserError when it has been deleted."""
    try:
        return one(name)
    except Unreachable:
        return last


def logs(name: str, lines: int, follow: bool) -> int:
    """The newest pod's log; with `follow` that of its successors too, until the Job has ended."""
    job, shown = one(name), ""
    while True:
        pod = next((pod for pod in reversed(job.pods) if pod["status"].get("phase") != "Pending"), None)
        if pod is not None and pod["metadata"]["name"] != shown:
            shown = pod["metadata"]["name"]
            limit = f"--tail={lines or -1}"
            command = ["kubectl", "logs", shown, limit, "--all-containers", *(["--follow"] if follow else [])]
            subprocess.run(command, check=False)
        elif not follow and pod is None:
            raise UserError(f"Job {name} has no log yet: it is {describe(job)}")
        if not follow or job.ended:
            return 0
        time.sleep(1)
        job = _again(name, job)


def doomed(jobs: Mapping[str, KubernetesJob], name: str) -> list[str]:
    """The Job and those that cannot go on without it: its gate, and what that holds back."""
    found = [name]
    for job in (job for job in jobs.values() if job.stage == "gate"):
        value, policy = job.option("--value-job"), job.option("--policy-job")
        if name in (value, policy, job.name):
            found += [one for one in (job.name, policy) if one in jobs and one not in found]
    return found


def delete(names: Iterable[str]) -> None:
    """Delete the Jobs: their pods get SIGTERM and save. Those that have gone already are nobody's mistake."""
    kubectl("delete", "jobs", *names, "--ignore-not-found", "--wait=false", "--cascade=background")
