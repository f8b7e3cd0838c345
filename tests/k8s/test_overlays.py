"""An overlay differs from k8s/base in nothing but what it is for; one of them is shown whole in golden/."""

import json
from typing import Any

from tests.k8s import render
from tests.k8s.render import documents, find

RESOURCES = "spec/template/spec/containers/train/resources"
SHM = "spec/template/spec/volumes/shm/emptyDir/sizeLimit"
LARGER = {
    f"{RESOURCES}/requests/cpu",
    f"{RESOURCES}/requests/memory",
    f"{RESOURCES}/limits/memory",
    f"{RESOURCES}/limits/nvidia.com~gpu",
    SHM,
}


def test_the_golden_file_is_what_is_rendered():
    advice = "look at the differences, then: python -m tests.k8s.render"
    assert render.GOLDEN.read_text() == render.golden(), advice


def test_the_files_are_files_and_the_base_has_the_same():
    """`kubectl apply -f` of a raw URL gets the file itself; kustomize reads nothing above a base."""
    for name in render.FILES:
        file, copied = render.K8S / name, render.K8S / "base" / name
        assert not file.is_symlink() and not copied.is_symlink()
        assert file.read_bytes() == copied.read_bytes(), "python -m tests.k8s.render"


def test_the_policy_jobs_is_the_value_job_but_for_its_stage():
    label = "metadata/labels/app.kubernetes.io~component"
    wanted = {label, f"spec/template/{label}", "spec/parallelism", "spec/template/spec/initContainers"}
    for name in ("base", "multi-node"):
        policy, value = (_plain(find(documents(name), "Job", job)) for job in ("hvd-awr", "hvd-value"))
        renamed = json.loads(json.dumps(policy).replace("hvd-awr", "hvd-value"))
        assert _changed(renamed, value) == wanted | {"spec/template/spec/containers/train/args"}


def test_single_node_differs_in_size_only():
    for name in ("hvd-value", "hvd-awr"):
        assert _differences("single-node", name) == LARGER
    assert _differences("single-node", "hvd-awr-gate") == set()


def test_kueue_adds_a_label_to_the_stages_only():
    for name in ("hvd-value", "hvd-awr"):
        assert _differences("kueue", name) == {"metadata/labels/kueue.x-k8s.io~queue-name"}
    assert _differences("kueue", "hvd-awr-gate") == set()


def test_multi_node_adds_what_processes_need():
    train = "spec/template/spec/containers/train"
    wanted = LARGER | {
        "spec/completionMode",
        "spec/completions",
        "spec/backoffLimit",
        "spec/template/spec/subdomain",
        "spec/template/spec/affinity",
        f"{train}/ports",
        *(f"{train}/env/{name}" for name in ("HVD_COORDINATOR", "HVD_NUM_PROCESSES", "HVD_PROCESS_ID")),
    }
    assert _differences("multi-node", "hvd-awr") == wanted
    prepare = "spec/template/spec/initContainers/prepare/env/HVD_PROCESS_ID"
    assert _differences("multi-node", "hvd-value") == wanted | {"spec/parallelism", prepare}
    gate = "spec/template/spec/containers/gate/args"
    assert _differences("multi-node", "hvd-awr-gate") == {gate}


def test_jobset_runs_the_jobs_of_the_base():
    (jobset,) = [one for one in documents("jobset") if one["kind"] == "JobSet"]
    value, policy = jobset["spec"]["replicatedJobs"]
    for replicated, name, changed in (
        (value, "hvd-value", {"ttlSecondsAfterFinished"}),
        (policy, "hvd-awr", {"ttlSecondsAfterFinished", "parallelism"}),
    ):
        job = find(documents("base"), "Job", name)
        assert _changed(_plain(replicated["template"]["spec"]), _plain(job["spec"])) == changed
        assert replicated["template"]["metadata"] == {"labels": job["metadata"]["labels"]}
    assert [one["kind"] for one in documents("jobset")] == ["PersistentVolumeClaim", "JobSet", "NetworkPolicy"]


def test_gcs_has_no_claim_and_one_identity_for_all():
    docs = documents("gcs")
    assert not [doc for doc in docs if doc["kind"] == "PersistentVolumeClaim"]
    accounts = {
        doc["metadata"]["name"]: doc["metadata"]["annotations"] for doc in docs if "annotations" in doc["metadata"]
    }
    assert set(accounts) == {"hvd-trainer", "hvd-awr-gate"}
    assert accounts["hvd-trainer"] == accounts["hvd-awr-gate"]
    assert set(accounts["hvd-trainer"]) == {"iam.gke.io/gcp-service-account"}
    for job in render.jobs(docs):
        pod = job["spec"]["template"]["spec"]
        stage = render.component(job) != "gate"
        drivers = [volume["csi"]["driver"] for volume in pod["volumes"] if "csi" in volume]
        assert drivers == (["gcsfuse.csi.storage.gke.io"] if stage else [])
        annotations = job["spec"]["template"]["metadata"].get("annotations", {})
        assert (annotations.get("gke-gcsfuse/volumes") == "true") is stage
        assert pod["serviceAccountName"] == ("hvd-trainer" if stage else "hvd-awr-gate")


def _differences(overlay: str, job: str) -> set[str]:
    """Paths at which the overlay's Job is not the base's, but for the images' names."""
    return _changed(_plain(find(documents(overlay), "Job", job)), _plain(find(documents("base"), "Job", job)))


def _plain(value: Any) -> Any:
    """The same with named lists as dicts, in no order, and without images."""
    if isinstance(value, dict):
        return {key.replace("/", "~"): _plain(one) for key, one in value.items() if key != "image"}
    if isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value):
        return {one["name"]: _plain(one) for one in value}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _changed(one: Any, other: Any, path: str = "") -> set[str]:
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return set() if one == other else {path}
    found: set[str] = set()
    for key in {*one, *other}:
        below = f"{path}/{key}" if path else key
        found |= _changed(one.get(key), other.get(key), below) if key in one and key in other else {below}
    return found
