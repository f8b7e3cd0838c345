"""Handing manifests to Kubernetes, beside what the cluster has already."""

import json
from collections.abc import Sequence

from hvd.clusters.kubernetes import kubectl
from hvd.clusters.kubernetes.manifests import Manifest, component, to_yaml
from hvd.clusters.kubernetes.queue import KubernetesJob


def submit(manifests: Sequence[Manifest]) -> list[tuple[str, str]]:
    """Apply the manifests, after the cluster has looked at them; (stage, name) of the stages' Jobs in their order.

    A Job that lives is left as it is: to apply a released policy Job would pause it. One that has ended makes room for
    its successor, which goes on where the run stopped. A volume claim that is there holds the users' data and stays.

    Raises:
        UserError: the cluster refuses them; nothing has been changed then.
        Unreachable: it does not answer.
    """
    living, ended = _present(manifests)
    kept = {("Job", name) for name in living} | {("PersistentVolumeClaim", name) for name in _claims(manifests)}
    wanted = [doc for doc in manifests if (doc["kind"], doc["metadata"]["name"]) not in kept]
    fresh = [doc for doc in wanted if doc["kind"] != "Job" or doc["metadata"]["name"] not in ended]
    _apply(fresh, "--dry-run=server")
    for name in living:
        print(f"Job {name} is at work already; it is left as it is", flush=True)
    if ended:
        kubectl.ask("delete", "jobs", *ended, "--ignore-not-found")
    for line in _apply(wanted).splitlines():
        print(line, flush=True)
    stages = {component(doc): doc["metadata"]["name"] for doc in manifests if doc["kind"] == "Job"}
    return [(stage, stages[stage]) for stage in ("value", "policy") if stage in stages]  # kustomize sorts by name


def _apply(manifests: Sequence[Manifest], *flags: str) -> str:
    return kubectl.apply(to_yaml(manifests), *flags) if manifests else ""


def _present(manifests: Sequence[Manifest]) -> tuple[list[str], list[str]]:
    """Of the manifests' Jobs the cluster has: (names of those that live, of those that have ended)."""
    names = [doc["metadata"]["name"] for doc in manifests if doc["kind"] == "Job"]
    present = {name: KubernetesJob(job) for name, job in _items("jobs").items()}
    ours = [present[name] for name in names if name in present]
    gates = {job.option("--policy-job"): job for job in ours if job.component == "gate"}

    def over(job: KubernetesJob) -> bool:
        if job.component == "gate":  # one whose policy Job has ended is about to end, and releases no successor
            held = present.get(job.option("--policy-job"))
            return job.ended or held is None or held.ended
        # a policy Job whose gate has given up will never be released
        return job.ended or (job.state == "PAUSED" and job.name in gates and gates[job.name].ended)

    ended = [job.name for job in ours if over(job)]
    return [job.name for job in ours if job.name not in ended], ended


def _claims(manifests: Sequence[Manifest]) -> list[str]:
    """Names of the volume claims that are there already."""
    wanted = any(doc["kind"] == "PersistentVolumeClaim" for doc in manifests)
    return list(_items("persistentvolumeclaims")) if wanted else []


def _items(kind: str) -> dict[str, Manifest]:
    return {item["metadata"]["name"]: item for item in json.loads(kubectl.ask("get", kind, "-o", "json"))["items"]}
