"""Every shipped manifest against the schemas of Kubernetes itself: unknown fields, wrong types, missing ones."""

import functools
from collections.abc import Iterator

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

from tests.k8s.render import K8S, MANIFESTS, Document, documents, find, jobs
from tests.k8s.test_manifests import render

VERSIONS = ("1.28.0", "1.31.0", "1.33.0", "1.37.0")
# A JobSet is no part of Kubernetes: its Jobs are looked at one by one, and of itself these fields (v1alpha2, v0.8)
JOBSET = {"ttlSecondsAfterFinished", "replicatedJobs"}
REPLICATED_JOB = {"name", "replicas", "template", "dependsOn"}


@pytest.fixture(autouse=True)
def _schemas_read_once(monkeypatch):
    monkeypatch.setattr(utils, "schema_contents", _schema)


@functools.cache
def _schema(filename: str, version: str):
    return _READ(filename, version)


_READ = utils.schema_contents


def known(name: str) -> Iterator[Document]:
    """The objects of a manifest that have a schema."""
    found = documents(name)
    yield from (one for one in found if one["kind"] not in ("Job", "JobSet"))
    yield from jobs(found)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_fit_the_schemas(name, version):
    for one in known(name):
        where = f"{one['kind']}/{one['metadata']['name']}"
        try:
            checked_against = kubernetes_validate.validate(one, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{where}: {error.json_path}: {error.message}", pytrace=False)
        assert f"{checked_against}.0" == version


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("paralelism",), 1),
        (("completions",), "1"),
        (("template", "spec", "containers", 0, "imagePulPolicy"), "Always"),
        (("podFailurePolicy", "rules", 1, "onExitCodes", "values"), ["75"]),
    ],
)
def test_what_does_not_fit_is_refused(version, path, value):
    job = find(documents("base"), "Job", "hvd-awr")
    kubernetes_validate.validate(job, version, strict=True)
    place = job["spec"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, version, strict=True)


@pytest.mark.parametrize("version", (VERSIONS[0], VERSIONS[-1]))
def test_the_evaluation_fits_the_schemas(version):
    kubernetes_validate.validate(render(stage="evaluate")[0], version, strict=True)


def test_the_shell_is_a_pod_like_the_gates():
    (pod,) = yaml.safe_load_all((K8S / "shell.yaml").read_text())
    for version in VERSIONS:
        kubernetes_validate.validate(pod, version, strict=True)
    gate = find(documents("base"), "Job", "hvd-awr-gate")["spec"]["template"]["spec"]
    (shell,), (theirs,) = pod["spec"]["containers"], gate["containers"]
    assert pod["spec"]["securityContext"] == gate["securityContext"] and pod["spec"]["enableServiceLinks"] is False
    assert pod["spec"]["automountServiceAccountToken"] is False
    for name in ("image", "workingDir", "securityContext"):
        assert shell[name] == theirs[name]
    assert [volume["name"] for volume in pod["spec"]["volumes"]] == ["storage", "tmp"]
    assert pod["spec"]["volumes"][0] == gate["volumes"][0] and not shell["volumeMounts"][0].get("readOnly")


def test_jobset_has_only_fields_that_we_know():
    jobset = find(documents("jobset"), "JobSet", "hvd")
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert set(jobset["spec"]) == JOBSET
    for replicated in jobset["spec"]["replicatedJobs"]:
        assert set(replicated) <= REPLICATED_JOB
        assert set(replicated["template"]) == {"metadata", "spec"}
