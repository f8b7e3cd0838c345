"""The commands of docs/kubernetes.md, and how a test follows them."""

import re
import shlex
import sys
from pathlib import Path

from tests.clusters.kubernetes_cluster import ROOT, KubernetesCluster
from tests.image import builder


def commands(heading: str, blocks: int = 1) -> list[str]:
    """Of the first blocks below the heading, without their comments."""
    page = (ROOT / "docs" / "kubernetes.md").read_text().partition(f"## {heading}\n")[2]
    found = re.findall(r"(?:^    .*\n)+", page, re.MULTILINE)[:blocks]
    assert len(found) == blocks
    return [line.partition("#")[0].strip() for block in found for line in block.splitlines()]


def follow(cluster: KubernetesCluster, command: str) -> str:
    """Do what the line says; what it printed."""
    words = shlex.split(command)
    if words[0].endswith("uv"):
        words = [str(Path(sys.executable).with_name(words[2])), *words[3:]]
    # the image's store is the tests' own; a user has docker's or podman's
    env = builder.settings() if words[0].startswith("docker/") else {}
    return cluster.call(*words, cwd=ROOT, **env).stdout
