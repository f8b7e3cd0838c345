"""What `hvd jobs` makes of what kubectl says."""

import io
import json
import time
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from hvd import cli
from hvd.clusters import base
from hvd.clusters.kubernetes import cluster
from hvd.clusters.kubernetes.cluster import Kubernetes
from hvd.clusters.kubernetes.queue import KubernetesJob, Queue, is_name, own_container
from hvd.errors import UserError
from tests.k8s.conftest import a_gate, a_job, a_pod, terminated


def waiting(reason: str, **more) -> dict:
    return a_pod("v", "Pending", containerStatuses=[{"state": {"waiting": {"reason": reason, **more}}}])


def warning(of: str, reason: str, message: str, at: str = "2026-01-01T00:00:01Z") -> dict:
    return {"involvedObject": {"name": of}, "reason": reason, "message": message, "lastTimestamp": at}


NO_GPU = [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes: no GPU"}]


@pytest.mark.parametrize(
    "spec, pods, state, reason",
    [
        ({}, [], "PENDING", ""),
        ({"parallelism": 0}, [], "PAUSED", ""),
        ({"suspend": True}, [], "PAUSED", ""),
        ({}, [a_pod("v", "Running")], "RUNNING", ""),
        ({}, [a_pod("v", "Pending", conditions=NO_GPU)], "PENDING", "0/3 nodes: no GPU"),
        ({}, [waiting("ImagePullBackOff", message="no")], "PENDING", "ImagePullBackOff: no"),
        ({}, [waiting("PodInitializing")], "PENDING", ""),
        ({}, [waiting("ContainerCreating")], "PENDING", "ContainerCreating"),
        ({"condition": "Complete"}, [], "COMPLETED", ""),
        ({"condition": "Failed"}, [], "FAILED", "BackoffLimitExceeded"),
        (
            {"condition": "Failed"},
            [a_pod("v", "Failed", containerStatuses=terminated(2, "bar\nerror: no dataset\n"))],
            "FAILED",
            "error: no dataset",
        ),
        (
            {"condition": "Failed"},
            [a_pod("v", "Failed", initContainerStatuses=terminated(137, "", "OOMKilled"))],
            "FAILED",
            "exit code 137 (OOMKilled)",
        ),
    ],
)
def test_states(spec, pods, state, reason):
    job = KubernetesJob(a_job("v", "value", **spec), pods)
    assert (job.state, job.reason) == (state, reason)
    assert job.ended == (state in ("COMPLETED", "FAILED"))


@pytest.mark.parametrize(
    "pods, events, reason",
    [
        ([], [warning("v", "FailedCreate", "failed quota: team")], "FailedCreate: failed quota: team"),
        ([], [warning("v", "B", "new", "2026-01-02T00:00:00Z"), warning("v", "A", "old")], "B: new"),
        ([waiting("ContainerCreating")], [warning("v-abc", "FailedMount", "no nfs")], "FailedMount: no nfs"),
        # the Job's older warning says nothing of a pod that is there, nor does a warning more than the pod itself
        ([waiting("ContainerCreating")], [warning("v", "FailedCreate", "quota")], "ContainerCreating"),
        ([waiting("ImagePullBackOff", message="no")], [warning("v-abc", "Failed", "x")], "ImagePullBackOff: no"),
    ],
)
def test_why_a_job_waits_is_what_the_cluster_warns_of(kubectl, pods, events, reason):
    kubectl.has([a_job("v", "value")], pods)
    kubectl.answer("get events", json.dumps({"items": events}))
    assert Kubernetes().state("v").reason == reason
    kubectl.answer("get events", "Error from server (Forbidden)", 1)  # nor is it needed
    assert Kubernetes().state("v").state == "PENDING"


def test_exit_codes_are_those_of_the_last_pod(kubectl):
    pods = [
        a_pod("v", "Failed", initContainerStatuses=terminated(0), containerStatuses=terminated(code))
        for code in (143, 2)
    ]
    for jobs, code in ((pods, 2), ([], 1)):
        kubectl.has([a_job("v", "value", condition="Failed")], jobs)
        assert Kubernetes().state("v").result() == code
    kubectl.has([a_job("v", "value", condition="Complete")])
    assert Kubernetes().state("v").result() == 0


def three(gate: str = "") -> list[dict]:
    return [
        a_job("hvd-value", "value", args=("train-value", "--config", "demo", "--exp_name=x")),
        a_job("hvd-awr", "policy", parallelism=0, args=("train-policy", "--config", "demo")),
        a_gate(gate),
    ]


def test_the_list(kubectl, capsys):
    bar = (
        "value:   1%|  | 2/60 [00:10<01:59,  2.17s/step, loss=6.0]\r"
        "value:  52%|##  | 31/60 [00:15<00:14,  2.00step/s, loss=5.4]"
    )
    kubectl.has(three(), [a_pod("hvd-value", "Running"), a_pod("hvd-awr-gate", "Running")], bar)
    assert cli.main(["jobs", "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    value = rows["hvd-value"]
    assert (value["step"], value["total"], value["steps_per_s"], value["eta_s"]) == (31, 60, 2.0, 14.5)
    assert value["state"] == "RUNNING" and value["nodes"] == "node1" and value["experiment"] == "x"
    assert rows["hvd-awr"]["state"] == "PAUSED" and rows["hvd-awr"]["waiting_for"] == ["hvd-value"]
    assert rows["hvd-awr-gate"]["step"] is None
    assert cli.main(["jobs"]) == 0
    assert "hvd-awr" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", [0.01, 2.5])
def test_steps_are_read_from_the_bar_as_it_is_written(kubectl, seconds):
    log = io.StringIO()
    bar = tqdm(total=60, initial=1, desc="value", unit="step", file=log, ascii=False, dynamic_ncols=True)
    bar.start_t -= 30 * seconds
    bar.update(30)
    bar.set_postfix(loss="5.4")
    kubectl.has(three(), [a_pod("hvd-value", "Running")], log.getvalue())
    state = Kubernetes().state("hvd-value")
    assert (state.step, state.total) == (31, 60) and state.steps_per_s


def test_old_ones_are_shown_on_request_only(kubectl, capsys):
    kubectl.has([a_job("hvd-value", "value", condition="Complete")])  # it ended on 2026-01-01
    assert cli.main(["jobs"]) == 0 and "hvd-value" not in capsys.readouterr().out
    assert cli.main(["jobs", "--all"]) == 0 and "hvd-value" in capsys.readouterr().out


def test_a_cluster_that_does_not_answer_is_said(kubectl, capsys):
    kubectl.answer("get", "Unable to connect to the server: dial tcp: timeout", 1)
    assert cli.main(["jobs"]) == 0
    assert "kubernetes: kubectl get: Unable to connect" in capsys.readouterr().err
    assert cli.main(["jobs", "wait", "hvd-value"]) == 1


def test_wait_ends_with_the_jobs_code(kubectl, capsys):
    pods = [a_pod("hvd-value", "Failed", containerStatuses=terminated(2, "error: bad"))]
    kubectl.has([a_job("hvd-value", "value", condition="Failed")], pods)
    assert cli.main(["jobs", "wait", "hvd-value"]) == 2
    assert "hvd-value: FAILED, exit code 2: error: bad" in capsys.readouterr().out
    kubectl.has(three(), [a_pod("hvd-value", "Running")])
    assert cli.main(["jobs", "wait", "hvd-value", "--timeout", "0"]) == 124


def test_a_policy_job_whose_gate_has_failed_is_not_waited_for(kubectl, capsys):
    pods = [a_pod("hvd-awr-gate", "Failed", containerStatuses=terminated(2, "error: a byte"))]
    kubectl.has(three(gate="Failed"), pods)
    assert cli.main(["jobs", "wait", "hvd-awr"]) == 2
    said = capsys.readouterr().out
    assert "hvd-awr will never start (its gate hvd-awr-gate failed, exit code 2: error: a byte)" in said


@pytest.mark.parametrize("command", [["wait"], ["logs", "-f"]])
def test_a_cluster_that_refuses_an_expired_login_is_said_once_and_asked_again(kubectl, capsys, monkeypatch, command):
    def refuses():
        kubectl.answer("get jobs", "error: You must be logged in to the server (Unauthorized)", 1)

    def answers():
        kubectl.has([a_job("hvd-value", "value", condition="Complete")], pods)

    pods = [a_pod("hvd-value", "Running")]
    kubectl.has([a_job("hvd-value", "value")], pods)
    turns = iter([refuses, refuses, answers, lambda: None])
    clock = SimpleNamespace(monotonic=time.monotonic, strftime=time.strftime, sleep=lambda seconds: next(turns)())
    for module in (base, cluster):
        monkeypatch.setattr(module, "time", clock)
    assert cli.main(["jobs", command[0], "hvd-value", *command[1:]]) == 0
    line = "kubectl get: error: You must be logged in to the server (Unauthorized); going on until it answers"
    assert capsys.readouterr().err.count(line) == 1


def test_an_unknown_name_offers_near_ones(kubectl, capsys):
    kubectl.has(three())
    assert cli.main(["jobs", "logs", "hvd-valu"]) == 2
    assert "no Job hvd-valu of hvd in this namespace; nearest: hvd-value" in capsys.readouterr().err


def test_logs(kubectl):
    kubectl.has(three(), [a_pod("hvd-value", "Running")])
    assert cli.main(["jobs", "logs", "hvd-value", "-n", "10"]) == 0
    ((args, _),) = kubectl.calls("logs")
    assert args == ["logs", "hvd-value-abc", "--tail=10", "--all-containers"]
    with pytest.raises(UserError, match="has no log yet: it is PAUSED"):
        Kubernetes().logs("hvd-awr", 10, follow=False)


@pytest.mark.parametrize(
    "name, gone",
    [
        ("hvd-value", ["hvd-value", "hvd-awr-gate", "hvd-awr"]),
        ("hvd-awr", ["hvd-awr", "hvd-awr-gate"]),
        ("hvd-awr-gate", ["hvd-awr-gate", "hvd-awr"]),
    ],
)
def test_cancel_takes_along_what_cannot_go_on(kubectl, capsys, name, gone):
    kubectl.has(three())
    assert cli.main(["jobs", "cancel", name]) == 2  # there is no terminal to answer at
    assert "add --yes" in capsys.readouterr().err and not kubectl.calls("delete")
    assert cli.main(["jobs", "cancel", name, "--yes"]) == 0
    ((delete, _),) = kubectl.calls("delete")
    assert set(delete[2 : 2 + len(gone)]) == set(gone) and "--wait=false" in delete
    assert f"cancelled {', '.join(reversed(gone))}" in capsys.readouterr().out


def test_the_evaluation_waits_for_the_policy(kubectl, capsys):
    """Cancelled, it takes nothing along; with the policy it goes."""
    four = [*three(), a_job("hvd-evaluate", "evaluate", parallelism=0)]
    own_container(four[2])["args"][-2:-2] = ["--evaluate-job", "hvd-evaluate"]
    kubectl.has(four)
    queue = Queue()
    waiting = {name: queue.state(name).waiting_for for name in queue.jobs}
    assert waiting["hvd-evaluate"] == ["hvd-awr"] and waiting["hvd-awr"] == waiting["hvd-awr-gate"] == ["hvd-value"]
    assert queue.dependents("hvd-evaluate") == ["hvd-evaluate"]
    assert queue.dependents("hvd-awr") == ["hvd-awr", "hvd-awr-gate", "hvd-evaluate"]
    assert queue.dependents("hvd-value") == ["hvd-value", "hvd-awr-gate", "hvd-awr", "hvd-evaluate"]


@pytest.mark.parametrize(
    "text, named", [("hvd-value", True), ("123", False), ("Hvd", False), ("a b", False), ("-x", False)]
)
def test_what_may_be_a_name(text, named):
    assert is_name(text) is named
