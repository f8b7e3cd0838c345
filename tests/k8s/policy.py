"""What every shipped manifest must keep to, check by check: a check yields a line for each thing that breaks it.

`violations` says `check: Kind/name: what`. tests/k8s/test_policy.py shows for each check that it can fail.
"""

import re
from collections.abc import Callable, Iterator

from hvd import errors
from tests.k8s.render import Document, component, containers, jobs

# Restricted Pod Security allows a few more
VOLUMES = {"emptyDir", "persistentVolumeClaim", "csi"}
KINDS = {"Job", "JobSet", "PersistentVolumeClaim", "Service", "ServiceAccount", "Role", "RoleBinding"}
SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)
WEEK = 7 * 24 * 3600
STAGES = ("value", "policy")
# What Kubernetes does with a pod that ended so: 76, and whatever is in no list, counts against backoffLimit
TRAINER_CODES = {
    errors.EXIT_FAILED: "FailJob",
    errors.EXIT_USER: "FailJob",
    errors.EXIT_LOST: "Ignore",
    errors.EXIT_STOPPED: "Ignore",
    errors.EXIT_HUNG: "Count",
    137: "Count",
}
GATE_CODES = {errors.EXIT_FAILED: "FailJob", errors.EXIT_USER: "FailJob", errors.EXIT_STOPPED: "Ignore", 137: "Count"}

Check = Callable[[list[Document]], Iterator[str]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__.strip("_").replace("_", "-")] = function
    return function


def violations(found: list[Document], skip: tuple[str, ...] = ()) -> list[str]:
    return [f"{name}: {line}" for name, one in CHECKS.items() if name not in skip for line in one(found)]


def quantity(text: str | int) -> float:
    """A quantity of Kubernetes in its unit: 512Mi, 100m, 8."""
    units = {"m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    assert match, text
    return float(match[1]) * units[match[2]]


def _pods(found: list[Document]) -> Iterator[tuple[str, Document, Document]]:
    """(where, the Job, its pod's spec)"""
    for job in jobs(found):
        yield f"Job/{job['metadata']['name']}", job, job["spec"]["template"]["spec"]


def _containers(found: list[Document]) -> Iterator[tuple[str, Document, Document]]:
    """(where, the container, its security context)"""
    for where, job, _ in _pods(found):
        for container in containers(job):
            yield f"{where} {container['name']}", container, container.get("securityContext", {})


@check
def _kinds(found):
    for one in found:
        if one["kind"] not in KINDS:
            yield f"{one['kind']}/{one['metadata']['name']} does not belong here"


@check
def _non_root(found):
    for where, _, pod in _pods(found):
        context = pod.get("securityContext", {})
        if context.get("runAsNonRoot") is not True:
            yield f"{where}: runAsNonRoot is not true"
        for field in ("runAsUser", "runAsGroup", "fsGroup"):
            if not isinstance(context.get(field), int) or context[field] < 1000:
                yield f"{where}: {field} {context.get(field)!r}"
    for where, _, context in _containers(found):
        for field in ("runAsNonRoot", "runAsUser", "runAsGroup"):
            if field in context:
                yield f"{where}: {field} overrides the pod's"


@check
def _privilege_escalation(found):
    for where, _, context in _containers(found):
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{where}: allowPrivilegeEscalation is not false"


@check
def _capabilities(found):
    for where, _, context in _containers(found):
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{where}: capabilities {context.get('capabilities')}"


@check
def _seccomp(found):
    for where, _, pod in _pods(found):
        if pod.get("securityContext", {}).get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{where}: seccompProfile is not RuntimeDefault"
    for where, _, context in _containers(found):
        if "seccompProfile" in context:
            yield f"{where}: seccompProfile overrides the pod's"


@check
def _read_only_root(found):
    for where, _, context in _containers(found):
        if context.get("readOnlyRootFilesystem") is not True:
            yield f"{where}: readOnlyRootFilesystem is not true"


@check
def _host(found):
    for where, _, pod in _pods(found):
        for field in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.get(field):
                yield f"{where}: {field}"
        if pod.get("securityContext", {}).get("sysctls"):
            yield f"{where}: sysctls"
    for where, container, context in _containers(found):
        if context.get("privileged") or context.get("procMount", "Default") != "Default":
            yield f"{where}: privileged"
        for port in container.get("ports", ()):
            if "hostPort" in port:
                yield f"{where}: hostPort"


@check
def _volumes(found):
    for where, _, pod in _pods(found):
        for volume in pod.get("volumes", ()):
            kinds = set(volume) - {"name"}
            if len(kinds) != 1 or not kinds <= VOLUMES:
                yield f"{where}: volume {volume['name']} is {sorted(kinds)}"


@check
def _scratch(found):
    """/tmp everywhere and /dev/shm for the trainers are writable, and bounded."""
    for where, job, pod in _pods(found):
        empty = {volume["name"]: volume["emptyDir"] for volume in pod.get("volumes", ()) if "emptyDir" in volume}
        for name, volume in empty.items():
            if "sizeLimit" not in (volume or {}):
                yield f"{where}: emptyDir {name} has no sizeLimit"
        for container in containers(job):
            mounts = {one["mountPath"]: one for one in container.get("volumeMounts", ())}
            needed = ("/tmp", "/dev/shm") if container["name"] == "train" else ("/tmp",)
            for path in needed:
                mount = mounts.get(path)
                if mount is None or mount["name"] not in empty or mount.get("readOnly"):
                    yield f"{where} {container['name']}: {path} is no writable emptyDir"
                elif path == "/dev/shm" and (empty[mount["name"]] or {}).get("medium") != "Memory":
                    yield f"{where} {container['name']}: {path} does not lie in memory"


@check
def _token(found):
    """Only the gate talks to the cluster."""
    for where, job, pod in _pods(found):
        if pod.get("automountServiceAccountToken") is not (component(job) == "gate"):
            yield f"{where}: automountServiceAccountToken is {pod.get('automountServiceAccountToken')}"
        if pod.get("enableServiceLinks") is not False:
            yield f"{where}: enableServiceLinks is not false"
    for one in found:
        if one["kind"] == "ServiceAccount" and one.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount/{one['metadata']['name']}: automountServiceAccountToken is not false"


@check
def _rbac(found):
    """The gate may read the value Job and patch the policy Job; nobody else has rights."""
    by_stage = {component(job): job["metadata"]["name"] for job in jobs(found)}
    roles = [one for one in found if one["kind"] == "Role"]
    bindings = [one for one in found if one["kind"] == "RoleBinding"]
    if "gate" not in by_stage:
        if roles or bindings:
            yield "rights, but no gate"
        return
    gate = next(job for job in jobs(found) if component(job) == "gate")
    account = gate["spec"]["template"]["spec"].get("serviceAccountName", "default")
    allowed = [
        {"apiGroups": ["batch"], "resources": ["jobs"], "resourceNames": [by_stage.get(stage)], "verbs": [verb]}
        for stage, verb in (("value", "get"), ("policy", "patch"))
    ]
    if len(roles) != 1 or roles[0]["rules"] != allowed:
        yield f"the Roles are not exactly {allowed}"
    subjects = [{"kind": "ServiceAccount", "name": account}]
    names = [one["metadata"]["name"] for one in roles]
    if len(bindings) != 1 or bindings[0]["subjects"] != subjects or [bindings[0]["roleRef"]["name"]] != names:
        yield f"the RoleBindings do not bind ServiceAccount {account} alone"
    for where, job, pod in _pods(found):
        if component(job) != "gate" and pod.get("serviceAccountName") == account:
            yield f"{where}: it has the gate's account"


@check
def _memory(found):
    for where, container, _ in _containers(found):
        resources = container.get("resources", {})
        limits, requests = resources.get("limits", {}), resources.get("requests", {})
        if "memory" not in limits:
            yield f"{where}: no memory limit"
        elif quantity(requests.get("memory", 0)) > quantity(limits["memory"]):
            yield f"{where}: more memory requested than allowed"
        if not {"cpu", "memory"} <= set(requests):
            yield f"{where}: no requests of cpu and memory"


@check
def _shared_memory(found):
    """What lies in an emptyDir of memory counts as the container's memory."""
    for where, job, pod in _pods(found):
        for volume in pod.get("volumes", ()):
            if (volume.get("emptyDir") or {}).get("medium") == "Memory" and "sizeLimit" in volume["emptyDir"]:
                limit = quantity(containers(job)[-1].get("resources", {}).get("limits", {}).get("memory", 0))
                if quantity(volume["emptyDir"]["sizeLimit"]) >= limit:
                    yield f"{where}: {volume['name']} may take all of the container's memory"


@check
def _gpus(found):
    for where, job, _ in _pods(found):
        for container in containers(job):
            limits = container.get("resources", {}).get("limits", {})
            if (limits.get("nvidia.com/gpu", 0) > 0) is not (container["name"] == "train"):
                yield f"{where} {container['name']}: {limits.get('nvidia.com/gpu', 0)} GPUs"
            expected = _value(container, "HVD_EXPECT_GPUS")
            if container["name"] == "train" and expected in (None, "", "0"):
                yield f"{where} train: it would train without GPUs"


@check
def _grace(found):
    for where, job, pod in _pods(found):
        for container in containers(job):
            seconds = _value(container, "HVD_GRACE_SECONDS")
            if container["name"] == "train" and not 0 < float(seconds or 0) < pod.get(
                "terminationGracePeriodSeconds", 30
            ):
                yield f"{where}: HVD_GRACE_SECONDS {seconds} against {pod.get('terminationGracePeriodSeconds')}"


@check
def _restart(found):
    for where, _, pod in _pods(found):
        if pod.get("restartPolicy") != "Never":
            yield f"{where}: restartPolicy {pod.get('restartPolicy')}"


@check
def _exit_codes(found):
    for where, job, _ in _pods(found):
        rules = job["spec"].get("podFailurePolicy", {}).get("rules", [])
        disruption = {"type": "DisruptionTarget", "status": "True"}
        if not rules or rules[0] != {"action": "Ignore", "onPodConditions": [disruption]}:
            yield f"{where}: a disruption is not ignored before anything else"
        for code, action in (GATE_CODES if component(job) == "gate" else TRAINER_CODES).items():
            if _action(rules, code) != action:
                yield f"{where}: exit code {code} -> {_action(rules, code)}, not {action}"
        if job["spec"].get("backoffLimit", 6) < 1:
            yield f"{where}: backoffLimit allows no second attempt"


def _action(rules: list[Document], code: int) -> str:
    """What the Job's controller does: the first rule that matches, in order."""
    for rule in rules:
        codes = rule.get("onExitCodes")
        if codes and (code in codes["values"]) is (codes["operator"] == "In"):
            return rule["action"]
    return "Count"


@check
def _secrets(found):
    for where, container, _ in _containers(found):
        if container.get("envFrom"):
            yield f"{where}: envFrom"
        for variable in container.get("env", ()):
            source = variable.get("valueFrom", {})
            if SECRET.search(variable["name"]) and set(source) != {"secretKeyRef"}:
                yield f"{where}: {variable['name']} does not come by secretKeyRef"
            if not set(source) <= {"secretKeyRef", "fieldRef"}:
                yield f"{where}: {variable['name']} comes from {sorted(source)}"
        for word in (*container.get("command", ()), *container.get("args", ())):
            if SECRET.search(word):
                yield f"{where}: {word!r} in the arguments"


@check
def _images(found):
    for where, container, _ in _containers(found):
        name, _, tag = container["image"].rpartition("/")[2].partition(":")
        if "@sha256:" not in container["image"] and tag in ("", "latest"):
            yield f"{where}: image {name} has tag {tag!r}"
        if "hvd" not in container["image"]:
            yield f"{where}: image {container['image']} is not ours"
    if len({container["image"] for _, container, _ in _containers(found)}) > 1:
        yield "the containers have different images"


@check
def _labels(found):
    for one in [*found, *jobs(found)]:
        labels = one["metadata"].get("labels", {})
        if labels.get("app.kubernetes.io/name") != "hvd" or not labels.get("app.kubernetes.io/component"):
            yield f"{one['kind']}/{one['metadata']['name']}: recommended labels are missing"
    for where, job, _ in _pods(found):
        for field in ("name", "component", "part-of"):
            key = f"app.kubernetes.io/{field}"
            if job["spec"]["template"]["metadata"]["labels"].get(key) != job["metadata"]["labels"].get(key):
                yield f"{where}: {key} of its pods is another one"


@check
def _ttl(found):
    """Ended Jobs stay for the gate, and for people, but not for ever. A JobSet would do a Job that has gone anew."""
    for one in found:
        if one["kind"] in ("Job", "JobSet") and not WEEK <= one["spec"].get("ttlSecondsAfterFinished", 0) <= 8 * WEEK:
            yield f"{one['kind']}/{one['metadata']['name']}: ttlSecondsAfterFinished"
        for replicated in one["spec"]["replicatedJobs"] if one["kind"] == "JobSet" else ():
            if "ttlSecondsAfterFinished" in replicated["template"]["spec"]:
                yield f"JobSet/{one['metadata']['name']} {replicated['name']}: ttlSecondsAfterFinished"


def _value(container: Document, name: str) -> str | None:
    return next((one.get("value") for one in container.get("env", ()) if one["name"] == name), None)
