"""docs/kubernetes.md, followed word for word on a real cluster, as a new user would.

Last of the tests in the default namespace: its last line deletes the volume claim. The lines before are the fixture
`first_try`, whose runs the other tests look at.
"""

import json
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from tests.clusters.kubernetes_cluster import ROOT
from tests.clusters.kubernetes_docs import commands, follow

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(1500)]


def put_in_and_take_out(kubernetes, folder: Path) -> None:
    """The lines of "Data in, results out", with the image and the options of the smoke overlay, and few rollouts."""
    (folder / "data" / "mine").mkdir(parents=True)
    (folder / "data" / "mine" / "a").write_text("recorded")
    lines = commands("Data in, results out")
    assert len(lines) == 4
    (train,) = yaml.safe_load_all((ROOT / "k8s" / "overlays" / "smoke" / "kustomization.yaml").read_text())
    options = next(
        line["value"][3:]
        for patch in train["patches"]
        for line in yaml.safe_load(patch["patch"])
        if line["path"].endswith("containers/0/args") and line["value"][0] == "train-policy"
    )
    for line in lines:
        words = shlex.split(line)
        assert words[0].endswith("uv")
        step = words[2] == "python"
        short = [*options, "--evaluate.num_rollouts=2", "--evaluate.videos=0", "--evaluate.no-checks"] if step else []
        short += ["--evaluate.no-baselines"] if step else []
        program = [sys.executable, str(ROOT / words[3])] if step else [sys.executable, "-m", "hvd.cli"]
        place = ["--kubernetes.image", "localhost/hvd:cpu", "--kubernetes.overlay", str(ROOT / "k8s/overlays/smoke")]
        words = words[4 if step else 3 :]
        env = {"PYTHONPATH": str(ROOT)}
        kubernetes.call(*program, *words, *short, *place, cwd=folder, **env)
    kubernetes.kubectl("delete", "job", "hvd-evaluate", "--cascade=foreground")
    assert (kubernetes.storage / "data" / "mine" / "a").read_text() == "recorded"
    assert (
        "<html" in (folder / "report.html").read_text() and (folder / "results" / "policy" / "complete.json").exists()
    )


def test_a_first_try(kubernetes, first_try, tmp_path):
    rows = [line.split() for line in first_try["./uv run hvd jobs"].splitlines()]
    assert {row[0]: row[3] for row in rows if row[0].startswith("hvd-")}["hvd-awr"] == "COMPLETED", first_try
    assert "Job hvd-awr is released: 1 pod(s)" in first_try["kubectl logs job/hvd-awr-gate"]
    waits = [said for command, said in first_try.items() if command.startswith("kubectl wait ")]
    assert len(waits) == 2 and all("condition met" in said for said in waits)

    put_in_and_take_out(kubernetes, tmp_path)
    follow(kubernetes, commands("A first try, on CPUs")[-1])
    left = kubernetes.get("jobs,pvc,roles,rolebindings")["items"]
    assert not left, json.dumps(left)
    assert (kubernetes.storage / "runs" / "demo" / "policy" / "complete.json").exists(), (
        "the volume is the machine's own"
    )
