"""What is rendered is what golden/ holds, and differs from k8s/base in nothing but what the overlay is for."""

from typing import Any

import pytest
import yaml

from tests.k8s import render
from tests.k8s.render import OVERLAYS, documents, find

KUBECTL = pytest.mark.skipif(
    not render.kubectl(), reason="no kubectl here: python -m tests.clusters.kubernetes_cluster"
)
RESOURCES = "spec/template/spec/containers/train/resources"
SHM = "spec/template/spec/volumes/shm/emptyDir/sizeLimit"
LARGER = {
    f"{RESOURCES}/requests/cpu",
    f"{RESOURCES}/requests/memory",
    f"{RESOURCES}/limits/memory",
    f"{RESOURCES}/limits/nvidia.com~gpu",
    SHM,
}


@KUBECTL
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_golden_files_are_what_is_rendered(overlay):
    advice = "look at the differences, then: python -m tests.k8s.render"
    assert list(yaml.safe_load_all(render.render(overlay))) == documents(overlay), advice


def test_a_golden_file_for_each_overlay():
    assert {path.stem for path in render.GOLDEN.glob("*.yaml")} == set(OVERLAYS)


def test_shipped_files_are_links_to_the_base():
    for path in sorted(render.BASE.glob("*.yaml")):
        if path.name != "kustomization.yaml":
            assert (render.BASE.parent / path.name).samefile(path)


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
    assert [one["kind"] for one in documents("jobset")] == ["PersistentVolumeClaim", "JobSet"]


def test_gcs_has_no_claim_and_one_identity_for_all():
    found = documents("gcs")
    assert not [one for one in found if one["kind"] == "PersistentVolumeClaim"]
    accounts = {
        one["metadata"]["name"]: one["metadata"]["annotations"] for one in found if "annotations" in one["metadata"]
    }
    assert set(accounts) == {"hvd-trainer", "hvd-awr-gate"}
    assert accounts["hvd-trainer"] == accounts["hvd-awr-gate"]
    assert set(accounts["hvd-trainer"]) == {"iam.gke.io/gcp-service-account"}
    for job in render.jobs(found):
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
