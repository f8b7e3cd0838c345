"""docs/kubernetes.md, followed word for word on a real cluster, as a new user would.

Last of the tests in the default namespace: its last line deletes the volume claim.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from tests.clusters.kubernetes_cluster import ROOT
from tests.image import builder

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(1500)]


def commands(heading: str, blocks: int = 1) -> list[str]:
    """Of the first blocks below the heading, without their comments."""
    page = (ROOT / "docs" / "kubernetes.md").read_text().partition(f"## {heading}\n")[2]
    found = re.findall(r"(?:^    .*\n)+", page, re.MULTILINE)[:blocks]
    assert len(found) == blocks
    return [line.partition("#")[0].strip() for block in found for line in block.splitlines()]


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


def test_a_first_try(kubernetes, tmp_path):
    kubernetes.kubectl("delete", "jobs", "--all", "--cascade=foreground")
    said: dict[str, str] = {}
    for command in commands("A first try, on CPUs"):
        words = shlex.split(command)
        if words[0].endswith("uv"):
            words = [str(Path(sys.executable).with_name(words[2])), *words[3:]]
        if words[:2] == ["kubectl", "delete"]:
            put_in_and_take_out(kubernetes, tmp_path)
        # the image's store is the tests' own; a user has docker's or podman's
        env = builder.settings() if words[0].startswith("docker/") else {}
        said[command] = kubernetes.call(*words, cwd=ROOT, **env).stdout
        if words[:2] == ["kubectl", "wait"]:
            assert "condition met" in said[command]
        if words[-1:] == ["jobs"]:
            rows = [line.split() for line in said[command].splitlines()]
            assert {row[0]: row[3] for row in rows if row[0].startswith("hvd-")}["hvd-awr"] == "COMPLETED", said
    assert "Job hvd-awr is released: 1 pod(s)" in said["kubectl logs job/hvd-awr-gate"]
    assert len(said) == 7
    left = kubernetes.get("jobs,pvc,roles,rolebindings")["items"]
    assert not left, json.dumps(left)
    assert (kubernetes.storage / "runs" / "demo" / "policy" / "complete.json").exists(), (
        "the volume is the machine's own"
    )
