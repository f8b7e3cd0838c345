"""The shipped manifests on a real cluster, with the image that docker/Dockerfile builds.

They run as k8s/overlays/smoke has them. What a test adds to that (another experiment, samples traced, more steps) is a
kustomization on top of it, as a user would write one.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvd.train.complete import read_complete
from tests.clusters.kubernetes_cluster import ROOT, KubernetesCluster, until

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(1500)]

STEPS, LONG = 60, 300  # of k8s/overlays/smoke, and of the run that is disturbed
JOBS = {"hvd-value": 2, "hvd-awr": 1, "hvd-awr-gate": 1}  # containers, those of initialisation included
TRACED = ["--value.trace_samples", "true", "--policy.trace_samples", "true"]
LONGER = [f"--{stage}.num_train_steps={LONG}" for stage in ("value", "policy")]
MADE = ["jobs/hvd-value", "jobs/hvd-awr", "jobs/hvd-awr-gate"]


def overlay(folder: Path, flags: list[str], *, retries: int | None = None) -> Path:
    """A kustomization on top of smoke that adds options to every container."""
    folder.mkdir(parents=True)
    patches = []
    for job, containers in JOBS.items():
        places = ["containers/0", "initContainers/0"][:containers]
        lines = [
            {"op": "add", "path": f"/spec/template/spec/{place}/args/-", "value": flag}
            for place in places
            for flag in flags
        ]
        if retries is not None:
            lines.append({"op": "replace", "path": "/spec/backoffLimit", "value": retries})
        patches.append({"target": {"kind": "Job", "name": job}, "patch": json.dumps(lines)})
    base = os.path.relpath(ROOT / "k8s" / "overlays" / "smoke", folder.resolve())  # kustomize takes no absolute path
    (folder / "kustomization.yaml").write_text(json.dumps({"resources": [base], "patches": patches}))
    return folder


def clear(cluster: KubernetesCluster) -> None:
    cluster.kubectl("delete", *MADE, "--ignore-not-found", "--cascade=foreground")


class Watched:
    """The run directories on the cluster's storage."""

    def __init__(self, cluster: KubernetesCluster, experiment: str):
        self.cluster, self.folder = cluster, cluster.storage / "runs" / experiment

    def step(self, stage: str) -> int:
        path = self.folder / stage / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def events(self, stage: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / stage / "events.jsonl").read_text().splitlines()]

    def until_step(self, stage: str, step: int) -> None:
        until(
            lambda: self.step(stage) >= step,
            lambda: f"{stage} at {step}\n{self.cluster.kubectl('get', 'pods')}",
            240,
            0.05,
        )


@pytest.fixture(scope="module")
def calm(kubernetes, first_try):
    """Both stages, undisturbed: what the first lines of docs/kubernetes.md have left."""
    yield Watched(kubernetes, "demo")


def test_both_stages_complete_one_after_the_other(kubernetes, calm):
    (value,), (policy,) = kubernetes.pods("hvd-value"), kubernetes.pods("hvd-awr")
    ended = kubernetes.job("hvd-value")["status"]["completionTime"]
    assert policy["metadata"]["creationTimestamp"] >= ended
    assert policy["status"]["containerStatuses"][0]["state"]["terminated"]["startedAt"] >= ended
    assert kubernetes.job("hvd-awr")["spec"]["parallelism"] == 1, "the gate has released it"
    log = kubernetes.logs("hvd-awr-gate")
    assert f"complete at step {STEPS}" in log and "Job hvd-awr is released: 1 pod(s)" in log
    for stage in ("value", "policy"):
        found = read_complete(calm.folder / stage)
        assert found.step == STEPS and found.finite
        assert (calm.folder / stage / "complete.json").stat().st_uid == 10001
    assert value["spec"]["containers"][0]["image"] == "localhost/hvd:cpu"


def test_hvd_jobs_shows_it_all(kubernetes, calm):
    listed = json.loads(kubernetes.call(sys.executable, "-m", "hvd.cli", "jobs", "--json", cwd=ROOT).stdout)
    rows = {row["id"]: row for row in listed}
    assert {name: rows[name]["stage"] for name in JOBS} == {
        "hvd-value": "value",
        "hvd-awr": "policy",
        "hvd-awr-gate": "gate",
    }
    for name in ("hvd-value", "hvd-awr"):
        assert rows[name]["state"] == "COMPLETED" and rows[name]["experiment"] == "demo"
        assert rows[name]["step"] == rows[name]["total"] == STEPS and rows[name]["steps_per_s"] > 0
    assert "hvd-awr" in kubernetes.call(sys.executable, "-m", "hvd.cli", "jobs", cwd=ROOT).stdout
    log = kubernetes.call(sys.executable, "-m", "hvd.cli", "jobs", "logs", "hvd-awr", cwd=ROOT).stdout
    assert f"{STEPS}/{STEPS}" in log
    assert kubernetes.call(sys.executable, "-m", "hvd.cli", "jobs", "wait", "hvd-value", cwd=ROOT).returncode == 0


DENIED = [
    ("get", "jobs/hvd-awr"),
    ("patch", "jobs/hvd-value"),
    ("get", "jobs/another"),
    ("patch", "jobs/another"),
    ("list", "jobs"),
    ("watch", "jobs"),
    ("create", "jobs"),
    ("update", "jobs/hvd-awr"),
    ("delete", "jobs/hvd-awr"),
    ("delete", "jobs/hvd-value"),
    ("get", "secrets/hvd-credentials"),
    ("list", "secrets"),
    ("get", "configmaps"),
    ("list", "pods"),
    ("get", "pods"),
    ("create", "pods"),
    ("create", "pods/exec"),
    ("get", "pods/log"),
    ("delete", "pods"),
    ("create", "serviceaccounts/token"),
    ("patch", "roles/hvd-awr-gate"),
    ("create", "rolebindings"),
    ("get", "nodes"),
    ("impersonate", "users"),
]


def allowed(cluster, account: str, verb: str, what: str, namespace: str = "default") -> bool:
    as_whom = f"--as=system:serviceaccount:default:{account}"
    kind, _, sub = what.partition("/") if what.startswith(("pods/", "serviceaccounts/")) else (what, "", "")
    extra = [f"--subresource={sub}"] if sub else []
    answer = cluster.kubectl("auth", "can-i", verb, kind, *extra, as_whom, "-n", namespace, check=False)
    return answer.strip().splitlines()[-1] == "yes"


def test_the_gates_account_may_do_two_things(kubernetes, calm):
    assert allowed(kubernetes, "hvd-awr-gate", "get", "jobs/hvd-value")
    assert allowed(kubernetes, "hvd-awr-gate", "patch", "jobs/hvd-awr")
    assert [which for which in DENIED if allowed(kubernetes, "hvd-awr-gate", *which)] == []
    assert not allowed(kubernetes, "hvd-awr-gate", "get", "jobs/hvd-value", "kube-system")
    (value,) = kubernetes.pods("hvd-value")
    assert not any(
        "kube-api-access" in volume["name"] or "token" in volume["name"] for volume in value["spec"]["volumes"]
    )


def test_a_flipped_byte_keeps_the_gate_shut(kubernetes, calm):
    name = next(
        name for name in read_complete(calm.folder / "value").files if name.endswith(".zarray") or "/d/" in name
    )
    path = calm.folder / "value" / name
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    try:
        kubernetes.kubectl("delete", "jobs/hvd-awr", "jobs/hvd-awr-gate", "--cascade=foreground")
        kubernetes.kubectl("apply", "-k", str(ROOT / "k8s" / "overlays" / "smoke"))
        kubernetes.wait("hvd-awr-gate", "Failed", 60)
        log = kubernetes.logs("hvd-awr-gate")
        assert "error: " in log and name in log
        (pod,) = kubernetes.pods("hvd-awr-gate")
        assert pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 2
        assert kubernetes.job("hvd-awr")["spec"]["parallelism"] == 0 and not kubernetes.pods("hvd-awr")
    finally:
        path.write_bytes(whole)


def test_a_value_stage_that_fails_ends_the_gate_at_once(kubernetes, calm, tmp_path):
    clear(kubernetes)
    flags = ["--exp_name", "broken", "--value.batch_size", "0"]
    kubernetes.kubectl("apply", "-k", str(overlay(tmp_path / "on", flags, retries=0)))
    until(lambda: kubernetes.condition("hvd-value") == "Failed", "the value Job fails", 120)
    failed = time.monotonic()
    until(lambda: kubernetes.condition("hvd-awr-gate") == "Failed", "the gate fails", 60)
    assert time.monotonic() - failed < 15
    log = kubernetes.logs("hvd-awr-gate")
    assert "failed: Job hvd-value failed, so the policy does not start: BackoffLimitExceeded" in log
    assert not kubernetes.pods("hvd-awr") and kubernetes.job("hvd-awr")["spec"]["parallelism"] == 0
    shown = kubernetes.call(sys.executable, "-m", "hvd.cli", "jobs", "wait", "hvd-value", cwd=ROOT, check=False)
    assert shown.returncode == 2 and "batch_size" in shown.stdout
    cancelled = kubernetes.call(sys.executable, "-m", "hvd.cli", "jobs", "cancel", "hvd-value", "--yes", cwd=ROOT)
    assert "cancelled hvd-awr, hvd-awr-gate, hvd-value" in cancelled.stdout
    until(lambda: not kubernetes.get("jobs")["items"], "all are gone", 30)


@pytest.fixture(scope="module")
def disturbed(kubernetes, first_try, tmp_path_factory):
    """The run that a pod's deletion hits in both stages, and another `kubectl apply` too."""
    clear(kubernetes)
    run, found = Watched(kubernetes, "disturbed"), {}
    where = str(overlay(tmp_path_factory.mktemp("disturbed") / "on", ["--exp_name", "disturbed", *LONGER, *TRACED]))
    kubernetes.kubectl("apply", "-k", where)
    run.until_step("value", 20)
    before = kubernetes.pods("hvd-value")
    found["reapplied in the value stage"] = kubernetes.kubectl("apply", "-k", where)
    found["value pods"] = [[pod["metadata"]["uid"] for pod in pods] for pods in (before, kubernetes.pods("hvd-value"))]
    for stage, job in (("value", "hvd-value"), ("policy", "hvd-awr")):
        run.until_step(stage, 60)
        (pod,) = kubernetes.pods(job)
        found[f"{stage} log"] = subprocess.Popen(
            ["kubectl", "logs", "-f", pod["metadata"]["name"]],
            env={"PATH": kubernetes.path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        kubernetes.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
        said = kubernetes.storage / "runs" / ".jobs" / kubernetes.job(job)["metadata"]["uid"] / "exit" / "0"
        until(lambda path=said: path.exists() and path.read_text().strip() == "143", f"{stage} ends with 143", 60, 0.05)
        if stage == "policy":
            run.until_step("policy", 160)
            found["reapplied in the policy stage"] = kubernetes.kubectl("apply", "-k", where)
        kubernetes.wait(job, "Complete", 400)
    kubernetes.wait("hvd-awr-gate", "Complete", 60)
    found["gate"] = kubernetes.logs("hvd-awr-gate")
    yield run, found


@pytest.mark.parametrize("stage", ["value", "policy"])
def test_a_pod_that_is_deleted_saves_and_its_successor_goes_on(disturbed, stage):
    run, found = disturbed
    log = found[f"{stage} log"].communicate(timeout=30)[0]
    assert "stopped: " in log
    events = run.events(stage)
    stop = next(event for event in events if event["event"] == "stop")
    again = [event for event in events if event["event"] == "start"][1]
    assert again["step"] == stop["step"] >= 60, "no step is lost"
    samples = [json.loads(line)["step"] for line in (run.folder / stage / "samples.jsonl").read_text().splitlines()]
    assert samples == list(range(LONG)), "none twice, none left out"
    assert read_complete(run.folder / stage).step == LONG
    assert not (run.folder / stage / "owner.json").exists() and not (run.folder / stage / "owner.json.alive").exists()


def test_the_same_files_applied_again_change_nothing_while_the_value_stage_runs(disturbed):
    _, found = disturbed
    assert {line.split()[-1] for line in found["reapplied in the value stage"].splitlines()} == {"unchanged"}
    before, after = found["value pods"]
    assert before == after


def test_applied_again_while_the_policy_runs_it_goes_on_where_it_saved(disturbed):
    """kubectl sets the parallelism back to the file's 0: the pod saves, and the gate lets the next one go on."""
    run, found = disturbed
    assert "job.batch/hvd-awr configured" in found["reapplied in the policy stage"]
    starts = [event["step"] for event in run.events("policy") if event["event"] == "start"]
    stops = [event["step"] for event in run.events("policy") if event["event"] == "stop"]
    assert starts == [0, *stops] and len(stops) == 2 and stops[1] >= 160
