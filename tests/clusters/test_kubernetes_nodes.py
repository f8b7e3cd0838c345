"""Two pods of one stage by jax.distributed, on a real cluster.

The cluster is of version 1.20, which has no Indexed Jobs: the manifests are those of `--nodes 2`, and this file plays
the controller of Indexed Jobs, one pod an index, named and numbered as the real one does.
"""

import copy
import json
import os
import subprocess
import sys
import time

import pytest
import yaml

from hvd.train.complete import read_complete
from tests.clusters.kubernetes_cluster import ROOT, TOOLS, until

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(900)]

STEPS = 200
OPTIONS = ["--config", "demo", "--exp_name", "two", "--sim.num_optimal=4", "--sim.num_mixed=6"]
OPTIONS += [f"--value.num_train_steps={STEPS}", "--value.save_interval=50", "--value.val_interval=100"]
OPTIONS += ["--value.log_interval=5", "--value.batch_size=16", "--value.trace_samples=true"]
PLACE = ["--cluster", "kubernetes", "--nodes", "2", "--kubernetes.gpus_per_node", "0", "--kubernetes.memory", "2Gi"]
PLACE += ["--kubernetes.image", "localhost/hvd:cpu", "--dry-run"]
DNS = "10.96.0.10"


def pods_of(job: dict) -> list[dict]:
    """What the controller of an Indexed Job makes of it. Two differences: one node has to do, and it is a small one."""
    made = []
    for index in range(job["spec"]["completions"]):
        name = job["metadata"]["name"]
        pod = copy.deepcopy(job["spec"]["template"])
        pod |= {"apiVersion": "v1", "kind": "Pod"}
        pod["metadata"]["name"] = f"{name}-{index}-{time.time_ns() % 10**6}"
        pod["metadata"]["labels"] |= {"job-name": name, "controller-uid": f"uid-of-{name}"}
        pod["metadata"]["annotations"] = {"batch.kubernetes.io/job-completion-index": str(index)}
        pod["spec"]["hostname"] = f"{name}-{index}"
        del pod["spec"]["affinity"]
        for container in [*pod["spec"]["initContainers"], *pod["spec"]["containers"]]:
            container["resources"]["requests"] = {"cpu": "100m", "memory": "512Mi"}
        made.append(pod)
    return made


@pytest.fixture(scope="module")
def job(kubernetes):
    """The value Job of two nodes, its Service applied, and names of pods resolved."""
    rendered = kubernetes.call(
        sys.executable, "launch/submit.py", "--stage", "value", *PLACE, *OPTIONS, cwd=ROOT
    ).stdout
    docs = list(yaml.safe_load_all(rendered))
    assert sorted(doc["kind"] for doc in docs) == ["Job", "NetworkPolicy", "PersistentVolumeClaim", "Service"]
    for doc in docs:
        there = doc["kind"] == "PersistentVolumeClaim" and kubernetes.get("pvc")["items"]
        if doc["kind"] != "Job" and not there:
            kubernetes.kubectl("apply", "-f", "-", stdin=yaml.safe_dump(doc))
    kubernetes.inside("ip", "addr", "add", f"{DNS}/32", "dev", "br0")
    dns = subprocess.Popen(
        [*kubernetes.enter(), "python3", str(TOOLS / "minidns.py"), DNS],
        env=os.environ | {"PATH": kubernetes.path, "KUBECONFIG": str(kubernetes.folder / "kubeconfig")},
    )
    yield next(doc for doc in docs if doc["kind"] == "Job")
    dns.kill()
    dns.wait()


def start(kubernetes, job: dict) -> list[str]:
    pods = pods_of(job)
    kubernetes.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all(pods))
    return [pod["metadata"]["name"] for pod in pods]


def phases(kubernetes, names: list[str]) -> dict[str, str]:
    found = {pod["metadata"]["name"]: pod for pod in kubernetes.get("pods")["items"]}
    return {name: found[name]["status"]["phase"] if name in found else "gone" for name in names}


def test_two_pods_train_and_save_together(kubernetes, job):
    run = kubernetes.storage / "runs" / "two" / "value"

    def step() -> int:
        lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    names = start(kubernetes, job)

    def logs() -> str:
        texts = [kubernetes.kubectl("logs", name, "--all-containers", "--tail=40", check=False) for name in names]
        return "\n".join([str(phases(kubernetes, names)), *texts])

    until(lambda: step() >= 20 or "Failed" in phases(kubernetes, names).values(), logs, 300)
    assert "Failed" not in phases(kubernetes, names).values(), logs()
    # a signal to one of them only: all save at the same step and end with 143
    kubernetes.kubectl("delete", "pod", names[1], "--wait=false")
    until(lambda: phases(kubernetes, names)[names[0]] == "Failed", logs, 90)
    until(lambda: phases(kubernetes, names)[names[1]] == "gone", logs, 90)
    pod = kubernetes.get("pod", names[0])
    assert pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 143
    said = kubernetes.storage / "runs" / ".jobs" / "uid-of-hvd-two-value" / "exit"
    assert {path.name: path.read_text().strip() for path in said.iterdir()} == {"0": "143", "1": "143"}
    kubernetes.kubectl("delete", "pod", names[0])
    stopped = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()][-1]
    assert stopped["event"] == "stop" and stopped["step"] >= 20

    names = start(kubernetes, job)
    until(lambda: not {"Pending", "Running"} & {*phases(kubernetes, names).values()}, logs, 300)
    assert {*phases(kubernetes, names).values()} == {"Succeeded"}, logs()
    assert read_complete(run).step == STEPS
    starts = [
        line for line in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if line["event"] == "start"
    ]
    assert [line["step"] for line in starts] == [0, stopped["step"]]
    samples = [json.loads(line)["step"] for line in (run / "samples.jsonl").read_text().splitlines()]
    assert samples == list(range(STEPS)), "none twice, none left out"
    first = kubernetes.kubectl("logs", names[1], "-c", "prepare")
    assert "waiting for process 0 to prepare" in first
    kubernetes.kubectl("delete", "pods", *names)
