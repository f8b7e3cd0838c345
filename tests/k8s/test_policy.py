"""Every shipped manifest keeps to every check, and every check is able to fail."""

import copy
from typing import Any

import pytest

from tests.k8s import render
from tests.k8s.policy import WEEK, quantity
from tests.k8s.render import MANIFESTS, Document, documents
from tests.k8s.wiring import CHECKS, violations

# The smoke overlay is for CPUs, clusters before podFailurePolicy, and a training that puts nothing into /dev/shm
SKIPPED = {"smoke": ("gpus", "exit-codes", "shared-memory")}

GONE = object()
POD = "spec/template/spec"
TRAIN = f"{POD}/containers/0"
PREPARE = f"{POD}/initContainers/0"
CLUSTER_ROLE = {"kind": "ClusterRole", "metadata": {"name": "x", "labels": {}}, "rules": []}
SECRET = {"kind": "Secret", "metadata": {"name": "x", "labels": {}}, "stringData": {"WANDB_API_KEY": "x"}}
TWO_RULES = {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["list"]}
TOKEN = {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}


@pytest.mark.parametrize("name", MANIFESTS)
def test_shipped_manifests_keep_to_the_policy(name):
    assert violations(documents(name), skip=SKIPPED.get(name, ())) == []


@pytest.mark.parametrize("name", SKIPPED)
def test_what_is_skipped_would_fail(name):
    found = {line.split(":")[0] for line in violations(documents(name))}
    assert found == set(SKIPPED[name])


# (check, manifest, object, path in it, new value); a path that ends in + appends
MUTATIONS: list[tuple[str, str, str, str, Any]] = [
    ("kinds", "base", "", "+", SECRET),
    ("kinds", "base", "", "+", CLUSTER_ROLE),
    ("non-root", "base", "Job/hvd-value", f"{POD}/securityContext/runAsNonRoot", GONE),
    ("non-root", "base", "Job/hvd-awr", f"{POD}/securityContext/runAsNonRoot", False),
    ("non-root", "base", "Job/hvd-awr", f"{POD}/securityContext/runAsUser", 0),
    ("non-root", "base", "Job/hvd-awr-gate", f"{POD}/securityContext/runAsUser", GONE),
    ("non-root", "base", "Job/hvd-awr-gate", f"{POD}/securityContext/runAsGroup", 0),
    ("non-root", "base", "Job/hvd-value", f"{POD}/securityContext/fsGroup", 0),
    ("non-root", "base", "Job/hvd-value", f"{PREPARE}/securityContext/runAsUser", 0),
    ("non-root", "jobset", "JobSet/hvd", f"spec/replicatedJobs/1/template/{POD}/securityContext/runAsUser", 0),
    ("privilege-escalation", "base", "Job/hvd-value", f"{TRAIN}/securityContext/allowPrivilegeEscalation", True),
    ("privilege-escalation", "base", "Job/hvd-value", f"{PREPARE}/securityContext/allowPrivilegeEscalation", GONE),
    ("capabilities", "base", "Job/hvd-awr", f"{TRAIN}/securityContext/capabilities", GONE),
    ("capabilities", "base", "Job/hvd-awr", f"{TRAIN}/securityContext/capabilities/add", ["IPC_LOCK"]),
    ("capabilities", "base", "Job/hvd-awr-gate", f"{TRAIN}/securityContext/capabilities/drop", ["NET_RAW"]),
    ("seccomp", "base", "Job/hvd-value", f"{POD}/securityContext/seccompProfile", GONE),
    ("seccomp", "base", "Job/hvd-value", f"{POD}/securityContext/seccompProfile/type", "Unconfined"),
    ("seccomp", "base", "Job/hvd-value", f"{TRAIN}/securityContext/seccompProfile", {"type": "Unconfined"}),
    ("read-only-root", "base", "Job/hvd-value", f"{PREPARE}/securityContext/readOnlyRootFilesystem", False),
    ("read-only-root", "base", "Job/hvd-awr-gate", f"{TRAIN}/securityContext", GONE),
    ("host", "base", "Job/hvd-value", f"{POD}/hostNetwork", True),
    ("host", "base", "Job/hvd-value", f"{POD}/hostPID", True),
    ("host", "base", "Job/hvd-value", f"{POD}/hostIPC", True),
    ("host", "base", "Job/hvd-value", f"{POD}/securityContext/sysctls", [{"name": "a", "value": "b"}]),
    ("host", "base", "Job/hvd-awr", f"{TRAIN}/securityContext/privileged", True),
    ("host", "base", "Job/hvd-awr", f"{TRAIN}/securityContext/procMount", "Unmasked"),
    ("host", "multi-node", "Job/hvd-awr", f"{TRAIN}/ports/0/hostPort", 8476),
    ("volumes", "base", "Job/hvd-value", f"{POD}/volumes/+", {"name": "h", "hostPath": {"path": "/"}}),
    ("volumes", "base", "Job/hvd-value", f"{POD}/volumes/+", TOKEN),
    ("scratch", "base", "Job/hvd-value", f"{POD}/volumes/1/emptyDir/sizeLimit", GONE),
    ("scratch", "base", "Job/hvd-value", f"{POD}/volumes/2/emptyDir/medium", GONE),
    ("scratch", "base", "Job/hvd-value", f"{TRAIN}/volumeMounts/2", GONE),
    ("scratch", "base", "Job/hvd-value", f"{TRAIN}/volumeMounts/1/readOnly", True),
    ("scratch", "base", "Job/hvd-awr-gate", f"{TRAIN}/volumeMounts/1", GONE),
    ("token", "base", "Job/hvd-value", f"{POD}/automountServiceAccountToken", GONE),
    ("token", "base", "Job/hvd-awr", f"{POD}/automountServiceAccountToken", True),
    ("token", "base", "Job/hvd-value", f"{POD}/enableServiceLinks", GONE),
    ("token", "base", "ServiceAccount/hvd-awr-gate", "automountServiceAccountToken", GONE),
    ("token", "gcs", "ServiceAccount/hvd-trainer", "automountServiceAccountToken", True),
    ("rbac", "base", "Role/hvd-awr-gate", "rules/0/verbs", ["get", "list"]),
    ("rbac", "base", "Role/hvd-awr-gate", "rules/0/resourceNames", GONE),
    ("rbac", "base", "Role/hvd-awr-gate", "rules/1/resourceNames", ["hvd-value"]),
    ("rbac", "base", "Role/hvd-awr-gate", "rules/+", TWO_RULES),
    ("rbac", "base", "RoleBinding/hvd-awr-gate", "subjects/0/name", "default"),
    ("rbac", "base", "RoleBinding/hvd-awr-gate", "subjects/+", {"kind": "ServiceAccount", "name": "default"}),
    ("rbac", "base", "Job/hvd-value", f"{POD}/serviceAccountName", "hvd-awr-gate"),
    ("memory", "base", "Job/hvd-value", f"{PREPARE}/resources/limits", GONE),
    ("memory", "base", "Job/hvd-value", f"{TRAIN}/resources/limits/memory", "32Gi"),
    ("memory", "base", "Job/hvd-value", f"{TRAIN}/resources/requests/cpu", GONE),
    ("shared-memory", "base", "Job/hvd-value", f"{POD}/volumes/2/emptyDir/sizeLimit", "64Gi"),
    ("gpus", "base", "Job/hvd-awr", f"{TRAIN}/resources/limits/nvidia.com~gpu", GONE),
    ("gpus", "base", "Job/hvd-awr-gate", f"{TRAIN}/resources/limits/nvidia.com~gpu", 1),
    ("gpus", "base", "Job/hvd-value", f"{TRAIN}/env/5/value", "0"),
    ("grace", "base", "Job/hvd-value", f"{POD}/terminationGracePeriodSeconds", 300),
    ("grace", "base", "Job/hvd-awr", f"{POD}/terminationGracePeriodSeconds", GONE),
    ("grace", "base", "Job/hvd-awr", f"{TRAIN}/env/4", GONE),
    ("restart", "base", "Job/hvd-value", f"{POD}/restartPolicy", "OnFailure"),
    ("exit-codes", "base", "Job/hvd-value", "spec/podFailurePolicy", GONE),
    ("exit-codes", "base", "Job/hvd-value", "spec/podFailurePolicy/rules/0", GONE),
    ("exit-codes", "base", "Job/hvd-value", "spec/podFailurePolicy/rules/1/onExitCodes/values", [143]),
    ("exit-codes", "base", "Job/hvd-awr", "spec/podFailurePolicy/rules/2/onExitCodes/values", [1, 2, 76]),
    ("exit-codes", "base", "Job/hvd-awr-gate", "spec/podFailurePolicy/rules/2/onExitCodes/operator", "NotIn"),
    ("exit-codes", "base", "Job/hvd-awr-gate", "spec/podFailurePolicy/rules/2/action", "Count"),
    ("exit-codes", "base", "Job/hvd-awr", "spec/backoffLimit", 0),
    ("secrets", "base", "Job/hvd-value", f"{TRAIN}/env/7", {"name": "WANDB_API_KEY", "value": "x"}),
    ("secrets", "base", "Job/hvd-value", f"{PREPARE}/env/+", {"name": "HF_TOKEN", "value": "x"}),
    ("secrets", "base", "Job/hvd-value", f"{TRAIN}/envFrom", [{"secretRef": {"name": "hvd-credentials"}}]),
    ("secrets", "base", "Job/hvd-value", f"{TRAIN}/env/7/valueFrom", {"configMapKeyRef": {"name": "x", "key": "y"}}),
    ("secrets", "base", "Job/hvd-value", f"{TRAIN}/args/+", "--api-key=x"),
    ("images", "base", "Job/hvd-value", f"{TRAIN}/image", "hvd:latest"),
    ("images", "base", "Job/hvd-value", f"{TRAIN}/image", "registry:5000/hvd"),
    ("images", "base", "Job/hvd-value", f"{PREPARE}/image", "busybox:1.36"),
    ("images", "base", "Job/hvd-awr", f"{TRAIN}/image", "hvd:cpu"),
    ("labels", "base", "Job/hvd-value", "metadata/labels/app.kubernetes.io~name", GONE),
    ("labels", "base", "PersistentVolumeClaim/hvd-storage", "metadata/labels", GONE),
    ("labels", "base", "Job/hvd-value", "spec/template/metadata/labels/app.kubernetes.io~component", "policy"),
    ("ttl", "base", "Job/hvd-value", "spec/ttlSecondsAfterFinished", GONE),
    ("ttl", "base", "Job/hvd-awr-gate", "spec/ttlSecondsAfterFinished", 3600),
    ("ttl", "jobset", "JobSet/hvd", "spec/ttlSecondsAfterFinished", GONE),
    ("ttl", "jobset", "JobSet/hvd", "spec/replicatedJobs/0/template/spec/ttlSecondsAfterFinished", WEEK),
    ("references", "base", "PersistentVolumeClaim/hvd-storage", "metadata/name", "other"),
    ("references", "base", "ServiceAccount/hvd-awr-gate", "metadata/name", "other"),
    ("references", "base", "Job/hvd-value", f"{POD}/volumes/0/name", "other"),
    ("references", "base", "Job/hvd-value", f"{TRAIN}/volumeMounts/0/mountPath", "/tmp"),
    ("references", "base", "Job/hvd-value", f"{TRAIN}/workingDir", "/home/hvd"),
    ("references", "gcs", "ServiceAccount/hvd-trainer", "metadata/name", "other"),
    ("variables", "base", "Job/hvd-value", f"{TRAIN}/env/2/name", "OTHER"),
    ("variables", "base", "Job/hvd-value", f"{TRAIN}/env/+", {"name": "HVD_CACHE", "value": "/tmp"}),
    ("owner", "base", "Job/hvd-awr", f"{TRAIN}/env/0", GONE),
    ("owner", "base", "Job/hvd-awr", f"{TRAIN}/env/1/valueFrom/fieldRef/fieldPath", "metadata.name"),
    ("owner", "base", "Job/hvd-awr", f"{TRAIN}/env/3/value", "gs://BUCKET/runs/$(HVD_JOB_UID)"),
    ("order", "base", "Job/hvd-awr", "spec/parallelism", 1),
    ("order", "base", "Job/hvd-awr", "spec/completions", 2),
    ("order", "base", "Job/hvd-awr", "metadata/name", "other"),
    ("order", "base", "Job/hvd-awr", "metadata/labels/app.kubernetes.io~component", "value"),
    ("order", "base", "Job/hvd-value", "spec/parallelism", 0),
    ("order", "multi-node", "Job/hvd-awr-gate", f"{TRAIN}/args/6", "1"),
    ("order", "jobset", "JobSet/hvd", "spec/replicatedJobs/1/dependsOn", GONE),
    ("order", "jobset", "JobSet/hvd", "spec/replicatedJobs/1/dependsOn/0/status", "Ready"),
    ("order", "jobset", "JobSet/hvd", "spec/replicatedJobs/1/template/spec/parallelism", 0),
    ("processes", "base", "Job/hvd-value", "spec/completions", 2),
    ("processes", "multi-node", "Job/hvd-value", "spec/completionMode", GONE),
    ("processes", "multi-node", "Job/hvd-value", "spec/completions", 3),
    ("processes", "multi-node", "Job/hvd-value", f"{POD}/subdomain", GONE),
    ("processes", "multi-node", "Job/hvd-value", f"{PREPARE}/env/0", GONE),
    ("processes", "multi-node", "Job/hvd-awr", f"{TRAIN}/env/0/value", "hvd-value-0.hvd-value:8476"),
    ("processes", "multi-node", "Job/hvd-awr", f"{TRAIN}/env/2/valueFrom/fieldRef/fieldPath", "metadata.name"),
    ("processes", "multi-node", "Job/hvd-awr", f"{TRAIN}/ports", GONE),
    ("processes", "multi-node", "Job/hvd-awr", "spec/backoffLimit", 3),
    ("processes", "multi-node", "Job/hvd-awr", f"{POD}/affinity/podAntiAffinity", GONE),
    ("processes", "multi-node", "Service/hvd-value", "spec/clusterIP", GONE),
    ("processes", "multi-node", "Service/hvd-value", "spec/publishNotReadyAddresses", GONE),
    ("processes", "multi-node", "Service/hvd-awr", "spec/selector", {"batch.kubernetes.io/job-name": "hvd-value"}),
    ("processes", "multi-node", "Service/hvd-awr", "metadata/name", "other"),
]


@pytest.mark.parametrize(
    ("check", "manifest", "where", "path", "value"), MUTATIONS, ids=[f"{m[0]}-{n}" for n, m in enumerate(MUTATIONS)]
)
def test_each_check_fails_on_a_bad_manifest(check, manifest, where, path, value):
    found = documents(manifest)
    change(found, where, path, value)
    assert check in {line.split(":")[0] for line in violations(found)}


def test_every_check_has_been_seen_to_fail():
    assert {mutation[0] for mutation in MUTATIONS} == set(CHECKS)


def test_quantities():
    assert (quantity("512Mi"), quantity("100m"), quantity(8), quantity("2")) == (2**29, 0.1, 8, 2)


def change(found: list[Document], where: str, path: str, value: Any) -> None:
    """Set what is at the path of the object Kind/name; GONE removes it. `~` in a path is a slash."""
    place: Any = found
    if where:
        kind, _, name = where.partition("/")
        place = render.find(found, kind, name)
    *steps, last = path.split("/")
    for step in steps:
        place = place[int(step)] if isinstance(place, list) else place[step]
    if last == "+":
        place.append(copy.deepcopy(value))
        return
    key = int(last) if isinstance(place, list) else last.replace("~", "/")
    if value is GONE:
        assert isinstance(key, int) or key in place, f"{path}: there is nothing"
        del place[key]
    else:
        place[key] = copy.deepcopy(value)
