"""What is handed to kubectl, and what is left as it is."""

import json

import pytest
import yaml

from hvd.clusters.kubernetes.submission import submit
from hvd.errors import Failed, UserError
from hvd.launch.submit import main
from tests.k8s.conftest import a_gate, a_job
from tests.k8s.render import Document, documents

THREE = ["hvd-value", "hvd-awr", "hvd-awr-gate"]


def both() -> list[Document]:
    return [doc for doc in documents("base") if doc["kind"] != "PersistentVolumeClaim"]


def applied(kubectl, kind: str = "Job") -> list[list[str]]:
    """Names of the objects of each apply, the dry run first."""
    texts = [text for _, text in kubectl.calls("apply")]
    return [[doc["metadata"]["name"] for doc in yaml.safe_load_all(text) if doc["kind"] == kind] for text in texts]


def test_a_dry_run_by_the_server_comes_first(kubectl):
    assert submit(both()) == [("value", "hvd-value"), ("policy", "hvd-awr")]
    assert [args[0] for args, _ in kubectl.calls()] == ["get", "apply", "apply"]
    assert ["--dry-run=server" in args for args, _ in kubectl.calls("apply")] == [True, False]
    assert applied(kubectl) == [THREE] * 2


def test_what_the_server_refuses_changes_nothing(kubectl):
    kubectl.answer("apply --dry-run", "Error from server (Forbidden): jobs.batch is forbidden", 1)
    with pytest.raises(UserError, match="the cluster refuses the manifests: Error from server"):
        submit(both())
    assert [args[0] for args, _ in kubectl.calls()] == ["get", "apply"]


@pytest.mark.parametrize("call", ["get", "apply --dry-run"])
def test_a_silent_server_is_no_mistake_of_the_users(kubectl, call):
    kubectl.answer(call, "Unable to connect to the server: dial tcp: timeout", 1)
    with pytest.raises(Failed, match="Unable to connect"):
        submit(both())


def test_a_job_that_lives_is_left_alone(kubectl, capsys):
    """To apply a policy Job that the gate has released would pause it."""
    kubectl.has([a_job("hvd-awr", "policy"), a_job("hvd-value", "value"), a_gate()])
    submit(both())
    assert applied(kubectl) == [[]] * 2
    assert "Job hvd-awr is at work already; it is left as it is" in capsys.readouterr().out


@pytest.mark.parametrize(
    "policy, gate",
    [
        (a_job("hvd-awr", "policy", parallelism=0), a_gate("Failed")),
        # the gate is about to end: it has seen the policy Job's end, and would not release the successor
        (a_job("hvd-awr", "policy", condition="Complete"), a_gate()),
    ],
)
def test_jobs_that_have_ended_make_room_for_their_successors(kubectl, policy, gate):
    kubectl.has([a_job("hvd-value", "value", condition="Complete"), policy, gate])
    submit(both())
    ((deleted, _),) = kubectl.calls("delete")
    assert deleted[:2] == ["delete", "jobs"] and set(deleted[2:5]) == set(THREE)
    assert applied(kubectl)[1] == THREE


def test_a_claim_that_is_there_is_left_alone(kubectl):
    claim = {"kind": "PersistentVolumeClaim", "metadata": {"name": "hvd-storage"}}
    submit([claim, *both()])
    kubectl.answer("get persistentvolumeclaims", json.dumps({"items": [claim]}))
    submit([claim, *both()])
    assert applied(kubectl, "PersistentVolumeClaim") == [["hvd-storage"]] * 2 + [[]] * 2


def test_the_launcher_applies_and_follows(kubectl, capsys):
    kubectl.has([a_job("hvd-value", "value", condition="Complete")])
    assert main(["--stage", "value", "--cluster", "kubernetes"]) == 0
    said = capsys.readouterr().out
    assert "job hvd-value" in said and "hvd-value: COMPLETED" in said


def test_no_kubectl_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--stage", "value", "--cluster", "kubernetes"]) == 2
    assert "there is no kubectl on this machine" in capsys.readouterr().err
