"""Stages as Jobs of a Kubernetes cluster: the manifests of k8s/ with what the user asked for put in, and kubectl.

The files are the one source: they are read, changed where an option says so, and applied. Without options that is what
`kubectl apply -f k8s/value-job.yaml -f k8s/awr-job.yaml` applies.
"""

import copy
import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hvd import gpu_environment, overrides
from hvd.clusters.kubernetes import queue as cluster
from hvd.configs import Experiment
from hvd.errors import Failed, UserError
from hvd.stages import needs_value

K8S = Path(__file__).resolve().parents[3] / "k8s"
FILES = ("value-job.yaml", "awr-job.yaml")
MULTI_NODE = K8S / "overlays" / "multi-node"
GPU = "nvidia.com/gpu"
_PREFIX = "hvd"  # of all names in the files

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """--kubernetes.NAME; an empty text or -1 leaves what the manifests say.

    Attributes:
        overlay: a kustomize folder to start from, such as k8s/overlays/smoke; "" = k8s/base, on several nodes
            k8s/overlays/multi-node.
        image: of the trainer.
        name: what the Jobs' names begin with; two experiments at a time need two.
        claim: name of the volume claim that all stages share.
        gpus_per_node: 0 = a job on CPUs.
        gpu: its kind as `hvd plan` names it (h100-80gb): settings of XLA and NCCL, and the memory plan.
        cpus, memory: of a training pod, such as 16 and 128Gi.
        queue: of Kueue.
        priority: name of a PriorityClass.
    """

    overlay: str = ""
    image: str = ""
    name: str = ""
    claim: str = ""
    gpus_per_node: int = -1
    gpu: str = ""
    cpus: int = -1
    memory: str = ""
    queue: str = ""
    priority: str = ""


@dataclass(frozen=True)
class _Flags:
    kubernetes: Settings


def settings(flags: Sequence[overrides.Flag]) -> Settings:
    """Of the user's --kubernetes.NAME flags; UserError for one that makes no sense."""
    found = overrides.apply(_Flags(Settings()), flags).kubernetes
    for name in ("name", "claim", "priority"):
        if getattr(found, name) and not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?", getattr(found, name)):
            raise UserError(f"kubernetes.{name} {getattr(found, name)!r}: small letters, digits and - only, 42 at most")
    if found.memory and not re.fullmatch(r"\d+(Ki|Mi|Gi|Ti|k|M|G|T)?", found.memory):
        raise UserError(f"kubernetes.memory {found.memory!r} is no size such as 64Gi")
    if found.gpus_per_node < -1 or found.cpus == 0 or found.cpus < -1:
        raise UserError("kubernetes.gpus_per_node and kubernetes.cpus must not be negative, and cpus not 0")
    if re.search(r"\s", found.image + found.queue):
        raise UserError("kubernetes.image and kubernetes.queue hold no spaces")
    return found


# ---------------------------------------------------------------------------------------------------------- rendering


def render(
    cfg: Experiment,
    stage: str,
    options: Sequence[str],
    nodes: int,
    asked: Settings,
    *,
    after: str = "",
    overwrite: bool = False,
) -> list[Manifest]:
    """The manifests of the stage ("value", "policy" or "all").

    Args:
        options: `--config NAME --dotted.field value ...`, for every container.
        after: name of the Job that the policy waits for where the value stage is not part of it.
    """
    found = [doc for doc in _source(nodes, asked) if stage == "all" or _belongs(doc, stage)]
    if stage != "value" and not needs_value(cfg):  # imitation waits for nothing
        found = [doc for doc in found if _component(doc) != "gate"]
    changed = []
    for doc in found:
        doc = copy.deepcopy(doc)
        if doc["kind"] == "Job":
            _job(doc, cfg, stage, options, nodes, asked, after, overwrite)
        changed.append(doc)
    changed = [_renamed(doc, asked.name) for doc in changed] if asked.name else changed
    return changed


def _source(nodes: int, asked: Settings) -> list[Manifest]:
    if not K8S.is_dir():
        raise UserError(f"--cluster kubernetes reads the manifests of a checkout: there is no {K8S}")
    for name in FILES:
        file, copied = K8S / name, K8S / "base" / name
        if file.read_bytes() != copied.read_bytes():
            raise UserError(f"{file} and its copy {copied}, which overlays start from, differ: make them the same")
    overlay = Path(asked.overlay) if asked.overlay else MULTI_NODE if nodes > 1 else None
    if overlay is None:
        return [doc for name in FILES for doc in yaml.safe_load_all((K8S / name).read_text())]
    if not overlay.is_absolute() and not overlay.exists():
        overlay = K8S.parent / overlay  # from wherever the launcher is called
    if not (overlay / "kustomization.yaml").is_file():
        raise UserError(f"kubernetes.overlay {overlay}: no kustomization.yaml in it")
    found = [doc for doc in yaml.safe_load_all(cluster.kubectl("kustomize", str(overlay))) if doc]
    if not any(doc["kind"] == "Job" for doc in found):
        raise UserError(f"kubernetes.overlay {overlay}: it has no Job; apply it with `kubectl apply -k {overlay}`")
    return found


def _component(doc: Manifest) -> str:
    return doc["metadata"].get("labels", {}).get(cluster.COMPONENT, "")


def _belongs(doc: Manifest, stage: str) -> bool:
    """Is it of the stage, or of both (storage, accounts)?"""
    return _component(doc) not in (("policy", "gate") if stage == "value" else ("value",))


def _job(
    doc: Manifest,
    cfg: Experiment,
    stage: str,
    options: Sequence[str],
    nodes: int,
    asked: Settings,
    after: str,
    overwrite: bool,
) -> None:
    spec, kind = doc["spec"], _component(doc)
    pod = spec["template"]["spec"]
    for container in [*pod.get("initContainers", ()), *pod["containers"]]:
        args: list[str] = container["args"]
        own = args[: args.index("--config")] if "--config" in args else args
        step = own[0] in ("train-value", "train-policy")
        container["args"] = [*own, *options, *(["--overwrite"] if overwrite and step else [])]
        container["image"] = asked.image or container["image"]
    for volume in pod["volumes"]:
        if asked.claim and volume["name"] == "storage" and "persistentVolumeClaim" in volume:
            volume["persistentVolumeClaim"]["claimName"] = asked.claim
    if kind == "gate":
        _gate(pod["containers"][0]["args"], nodes, stage, after)
        return
    if "completionMode" in spec:
        # failures are counted pod by pod, and what strikes one node may strike all
        spec["backoffLimit"] = spec["backoffLimit"] * nodes // spec["completions"]
        spec["completions"] = nodes
    elif nodes > 1:
        raise UserError(f"kubernetes.overlay {asked.overlay}: its Jobs are not Indexed, --nodes {nodes} needs that")
    if spec["parallelism"] or not needs_value(cfg):
        spec["parallelism"] = nodes
    _trainer(pod["containers"][0], nodes, asked)
    if asked.queue:
        doc["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = asked.queue
    if asked.priority:
        pod["priorityClassName"] = asked.priority
    for container in [*pod.get("initContainers", ()), *pod["containers"]]:
        for variable in container["env"]:
            if variable["name"] == "HVD_NUM_PROCESSES":
                variable["value"] = str(nodes)


def _gate(args: list[str], nodes: int, stage: str, after: str) -> None:
    args[args.index("--pods") + 1] = str(nodes)
    if stage == "policy":  # without a value Job beside it the run on the storage is all there is to look at
        place = args.index("--value-job")
        args[place + 1] = after


def _trainer(container: Manifest, nodes: int, asked: Settings) -> None:
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    if asked.cpus > 0:
        requests["cpu"] = str(asked.cpus)
    if asked.memory:
        requests["memory"] = limits["memory"] = asked.memory
    if asked.gpus_per_node > 0:
        limits[GPU] = asked.gpus_per_node
    elif asked.gpus_per_node == 0:
        limits.pop(GPU, None)
    if asked.gpus_per_node >= 0:
        for variable in container["env"]:
            if variable["name"] == "HVD_EXPECT_GPUS":
                variable["value"] = "1" if asked.gpus_per_node else "0"
    if asked.gpu:
        for row in gpu_environment.settings(asked.gpu, limits.get(GPU, 0) * nodes):
            container["env"].append({"name": row.name, "value": row.value})


def _renamed(doc: Manifest, name: str) -> Manifest:
    """With `name` in place of the names' first part; not those of the storage, the Secret and the trainer's account."""
    ours = ("value", "awr", "awr-gate")
    text = json.dumps(doc)
    for last in ours:
        text = re.sub(rf'(?<=")({_PREFIX})-{last}(?=[".]|-0\.)', f"{name}-{last}", text)
        text = re.sub(rf"(?<=\.){_PREFIX}-{last}(?=[:.\"])", f"{name}-{last}", text)  # a host name's second part
    return json.loads(text)


def gpus(manifests: Sequence[Manifest]) -> int:
    """GPUs of a training pod."""
    for doc in manifests:
        if doc["kind"] == "Job" and _component(doc) in ("value", "policy"):
            return int(doc["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"].get(GPU, 0))
    return 0


def to_yaml(manifests: Sequence[Manifest]) -> str:
    return yaml.safe_dump_all(manifests, sort_keys=False, width=120)


# ----------------------------------------------------------------------------------------------------------- applying


def submit(manifests: Sequence[Manifest]) -> list[tuple[str, str]]:
    """Apply the manifests, after the cluster has looked at them; (stage, name) of the stages' Jobs in their order.

    A Job that lives is left as it is: to apply a released policy Job would pause it. One that has ended makes room for
    its successor, which goes on where the run stopped.

    Raises:
        UserError: the cluster refuses them; nothing has been changed then.
        Failed: it does not answer.
    """
    living, gone = _present(manifests)
    kept = [("Job", name) for name in living] + [("PersistentVolumeClaim", name) for name in _claims(manifests)]
    wanted = [doc for doc in manifests if (doc["kind"], doc["metadata"]["name"]) not in kept]
    fresh = [doc for doc in wanted if not (doc["kind"] == "Job" and doc["metadata"]["name"] in gone)]
    _apply(fresh, ["--dry-run=server"])
    for name in living:
        print(f"Job {name} is at work already; it is left as it is", flush=True)
    if gone:
        cluster.kubectl("delete", "jobs", *gone, "--ignore-not-found")
    for line in _apply(wanted, []).splitlines():
        print(line, flush=True)
    stages = {_component(doc): doc["metadata"]["name"] for doc in manifests if doc["kind"] == "Job"}
    return [(stage, stages[stage]) for stage in ("value", "policy") if stage in stages]  # kustomize sorts by name


def _present(manifests: Sequence[Manifest]) -> tuple[list[str], list[str]]:
    """Of the manifests' Jobs the cluster has: (names of those that live, of those that have ended)."""
    names = [doc["metadata"]["name"] for doc in manifests if doc["kind"] == "Job"]
    answer = json.loads(cluster.kubectl("get", "jobs", "-o", "json"))["items"]
    found = {job["metadata"]["name"]: cluster.KubernetesJob(job, ()) for job in answer}
    mine = [found[name] for name in names if name in found]
    gates = {job.option("--policy-job"): job for job in mine if job.stage == "gate"}

    def over(job: cluster.KubernetesJob) -> bool:
        if job.stage == "gate":  # one whose policy Job has ended is about to end, and releases no successor
            held = found.get(job.option("--policy-job"))
            return job.ended or held is None or held.ended
        # a policy Job whose gate has given up waits for nobody
        return job.ended or (job.state == "PAUSED" and job.name in gates and gates[job.name].ended)

    ended = [job.name for job in mine if over(job)]
    return [job.name for job in mine if job.name not in ended], ended


def _claims(manifests: Sequence[Manifest]) -> list[str]:
    """Names of the volume claims that are there already: they are what they are, and hold the users' data."""
    if not any(doc["kind"] == "PersistentVolumeClaim" for doc in manifests):
        return []
    answer = json.loads(cluster.kubectl("get", "persistentvolumeclaims", "-o", "json"))["items"]
    return [claim["metadata"]["name"] for claim in answer]


def _apply(manifests: Sequence[Manifest], flags: Sequence[str]) -> str:
    if not manifests:
        return ""
    try:
        done = subprocess.run(
            ["kubectl", "apply", "-f", "-", *flags],
            input=to_yaml(manifests),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed("the cluster did not answer within 120 s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("Warning")]
        text = lines[0] if lines else f"kubectl ended with {done.returncode}"
        kind = (
            Failed if re.search(r"connection refused|no such host|timeout|unable to connect", text, re.I) else UserError
        )
        raise kind(f"the cluster refuses the manifests: {text}")
    return done.stdout
