"""`--stage all` on a real cluster, from an empty volume to the report on the user's machine.

Two people do it at the same moment, in one namespace and on one volume. Ann is an administrator, and a gate releases
her Jobs; her data are simulated by her first Job. Ben has the ClusterRole edit, which may not create Roles, so his
launcher releases his Jobs; he brings datasets of his own.
"""

import base64
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hvd.train.complete import read_complete
from tests.clusters.kubernetes_cluster import ROOT, KubernetesCluster, until
from tests.clusters.site import SMALL
from tests.train import factory

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(900)]

PLACE = ["--kubernetes.namespace", "team", "--kubernetes.overlay", str(ROOT / "k8s/overlays/smoke")]
STEPS = 12
SHORT = {
    f"{stage}.{name}": str(number)
    for stage in ("value", "policy")
    for name, number in {"num_train_steps": STEPS, "save_interval": STEPS, "val_interval": STEPS}.items()
}
ANN = SHORT | {"sim.num_optimal": "4", "sim.num_mixed": "6", "value.batch_size": "16", "policy.batch_size": "16"}
ANN |= {"evaluate.num_rollouts": "2", "evaluate.videos": "1", "evaluate.baselines": "false"}
ANN |= {"policy.gate": "none"}  # of six recordings none may succeed
BEN = SMALL | SHORT | {"sim.task": ""}
BEN |= {f"{role}_data.root": f"data/mine/{role}" for role in ("optimal", "suboptimal")}


def hvd(cluster: KubernetesCluster, *words: str) -> str:
    return cluster.call(sys.executable, "-m", "hvd.cli", *words, *PLACE, cwd=ROOT).stdout


def launch(cluster: KubernetesCluster, name: str, fields: dict[str, str], *more: str, check: bool = True):
    options = [f"--{field}={value}" for field, value in fields.items()]
    command = ["--stage", "all", "--cluster", "kubernetes", *PLACE, "--config", "demo", "--exp_name", name]
    return cluster.call(sys.executable, "launch/submit.py", *command, *options, *more, cwd=ROOT, check=check)


@pytest.fixture
def ben(kubernetes) -> list[str]:
    """What makes a command his."""
    kubernetes.kubectl("create", "serviceaccount", "ben", "-n", "team")
    rights = ["--clusterrole=edit", "--serviceaccount=team:ben", "-n", "team"]
    kubernetes.kubectl("create", "rolebinding", "ben", *rights)
    account = ("serviceaccount", "ben", "-n", "team")
    until(lambda: kubernetes.get(*account).get("secrets"), "ben has a token", 30)
    secret = kubernetes.get("secret", kubernetes.get(*account)["secrets"][0]["name"], "-n", "team")
    token = base64.b64decode(secret["data"]["token"]).decode()
    cluster = kubernetes.kubectl("config", "get-clusters").split()[-1]
    kubernetes.kubectl("config", "set-credentials", "ben", f"--token={token}")
    kubernetes.kubectl("config", "set-context", "ben", f"--cluster={cluster}", "--user=ben")
    return ["--kubernetes.context", "ben"]


def opened(folder: Path, name: str, words: Iterable[str]) -> str:
    """The report of a complete run that was pulled; it must say the words."""
    for stage in ("value", "policy"):
        assert read_complete(folder / stage).step == STEPS
    page = (folder / "report.html").read_text()
    assert f"<title>hvd: {name}</title>" in page and page.rstrip().endswith("</html>")
    assert not [word for word in words if word not in page], page
    return page


def test_two_people_from_nothing_to_their_reports(kubernetes, team, ben, tmp_path):
    assert not list(team.iterdir())
    factory.write_dataset(tmp_path / "mine" / "optimal", episodes=4, length=20, seed=1)
    factory.write_dataset(tmp_path / "mine" / "suboptimal", episodes=6, length=20, seed=2)
    hvd(kubernetes, "data", "push", str(tmp_path / "mine"), "data/mine", *ben)
    assert (team / "data/mine/optimal/meta/info.json").exists()

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(launch, kubernetes, "a", ANN), pool.submit(launch, kubernetes, "b", BEN, *ben)]
        ann, other = (one.result().stdout for one in both)
    for name, said in (("a", ann), ("b", other)):
        for job in ("value", "awr", "evaluate"):
            assert f"hvd-{name}-{job}: COMPLETED" in said, said
        assert "hvd-b-" not in ann and "hvd-a-" not in other
    assert "you may not create Roles" in other and "you may not create Roles" not in ann
    for job in ("awr", "evaluate"):
        assert f"Job hvd-b-{job} is released: 1 pod(s)" in other and f"hvd-a-{job} is released" not in ann
    gate = kubernetes.kubectl("logs", "job/hvd-a-awr-gate", "-n", "team")
    assert f"a/policy: complete at step {STEPS}" in gate and "Job hvd-a-evaluate is released" in gate
    hvd(kubernetes, "data", "pull", "runs/a", str(tmp_path / "a"))
    hvd(kubernetes, "data", "pull", "runs/b", str(tmp_path / "b"), *ben)
    assert "Not in this report" not in opened(tmp_path / "a", "a", ["data:video/mp4", "Credit"])
    assert json.loads((tmp_path / "a/evaluation/policy/results.json").read_text())["num_rollouts"] == 2
    results = json.loads((tmp_path / "b/evaluation/policy/results.json").read_text())
    error = results["datasets"]["optimal"]["action_error"]["policy"]["raw"]
    opened(tmp_path / "b", "b", ["Held-out episodes", f">{error:.4f}<"])
    pods = ("pods", "-l", "app.kubernetes.io/component=data", "-n", "team")
    until(lambda: not kubernetes.get(*pods)["items"], "the pods that had the volume are gone", 60)

    jobs = kubernetes.get("jobs", "-n", "team")["items"]
    uids = {job["metadata"]["name"]: job["metadata"]["uid"] for job in jobs}
    refused = launch(kubernetes, "a", ANN | {"value.batch_size": "8"}, check=False)
    said = "is there already and has other arguments (value.batch_size 16)"
    assert refused.returncode == 2 and said in refused.stderr, refused.stderr
    wrong = ["--kubernetes.queue", "queue_", "--kubernetes.name", "x"]
    refused = launch(kubernetes, "a", ANN, *wrong, check=False)
    assert refused.returncode == 2 and "the cluster refuses the manifests" in refused.stderr
    jobs = kubernetes.get("jobs", "-n", "team")["items"]
    assert uids == {job["metadata"]["name"]: job["metadata"]["uid"] for job in jobs}
