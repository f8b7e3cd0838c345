"""The shipped manifests: the files of k8s/ as they are, and every overlay as kustomize renders it.

After a change of a file in k8s/, `python -m tests.k8s.render` copies it to k8s/base and renders the golden file again:
look at the differences before you commit.
"""

import copy
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.clusters import kubernetes_cluster

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
FILES = ("storage.yaml", "value-job.yaml", "awr-job.yaml")
OVERLAYS = tuple(sorted(path.parent.name for path in (K8S / "overlays").glob("*/kustomization.yaml")))
MANIFESTS = ("base", *OVERLAYS)
# The overlay that adds most. Its policy Job is left out: a test holds it to be the value Job but for what it names
GOLDEN, GOLDEN_LEAVES_OUT = Path(__file__).parent / "golden" / "multi-node.yaml", ("Job", "hvd-awr")
NO_KUBECTL = "no kubectl here of version 1.25 or newer: python -m tests.clusters.kubernetes_cluster"

Document = dict[str, Any]


@functools.cache
def kubectl() -> str | None:
    """The one that the cluster tests installed, else that of the machine; None where neither is new enough."""
    for program in (str(kubernetes_cluster.CACHE / "kubectl"), shutil.which("kubectl")):
        if program and os.path.exists(program):
            asked = [program, "version", "--client", "-o", "json"]
            said = subprocess.run(asked, capture_output=True, text=True, check=False)
            if not said.returncode and int(yaml.safe_load(said.stdout)["clientVersion"]["minor"].rstrip("+")) >= 25:
                return program
    return None


@functools.cache
def render(overlay: str) -> str:
    """What `kubectl apply -k` would apply. Needs no cluster; the test is skipped where there is no kubectl."""
    program = kubectl()
    if program is None:
        pytest.skip(NO_KUBECTL)
    with tempfile.TemporaryDirectory() as home:  # kubectl keeps its cache there
        done = subprocess.run(
            [program, "kustomize", K8S / "overlays" / overlay],
            env=os.environ | {"KUBECACHEDIR": home, "HOME": home},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0 and not done.stderr, f"{overlay}: {done.stderr}"  # a warning: something is deprecated
    return done.stdout


@functools.cache
def _documents(name: str) -> list[Document]:
    texts = [(K8S / file).read_text() for file in FILES] if name == "base" else [render(name)]
    return [document for text in texts for document in yaml.safe_load_all(text)]


def documents(name: str) -> list[Document]:
    """The objects of k8s/*.yaml ("base"), or of an overlay; the caller may change them."""
    return copy.deepcopy(_documents(name))


def find(docs: list[Document], kind: str, name: str) -> Document:
    return next(doc for doc in docs if (doc["kind"], doc["metadata"]["name"]) == (kind, name))


def jobs(docs: list[Document]) -> list[Document]:
    """The Jobs, and those that a JobSet would create, in the order in which their stages run."""
    order = ("value", "policy", "gate", "evaluate")
    made = [doc for doc in docs if doc["kind"] == "Job"]
    for doc in docs:
        if doc["kind"] == "JobSet":
            made += [_job_of_set(doc, replicated) for replicated in doc["spec"]["replicatedJobs"]]
    return sorted(made, key=lambda job: order.index(component(job)))


def component(document: Document) -> str:
    return document["metadata"]["labels"]["app.kubernetes.io/component"]


def _job_of_set(jobset: Document, replicated: Document) -> Document:
    """The same objects as in the JobSet, not copies: a test's change of one is seen in the other."""
    template = replicated["template"]
    name = f"{jobset['metadata']['name']}-{replicated['name']}-0"
    metadata = copy.deepcopy(template["metadata"]) | {"name": name}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": template["spec"]}


def containers(job: Document) -> list[Document]:
    """All of the Job's pod, the init containers first."""
    pod = job["spec"]["template"]["spec"]
    return [*pod.get("initContainers", ()), *pod["containers"]]


def golden() -> str:
    """What the golden file must hold."""
    overlay = render(GOLDEN.stem)
    kept = [text for text in overlay.split("---\n") if _name(yaml.safe_load(text)) != GOLDEN_LEAVES_OUT]
    return "---\n".join(kept)


def _name(document: Document) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


if __name__ == "__main__":
    for file in FILES:
        shutil.copyfile(K8S / file, K8S / "base" / file)
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(golden())
