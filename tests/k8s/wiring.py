"""The other checks, which join those of tests/k8s/policy.py: what in a manifest refers to something else in it."""

import re
from typing import Any

from tests.k8s.policy import CHECKS, STAGES, check, violations
from tests.k8s.render import Document, component, containers, jobs

__all__ = ["CHECKS", "violations"]

INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@check
def _references(found):
    """Volumes, claims and accounts that are named are there."""
    named = {(one["kind"], one["metadata"]["name"]) for one in found}
    for job in jobs(found):
        where, pod = f"Job/{job['metadata']['name']}", job["spec"]["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
        used = set()
        for container in containers(job):
            paths = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
            if len(paths) != len(set(paths)):
                yield f"{where} {container['name']}: two mounts at one path"
            for mount in container.get("volumeMounts", ()):
                used.add(mount["name"])
                if mount["name"] not in volumes:
                    yield f"{where} {container['name']}: there is no volume {mount['name']}"
            if not any(f"{container.get('workingDir', '')}/".startswith(f"{path}/") for path in paths):
                yield f"{where} {container['name']}: workingDir {container.get('workingDir')} is on no volume"
        for name in set(volumes) - used:
            yield f"{where}: volume {name} is not mounted"
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and ("PersistentVolumeClaim", claim) not in named:
                yield f"{where}: there is no claim {claim}"
        account = pod.get("serviceAccountName")
        if account and ("ServiceAccount", account) not in named:
            yield f"{where}: there is no ServiceAccount {account}"


@check
def _variables(found):
    """$(NAME) is replaced only where NAME stands before it; and no variable is set twice."""
    for job in jobs(found):
        for container in containers(job):
            where, before = f"Job/{job['metadata']['name']} {container['name']}", set()
            for variable in container.get("env", ()):
                for name in re.findall(r"\$\((\w+)\)", variable.get("value", "")):
                    if name not in before:
                        yield f"{where}: {variable['name']} comes before {name}, which it needs"
                if variable["name"] in before:
                    yield f"{where}: {variable['name']} is set twice"
                before.add(variable["name"])


@check
def _owner(found):
    """The trainer knows its pod and Job: hvd.runtime.owner asks; and its job's folder is on the storage."""
    wanted = {
        "HVD_POD_UID": "metadata.uid",
        "HVD_JOB_NAME": "metadata.labels['job-name']",
        "HVD_JOB_UID": "metadata.labels['controller-uid']",
    }
    for job in jobs(found):
        for container in containers(job):
            if container["name"] != "train":
                continue
            where, env = f"Job/{job['metadata']['name']}", _environment(container)
            for name, path in wanted.items():
                if env.get(name, {}).get("valueFrom", {}).get("fieldRef", {}).get("fieldPath") != path:
                    yield f"{where}: {name} is not {path}"
            folder = env.get("HVD_JOB_DIR", {}).get("value", "")
            if not (folder.startswith("/storage/") and folder.endswith("/$(HVD_JOB_UID)")):
                yield f"{where}: HVD_JOB_DIR {folder!r}"


@check
def _order(found):
    """The policy does not start by itself: the gate releases it, or the JobSet creates it after the value stage."""
    stages = {component(job): job for job in jobs(found)}
    for stage in STAGES:
        if stage not in stages:
            yield f"there is no Job of the {stage} stage"
    if set(STAGES) - set(stages):
        return
    pods = {stage: job["spec"].get("parallelism", 1) for stage, job in stages.items()}
    if pods["value"] != stages["value"]["spec"].get("completions"):
        yield "the value Job's parallelism is not its completions"
    if "gate" in stages:
        args: list[str] = containers(stages["gate"])[0]["args"]
        if pods["policy"] != 0:
            yield "the policy Job is not paused"
        for option, stage in (("--value-job", "value"), ("--policy-job", "policy")):
            if args[args.index(option) + 1] != stages[stage]["metadata"]["name"]:
                yield f"the gate's {option} is {args[args.index(option) + 1]}"
        if int(args[args.index("--pods") + 1]) != stages["policy"]["spec"].get("completions"):
            yield "the gate's --pods is not the policy Job's completions"
    else:
        (jobset,) = [one for one in found if one["kind"] == "JobSet"]
        first, second = jobset["spec"]["replicatedJobs"]
        if "dependsOn" in first or second.get("dependsOn") != [{"name": first["name"], "status": "Complete"}]:
            yield "the JobSet's policy does not depend on its complete value stage"
        if pods["policy"] != stages["policy"]["spec"].get("completions"):
            yield "the policy Job's parallelism is not its completions"


@check
def _processes(found):
    """Several pods of a Job find each other: index, headless Service, coordinator; and lie on different nodes."""
    for job in jobs(found):
        spec, pod = job["spec"], job["spec"]["template"]["spec"]
        where, name, count = f"Job/{job['metadata']['name']}", job["metadata"]["name"], spec.get("completions", 1)
        if spec.get("completionMode") != "Indexed":
            if count != 1:
                yield f"{where}: {count} pods that do not know their number"
            continue
        for container in containers(job):
            env = _environment(container)
            if env.get("HVD_PROCESS_ID", {}).get("valueFrom") != {"fieldRef": {"fieldPath": INDEX}}:
                yield f"{where} {container['name']}: HVD_PROCESS_ID is not the pod's index"
            if container["name"] != "train":
                continue
            if env.get("HVD_NUM_PROCESSES", {}).get("value") != str(count):
                yield f"{where}: HVD_NUM_PROCESSES is not {count}"
            host, _, port = env.get("HVD_COORDINATOR", {}).get("value", "").partition(":")
            if host != f"{name}-0.{pod.get('subdomain')}":
                yield f"{where}: HVD_COORDINATOR {host!r} is not process 0's name"
            if port not in [str(one["containerPort"]) for one in container.get("ports", ())]:
                yield f"{where}: the coordinator's port {port!r} is not told"
        if spec.get("backoffLimit", 6) < 3 * count:
            yield f"{where}: backoffLimit {spec.get('backoffLimit')} is used up by {count} pods that fail together"
        yield from _service(found, where, name, pod)
        terms = pod.get("affinity", {}).get("podAntiAffinity", {})
        apart: Any = {
            "topologyKey": "kubernetes.io/hostname",
            "labelSelector": {"matchLabels": {"batch.kubernetes.io/job-name": name}},
        }
        if apart not in terms.get("requiredDuringSchedulingIgnoredDuringExecution", ()):
            yield f"{where}: two pods may lie on one node"


def _service(found: list[Document], where: str, job: str, pod: Document):
    services = {one["metadata"]["name"]: one["spec"] for one in found if one["kind"] == "Service"}
    service = services.get(pod.get("subdomain", ""))
    if service is None:
        yield f"{where}: there is no Service {pod.get('subdomain')}"
        return
    if service.get("clusterIP") != "None":
        yield f"{where}: its Service is not headless"
    if service.get("publishNotReadyAddresses") is not True:
        yield f"{where}: its Service hides pods that are not ready"
    if service.get("selector") != {"batch.kubernetes.io/job-name": job}:
        yield f"{where}: its Service selects {service.get('selector')}"


def _environment(container: Document) -> dict[str, Document]:
    return {one["name"]: one for one in container.get("env", ())}
