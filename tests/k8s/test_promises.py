"""Every shipped manifest keeps every promise, and every promise can be broken."""

import copy
from typing import Any

import pytest

from tests.k8s import render
from tests.k8s.promises import PROMISES, keeps, quantity
from tests.k8s.render import MANIFESTS, Document, documents

# The smoke overlay is for CPUs and for clusters before podFailurePolicy
LEFT_OUT = {"smoke": ("gpus", "exit_codes")}
GONE = object()
POD = "spec/template/spec"
TRAIN, PREPARE = f"{POD}/containers/0", f"{POD}/initContainers/0"


@pytest.mark.parametrize("name", MANIFESTS)
def test_shipped_manifests_keep_their_promises(name):
    keeps(documents(name), but=LEFT_OUT.get(name, ()))


@pytest.mark.parametrize("promise", LEFT_OUT["smoke"])
def test_what_is_left_out_would_fail(promise):
    with pytest.raises((AssertionError, KeyError)):
        PROMISES[promise](documents("smoke"))


# (promise, manifest, object, path in it, new value); a path that ends in + appends, `~` is a slash
BROKEN: list[tuple[str, str, str, str, Any]] = [
    ("security", "base", "", "+", {"kind": "ClusterRole", "metadata": {"name": "x", "labels": {}}, "rules": []}),
    ("security", "base", "Job/hvd-awr", f"{POD}/securityContext/runAsUser", 0),
    ("security", "base", "Job/hvd-value", f"{POD}/hostNetwork", True),
    ("security", "base", "Job/hvd-value", f"{PREPARE}/securityContext/readOnlyRootFilesystem", False),
    ("security", "base", "Job/hvd-awr-gate", f"{TRAIN}/securityContext", GONE),
    ("security", "multi-node", "Job/hvd-awr", f"{TRAIN}/ports/0/hostPort", 8476),
    ("security", "jobset", "JobSet/hvd", f"spec/replicatedJobs/1/template/{POD}/securityContext/runAsUser", 0),
    ("network", "base", "NetworkPolicy/hvd", "spec/ingress/+", {}),
    ("network", "multi-node", "Job/hvd-awr", "spec/template/metadata/labels/app.kubernetes.io~name", "other"),
    ("network", "jobset", "NetworkPolicy/hvd", "spec/podSelector", {}),
    ("volumes", "base", "Job/hvd-value", f"{POD}/volumes/+", {"name": "h", "hostPath": {"path": "/"}}),
    ("volumes", "base", "Job/hvd-value", f"{POD}/volumes/1/emptyDir/sizeLimit", GONE),
    ("volumes", "base", "Job/hvd-value", f"{POD}/volumes/2/emptyDir/medium", GONE),
    ("volumes", "base", "Job/hvd-value", f"{POD}/volumes/2/emptyDir/sizeLimit", "64Gi"),
    ("volumes", "base", "Job/hvd-awr-gate", f"{TRAIN}/volumeMounts/1", GONE),
    ("rights", "base", "Job/hvd-awr", f"{POD}/automountServiceAccountToken", True),
    ("rights", "gcs", "ServiceAccount/hvd-trainer", "automountServiceAccountToken", True),
    ("rights", "base", "Role/hvd-awr-gate", "rules/0/verbs", ["get", "list"]),
    ("rights", "base", "Role/hvd-awr-gate", "rules/1/resourceNames", ["hvd-value"]),
    ("rights", "base", "RoleBinding/hvd-awr-gate", "subjects/0/name", "default"),
    ("rights", "base", "Job/hvd-value", f"{POD}/serviceAccountName", "hvd-awr-gate"),
    ("resources", "base", "Job/hvd-value", f"{TRAIN}/resources/limits/memory", "32Gi"),
    ("resources", "base", "Job/hvd-value", f"{PREPARE}/resources/requests/cpu", GONE),
    ("gpus", "base", "Job/hvd-awr-gate", f"{TRAIN}/resources/limits/nvidia.com~gpu", 1),
    ("gpus", "base", "Job/hvd-value", f"{TRAIN}/env/5/value", "0"),
    ("ends", "base", "Job/hvd-value", f"{POD}/terminationGracePeriodSeconds", 300),
    ("ends", "base", "Job/hvd-value", f"{POD}/restartPolicy", "OnFailure"),
    ("ends", "base", "Job/hvd-awr-gate", "spec/ttlSecondsAfterFinished", 3600),
    ("ends", "jobset", "JobSet/hvd", "spec/replicatedJobs/0/template/spec/ttlSecondsAfterFinished", 7 * 24 * 3600),
    ("exit_codes", "base", "Job/hvd-value", "spec/podFailurePolicy/rules/1/onExitCodes/values", [143]),
    ("exit_codes", "base", "Job/hvd-awr-gate", "spec/podFailurePolicy", GONE),
    ("exit_codes", "base", "Job/hvd-awr", "spec/backoffLimit", 0),
    ("secrets", "base", "Job/hvd-value", f"{TRAIN}/env/7", {"name": "WANDB_API_KEY", "value": "x"}),
    ("secrets", "base", "Job/hvd-value", f"{TRAIN}/args/+", "--api-key=x"),
    ("secrets", "base", "Job/hvd-value", f"{TRAIN}/envFrom", [{"secretRef": {"name": "hvd-credentials"}}]),
    ("images", "base", "Job/hvd-awr", f"{TRAIN}/image", "hvd:cpu"),
    ("labels", "base", "Job/hvd-value", "spec/template/metadata/labels/app.kubernetes.io~component", "policy"),
    ("references", "base", "PersistentVolumeClaim/hvd-storage", "metadata/name", "other"),
    ("references", "gcs", "ServiceAccount/hvd-trainer", "metadata/name", "other"),
    ("references", "base", "Job/hvd-value", f"{TRAIN}/workingDir", "/home/hvd"),
    ("variables", "base", "Job/hvd-value", f"{TRAIN}/env/2/name", "OTHER"),
    ("variables", "base", "Job/hvd-value", f"{TRAIN}/env/+", {"name": "HVD_CACHE", "value": "/tmp"}),
    ("variables", "base", "Job/hvd-awr", f"{TRAIN}/env/3/value", "gs://BUCKET/runs/$(HVD_JOB_UID)"),
    ("order", "base", "Job/hvd-awr", "spec/parallelism", 1),
    ("order", "multi-node", "Job/hvd-awr-gate", f"{TRAIN}/args/6", "1"),
    ("order", "jobset", "JobSet/hvd", "spec/replicatedJobs/1/dependsOn/0/status", "Ready"),
    ("processes", "base", "Job/hvd-value", "spec/completions", 2),
    ("processes", "multi-node", "Job/hvd-value", "spec/completions", 3),
    ("processes", "multi-node", "Job/hvd-awr", f"{TRAIN}/env/0/value", "hvd-value-0.hvd-value:8476"),
    ("processes", "multi-node", "Job/hvd-awr", f"{POD}/affinity/podAntiAffinity", GONE),
    ("processes", "multi-node", "Service/hvd-value", "spec/publishNotReadyAddresses", GONE),
    ("processes", "multi-node", "Service/hvd-awr", "spec/selector", {"batch.kubernetes.io/job-name": "hvd-value"}),
]


@pytest.mark.parametrize(
    ("promise", "manifest", "where", "path", "value"), BROKEN, ids=[f"{case[0]}-{n}" for n, case in enumerate(BROKEN)]
)
def test_a_bad_manifest_breaks_its_promise(promise, manifest, where, path, value):
    docs = documents(manifest)
    change(docs, where, path, value)
    with pytest.raises((AssertionError, KeyError)):
        PROMISES[promise](docs)


def test_every_promise_has_been_seen_to_break():
    assert {case[0] for case in BROKEN} == set(PROMISES)


def test_quantities():
    assert (quantity("512Mi"), quantity("100m"), quantity(8), quantity("2")) == (2**29, 0.1, 8, 2)


def change(docs: list[Document], where: str, path: str, value: Any) -> None:
    """Set what is at the path of the object Kind/name; GONE removes it."""
    place: Any = docs
    if where:
        kind, _, name = where.partition("/")
        place = render.find(docs, kind, name)
    *steps, last = path.split("/")
    for step in steps:
        place = place[int(step)] if isinstance(place, list) else place[step]
    if last == "+":
        place.append(copy.deepcopy(value))
        return
    key = int(last) if isinstance(place, list) else last.replace("~", "/")
    if value is GONE:
        del place[key]
    else:
        place[key] = copy.deepcopy(value)
