"""The small job of `hvd site check` on Kubernetes: the value Job of the manifests, with another step and name."""

import contextlib
import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

from hvd.clusters.base import JobState, Request, Unreachable
from hvd.clusters.kubernetes import kubectl, manifests, site
from hvd.clusters.kubernetes.queue import COMPONENT, Queue, own_container
from hvd.configs import Experiment
from hvd.errors import UserError
from hvd.files import is_local
from hvd.overrides import Flag
from hvd.site import probe
from hvd.site.findings import Asked, Report
from hvd.site.options import Check, Probe

_STOP_S = 30  # that a pod of ours has to clear up
_LATER_S = 3600  # after which the cluster itself ends a Job whose launcher was killed


class Trial:
    """See hvd.site.command.Trial."""

    def __init__(self, cfg: Experiment, flags: Sequence[Flag], wanted: Check, seconds: int):
        asked = site.load(flags)
        token = secrets.token_hex(4)
        name = f"hvd-site-{token}"
        runs = cfg.runs_dir if is_local(cfg.runs_dir) else "runs"
        words = ("site", *Probe(f"{runs}/.hvd-site-{token}", wanted.patience).words())
        docs = _value(cfg, 1 if asked.overlay else wanted.nodes or 2, asked, name)
        if asked.overlay and wanted.nodes != 1 and (wanted.nodes or "completionMode" in _job(docs)["spec"]):
            docs = _value(cfg, wanted.nodes or 2, asked, name)
        self._target = kubectl.Target(asked.context, manifests.namespace(docs))
        self._docs, self._job, self._begun = docs, _job(docs), False
        self._name = self._job["metadata"]["name"]
        spec, pod = self._job["spec"], self._job["spec"]["template"]["spec"]
        nodes, container = spec.get("completions", 1), own_container(self._job)
        variables = {one["name"]: one.get("value", "") for one in container.get("env", ())}
        grace = variables.get("HVD_GRACE_SECONDS", "")
        self.asked = Asked(
            nodes=nodes,
            processes=nodes,
            gpus=manifests.gpus([self._job], asked.gpu_resource),
            limit=spec.get("activeDeadlineSeconds"),
            grace=int(grace) if grace.isdigit() else 0,
            stop=pod.get("terminationGracePeriodSeconds", 30),
            limit_option="activeDeadlineSeconds",
            grace_option="HVD_GRACE_SECONDS",
            space=int(wanted.space * 1e9),
        )
        _turn(self._job, container, words, seconds)

    def queue(self) -> str:
        for volume in self._job["spec"]["template"]["spec"].get("volumes", ()):
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and not self._target.ask("get", "pvc", claim, "--ignore-not-found", "-o", "name"):
                raise UserError(f"there is no volume claim {claim}; k8s/storage.yaml makes hvd-storage")
        self._hand_over("apply", "--dry-run=server")
        return f"{self._target.describe()} takes the Job (dry run)"

    def start(self) -> None:
        self._begun = True
        self._hand_over("create")

    def state(self) -> JobState:
        return Queue(self._target).state(self._name, steps=False)

    def reports(self) -> list[Report]:
        return [report for text in self._logs() for report in probe.reports(text)]

    def last_words(self) -> str:
        lines = [line for text in self._logs() for line in text.splitlines() if line.strip() and probe.MARK not in line]
        return lines[-1] if lines else "its pods have no log"

    def images(self) -> dict[str, str]:
        found = {}
        for pod in self._pods():
            for status in pod["status"].get("containerStatuses", ()):
                if status["name"] == own_container(self._job)["name"] and status.get("imageID"):
                    found[pod["spec"].get("nodeName", "")] = status["imageID"].rpartition("@")[2]
        return found

    def remove(self) -> None:
        if self._begun:  # by their names, which nobody else has: an interrupted call may have made them
            made = [f"{doc['kind']}/{doc['metadata']['name']}" for doc in self._docs]
            gone = ("--ignore-not-found", "--cascade=foreground", f"--timeout={2 * _STOP_S}s")
            self._target.ask("delete", *made, *gone)

    def _hand_over(self, verb: str, *flags: str) -> None:
        _, refused = self._target.hand_over(verb, manifests.to_yaml(self._docs), *flags)
        if refused:
            raise UserError(f"the cluster refuses the Job: {refused}")

    def _pods(self) -> Sequence[Any]:
        with contextlib.suppress(Unreachable):
            return Queue(self._target).job(self._name).pods
        return ()

    def _logs(self) -> list[str]:
        texts, container = [], own_container(self._job)["name"]
        for pod in self._pods():
            with contextlib.suppress(Unreachable):
                if pod["status"].get("phase") != "Pending":
                    texts.append(self._target.ask("logs", pod["metadata"]["name"], "-c", container))
        return texts


def _value(cfg: Experiment, nodes: int, asked: site.Settings, name: str) -> list[manifests.Manifest]:
    """The value Job and the Services that its pods meet by; volume claims and accounts must be there already."""
    docs = manifests.render(Request(cfg, "value", (), nodes), dataclasses.replace(asked, name=name))
    return [doc for doc in docs if manifests.component(doc) == "value" and doc["kind"] in ("Job", "Service")]


def _job(docs: Sequence[manifests.Manifest]) -> Any:
    (job,) = [doc for doc in docs if doc["kind"] == "Job"]
    return job


def _turn(job: Any, container: Any, words: Sequence[str], seconds: int) -> None:
    """Make a Job of the probe of the value Job: no preparation, one try, gone by itself where nobody removes it."""
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    for labels in (job["metadata"]["labels"], spec["template"]["metadata"]["labels"]):
        labels[COMPONENT] = "site"
    pod["initContainers"] = [one for one in pod.get("initContainers", ()) if one["name"] != "prepare"]
    pod["terminationGracePeriodSeconds"] = _STOP_S
    spec |= {"backoffLimit": 0, "activeDeadlineSeconds": seconds + _LATER_S, "ttlSecondsAfterFinished": 60}
    spec.pop("podFailurePolicy", None)
    container["args"] = list(words)
    # its records would stay on the volume
    container["env"] = [one for one in container.get("env", ()) if one["name"] != "HVD_JOB_DIR"]
    container["env"].append({"name": "HVD_NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}})
