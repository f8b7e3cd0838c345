"""docs/kubernetes.md, followed word for word on a real cluster, as a new user would.

Last of the cluster's tests: its last line deletes the volume claim.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.clusters.kubernetes_cluster import ROOT
from tests.image import builder

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(1500)]


def first_try() -> list[str]:
    """The commands of the block, without their comments."""
    page = (ROOT / "docs" / "kubernetes.md").read_text().partition("## A first try, on CPUs")[2]
    block = re.search(r"(^    .*\n)+", page, re.MULTILINE)
    assert block
    return [line.partition("#")[0].strip() for line in block.group().splitlines()]


def test_a_first_try(kubernetes):
    kubernetes.kubectl("delete", "jobs", "--all", "--cascade=foreground")
    said: dict[str, str] = {}
    for command in first_try():
        words = shlex.split(command)
        if words[0].endswith("uv"):
            words = [str(Path(sys.executable).with_name(words[2])), *words[3:]]
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
