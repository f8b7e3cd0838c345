"""What `hvd jobs` makes of what kubectl says; kubectl is faked (a real cluster: tests/clusters)."""

import json
import sys

import pytest

from hvd import cli
from hvd.clusters.kubernetes import queue as kubernetes
from hvd.clusters.kubernetes.queue import KubernetesJob
from hvd.errors import UserError

BAR = (
    "value:   1%|  | 2/60 [00:10<01:59,  2.17s/step, loss=6.0]\r"
    "value:  52%|##  | 31/60 [00:15<00:14,  2.00step/s, loss=5.4]"
)


def a_job(name: str, component: str, *, condition: str = "", args: tuple[str, ...] = (), **spec) -> dict:
    conditions = [
        {
            "type": condition,
            "status": "True",
            "reason": "BackoffLimitExceeded",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
    ]
    return {
        "metadata": {
            "name": name,
            "creationTimestamp": f"2026-01-01T00:00:0{len(name) % 10}Z",
            "labels": {"app.kubernetes.io/component": component},
        },
        "spec": {"parallelism": 1, **spec, "template": {"spec": {"containers": [{"args": list(args)}]}}},
        "status": {"conditions": conditions if condition else [], "failed": 0},
    }


def a_pod(job: str, phase: str, *, node: str = "node1", **status) -> dict:
    return {
        "metadata": {"name": f"{job}-abc", "labels": {"job-name": job}, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"nodeName": node},
        "status": {"phase": phase, **status},
    }


def terminated(code: int, message: str = "", reason: str = "Error") -> list[dict]:
    return [{"state": {"terminated": {"exitCode": code, "message": message, "reason": reason}}}]


KUBECTL = """#!{python}
import json, pathlib, sys
here = pathlib.Path({folder!r})
with (here / "calls").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
answer = here / "-".join(sys.argv[1:3] if sys.argv[1] == "get" else sys.argv[1:2])
if not answer.exists():
    print("Unable to connect to the server: dial tcp: timeout", file=sys.stderr)
    sys.exit(1)
print(answer.read_text())
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """`cluster(jobs, pods, log)`: what kubectl answers from then on; without a call nobody answers."""
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(KUBECTL.format(python=sys.executable, folder=str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").write_text("a-cluster")

    def says(jobs: list[dict], pods: list[dict] = [], log: str = "") -> None:  # noqa: B006
        (tmp_path / "get-jobs").write_text(json.dumps({"items": jobs}))
        (tmp_path / "get-pods").write_text(json.dumps({"items": pods}))
        (tmp_path / "logs").write_text(log)
        (tmp_path / "delete").write_text("")

    says.calls = lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    return says


@pytest.mark.parametrize(
    "job, pods, state, reason",
    [
        (a_job("v", "value"), [], "PENDING", ""),
        (a_job("v", "value", parallelism=0), [], "PAUSED", ""),
        (a_job("v", "value", suspend=True), [], "PAUSED", ""),
        (a_job("v", "value"), [a_pod("v", "Running")], "RUNNING", ""),
        (
            a_job("v", "value"),
            [
                a_pod(
                    "v",
                    "Pending",
                    conditions=[{"type": "PodScheduled", "status": "False", "message": "0/3 nodes: no GPU"}],
                )
            ],
            "PENDING",
            "0/3 nodes: no GPU",
        ),
        (
            a_job("v", "value"),
            [
                a_pod(
                    "v",
                    "Pending",
                    containerStatuses=[{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no"}}}],
                )
            ],
            "PENDING",
            "ImagePullBackOff: no",
        ),
        (
            a_job("v", "value"),
            [a_pod("v", "Pending", containerStatuses=[{"state": {"waiting": {"reason": "PodInitializing"}}}])],
            "PENDING",
            "",
        ),
        (a_job("v", "value", condition="Complete"), [], "COMPLETED", ""),
        (a_job("v", "value", condition="Failed"), [], "FAILED", "BackoffLimitExceeded"),
        (
            a_job("v", "value", condition="Failed"),
            [a_pod("v", "Failed", containerStatuses=terminated(2, "bar\nerror: no dataset\n"))],
            "FAILED",
            "error: no dataset",
        ),
        (
            a_job("v", "value", condition="Failed"),
            [a_pod("v", "Failed", initContainerStatuses=terminated(137, "", "OOMKilled"))],
            "FAILED",
            "exit code 137 (OOMKilled)",
        ),
    ],
)
def test_states(job, pods, state, reason):
    found = KubernetesJob(job, pods)
    assert (found.state, found.reason) == (state, reason)
    assert found.ended == (state in ("COMPLETED", "FAILED"))


def test_exit_codes_are_those_of_the_last_pod():
    pods = [
        a_pod("v", "Failed", initContainerStatuses=terminated(0), containerStatuses=terminated(143)),
        a_pod("v", "Failed", initContainerStatuses=terminated(0), containerStatuses=terminated(2)),
    ]
    found = KubernetesJob(a_job("v", "value", condition="Failed"), pods)
    assert found.exit_code == kubernetes.result(found) == 2
    assert kubernetes.result(KubernetesJob(a_job("v", "value", condition="Failed"), [])) == 1
    assert kubernetes.result(KubernetesJob(a_job("v", "value", condition="Complete"), [])) == 0


GATE = ("gate", "--value-job", "hvd-value", "--policy-job", "hvd-awr", "--pods", "1", "--config", "demo")


def three() -> list[dict]:
    return [
        a_job("hvd-value", "value", args=("train-value", "--config", "demo", "--exp_name=x")),
        a_job("hvd-awr", "policy", parallelism=0, args=("train-policy", "--config", "demo")),
        a_job("hvd-awr-gate", "gate", args=GATE),
    ]


def test_the_list(cluster, capsys):
    cluster(three(), [a_pod("hvd-value", "Running"), a_pod("hvd-awr-gate", "Running")], BAR)
    assert cli.main(["jobs", "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    value = rows["hvd-value"]
    assert (value["step"], value["total"], value["steps_per_s"], value["eta_s"]) == (31, 60, 2.0, 14.5)
    assert value["state"] == "RUNNING" and value["nodes"] == "node1" and value["experiment"] == "x"
    assert rows["hvd-awr"]["state"] == "PAUSED" and rows["hvd-awr"]["waiting_for"] == ["hvd-value"]
    assert rows["hvd-awr-gate"]["step"] is None
    assert cli.main(["jobs"]) == 0
    assert "hvd-awr" in capsys.readouterr().out


def test_old_ones_are_shown_on_request_only(cluster, capsys):
    cluster([a_job("hvd-value", "value", condition="Complete")])  # it ended on 2026-01-01
    assert cli.main(["jobs"]) == 0 and "hvd-value" not in capsys.readouterr().out
    assert cli.main(["jobs", "--all"]) == 0 and "hvd-value" in capsys.readouterr().out


def test_a_cluster_that_does_not_answer_is_said(cluster, capsys):
    assert cli.main(["jobs"]) == 0
    assert "Kubernetes: kubectl get: Unable to connect" in capsys.readouterr().err
    assert cli.main(["jobs", "wait", "hvd-value"]) == 1


def test_wait_ends_with_the_jobs_code(cluster, capsys):
    pods = [a_pod("hvd-value", "Failed", containerStatuses=terminated(2, "error: bad"))]
    cluster([a_job("hvd-value", "value", condition="Failed")], pods)
    assert cli.main(["jobs", "wait", "hvd-value"]) == 2
    assert "hvd-value: FAILED, exit code 2: error: bad" in capsys.readouterr().out
    cluster(three(), [a_pod("hvd-value", "Running")])
    assert cli.main(["jobs", "wait", "hvd-value", "--timeout", "0"]) == 124


def test_a_policy_job_whose_gate_has_failed_is_not_waited_for(cluster, capsys):
    value, policy, _ = three()
    pods = [a_pod("hvd-awr-gate", "Failed", containerStatuses=terminated(2, "error: a byte"))]
    cluster([value, policy, a_job("hvd-awr-gate", "gate", condition="Failed", args=GATE)], pods)
    assert cli.main(["jobs", "wait", "hvd-awr"]) == 2
    assert "hvd-awr will not start: its gate hvd-awr-gate FAILED, exit code 2: error: a byte" in capsys.readouterr().out


def test_an_unknown_name_offers_near_ones(cluster, capsys):
    cluster(three())
    assert cli.main(["jobs", "logs", "hvd-valu"]) == 2
    assert "no Job hvd-valu of hvd in this namespace; nearest: hvd-value" in capsys.readouterr().err


def test_logs_of_a_job_without_a_pod(cluster):
    cluster(three())
    with pytest.raises(UserError, match="has no log yet: it is PAUSED"):
        kubernetes.logs("hvd-awr", 10, follow=False)


@pytest.mark.parametrize(
    "name, gone",
    [
        ("hvd-value", ["hvd-value", "hvd-awr-gate", "hvd-awr"]),
        ("hvd-awr", ["hvd-awr", "hvd-awr-gate"]),
        ("hvd-awr-gate", ["hvd-awr-gate", "hvd-awr"]),
    ],
)
def test_cancel_takes_along_what_cannot_go_on(cluster, capsys, name, gone):
    cluster(three())
    assert cli.main(["jobs", "cancel", name, "--yes"]) == 0
    (delete,) = [call for call in cluster.calls() if call[0] == "delete"]
    assert set(delete[2 : 2 + len(gone)]) == set(gone) and "--wait=false" in delete
    assert f"deleted {', '.join(gone)}" in capsys.readouterr().out


def test_cancel_asks(cluster, capsys):
    cluster(three())
    assert cli.main(["jobs", "cancel", "hvd-value"]) == 2  # there is no terminal to answer at
    assert "add --yes" in capsys.readouterr().err
    assert not [call for call in cluster.calls() if call[0] == "delete"]


@pytest.mark.parametrize(
    "text, named", [("hvd-value", True), ("123", False), ("Hvd", False), ("a b", False), ("-x", False)]
)
def test_what_may_be_a_name(text, named):
    assert kubernetes.is_name(text) is named
