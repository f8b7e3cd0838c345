"""The shipped manifests: those of k8s/base as they are, and every overlay as kustomize renders it.

What is rendered lies in golden/, so that most tests need no kubectl. `python -m tests.k8s.render` renders it again:
look at the differences before you commit.
"""

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.clusters import kubernetes_cluster

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "k8s" / "base"
GOLDEN = Path(__file__).with_name("golden")
OVERLAYS = tuple(sorted(path.parent.name for path in (ROOT / "k8s" / "overlays").glob("*/kustomization.yaml")))
MANIFESTS = ("base", *OVERLAYS)

Document = dict[str, Any]


def kubectl() -> str | None:
    """The one that the cluster tests installed, else that of the machine; None where there is none."""
    own = kubernetes_cluster.CACHE / "kubectl"
    return str(own) if own.exists() else shutil.which("kubectl")


def render(overlay: str) -> str:
    """What `kubectl apply -k` would apply. Needs kubectl, and no cluster."""
    program = kubectl()
    assert program, "no kubectl here: python -m tests.clusters.kubernetes_cluster"
    folder = ROOT / "k8s" / "overlays" / overlay
    done = subprocess.run([program, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, f"{overlay}: {done.stderr}"  # a warning: something is deprecated
    return done.stdout


def documents(name: str) -> list[Document]:
    """The objects of k8s/base, or of an overlay's golden file; the caller may change them."""
    if name == "base":
        files = [path for path in sorted(BASE.glob("*.yaml")) if path.name != "kustomization.yaml"]
    else:
        files = [GOLDEN / f"{name}.yaml"]
    return [document for path in files for document in yaml.safe_load_all(path.read_text())]


def find(found: list[Document], kind: str, name: str) -> Document:
    return next(one for one in found if (one["kind"], one["metadata"]["name"]) == (kind, name))


def jobs(found: list[Document]) -> list[Document]:
    """The Jobs, and those that a JobSet would create, in the order in which their stages run."""
    order = ("value", "policy", "gate")
    made = [one for one in found if one["kind"] == "Job"]
    for one in found:
        if one["kind"] == "JobSet":
            made += [_job_of_set(one, replicated) for replicated in one["spec"]["replicatedJobs"]]
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


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for stale in GOLDEN.glob("*.yaml"):
        stale.unlink()
    for overlay in OVERLAYS:
        (GOLDEN / f"{overlay}.yaml").write_text(render(overlay))
