"""`hvd data push|pull` with a kubectl that runs the pod's command here (a real cluster: tests/clusters)."""

import json
import os
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from hvd import cli
from hvd.clusters.kubernetes import data, site
from tests.k8s.promises import RIGHTS, USER

POD = {"status": {"phase": "Running", "containerStatuses": [{"ready": True}]}}


@pytest.fixture
def volume(kubectl, tmp_path, monkeypatch) -> Path:
    """What is the pod's working directory."""
    folder = tmp_path / "storage"
    folder.mkdir()
    kubectl.answer("get pod", json.dumps(POD))
    program = Path(tmp_path / "kubectl" / "bin" / "kubectl")
    (program.parent / "others").write_text(program.read_text())
    (program.parent / "others").chmod(0o755)
    run = f'cd {folder}; while [ "$1" != -- ]; do shift; done; shift 2; exec {sys.executable} -m hvd.cli "$@"'
    program.write_text(f'#!/bin/sh\n[ "$1" != exec ] && exec {program.parent}/others "$@"\n{run}\n')
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return folder


def test_there_and_back(kubectl, volume, tmp_path, capsys):
    (tmp_path / "mine" / "meta").mkdir(parents=True)
    (tmp_path / "mine" / "meta" / "info.json").write_bytes(b"{}" * 100_000)
    (tmp_path / "by a link").symlink_to(tmp_path / "mine")  # the user's own word
    asked = ["--kubernetes.image", "r/hvd:2", "--kubernetes.namespace", "robots"]
    assert cli.main(["data", "push", "by a link", "data/mine"]) == 0
    assert "-> data/mine on the volume: 3 files and folders" in capsys.readouterr().out
    assert cli.main(["data", "pull", "data/mine", "back"]) == 0
    assert (tmp_path / "back" / "meta" / "info.json").read_bytes() == b"{}" * 100_000
    assert cli.main(["data", "push", "mine", "data/mine"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: on the volume: ") and "is there already" in said and said.count("\n") == 1
    assert cli.main(["data", "pull", "data/none", "more"]) == 2 and not (tmp_path / "more").exists()
    assert "error: on the volume: " in (said := capsys.readouterr().err) and "No such file" in said
    made = [yaml.safe_load(text)["metadata"]["name"] for _, text in kubectl.calls("create")]
    assert [args[2] for args, _ in kubectl.calls("delete")] == made and len({*made}) == 4, "each pod goes again"
    assert cli.main(["data", "pull", "../x", "y", *asked]) == 2
    assert "give a path below" in capsys.readouterr().err
    pod = yaml.safe_load(kubectl.calls("create")[-1][1])
    assert pod["metadata"]["namespace"] == "robots" and pod["spec"]["containers"][0]["image"] == "r/hvd:2"


def test_mistakes_make_no_pod(kubectl, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").symlink_to("/etc/passwd")
    for words, said in (
        (["push", "mine", "data/mine"], "mine/x is a link, and links are not followed"),
        (["push", "none", "data/mine"], "none: No such file or directory"),
        (["pull", "data/mine", "mine"], "is there already"),
        (["pull", "data/mine", ".", "--overwrite"], "name the file or folder that data/mine becomes, such as mine"),
        (["pull", "data/mine"], "hvd data push LOCAL REMOTE, or hvd data pull REMOTE LOCAL"),
        (["push", "mine", "x", "--kubernetes.nam", "x"], "nearest: --kubernetes.name"),
    ):
        assert cli.main(["data", *words]) == 2
        assert said in capsys.readouterr().err
    assert not kubectl.calls("create")


def test_a_pod_that_does_not_start_is_said_and_goes(kubectl, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no"}}
    kubectl.answer("get pod", json.dumps({"status": {"phase": "Pending", "containerStatuses": [{"state": waiting}]}}))
    assert cli.main(["data", "push", "mine", "data/mine", "--timeout", "0"]) == 1
    assert "does not run: ImagePullBackOff: no (--timeout 0)" in capsys.readouterr().err
    assert len(kubectl.calls("delete")) == 1


def test_the_pod_is_one_like_the_jobs():
    pod = data.pod_of(site.Settings(claim="mine", image_pull_secret="regcred", gpus_per_node=8))
    for version in ("1.28.0", "1.37.0"):
        kubernetes_validate.validate(pod, version, strict=True)
    spec = pod["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"] == USER and container["securityContext"] == RIGHTS
    assert spec["automountServiceAccountToken"] is False and spec["imagePullSecrets"] == [{"name": "regcred"}]
    assert spec["volumes"][0]["persistentVolumeClaim"]["claimName"] == "mine"
    assert [*container["resources"]["limits"]] == ["memory"] and "env" not in container
    assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == "hvd", "the NetworkPolicy is about it"
