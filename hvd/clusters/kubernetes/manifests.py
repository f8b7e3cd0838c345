"""The manifests of k8s/ with what the user asked for put in. The files are the one source.

Without options that is what `kubectl apply -f k8s/value-job.yaml -f k8s/awr-job.yaml` applies. Another experiment
than the files' own has names of its own, so that two of them never meet in a namespace.
"""

import getpass
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hvd import gpu_environment, overrides
from hvd.clusters.base import Request
from hvd.clusters.kubernetes import kubectl
from hvd.clusters.kubernetes.queue import COMPONENT, OWN, own_container, value_of
from hvd.configs import Experiment
from hvd.errors import UserError
from hvd.fields import Rule, check_rules, option
from hvd.method.value_run import own_needed

K8S = Path(__file__).resolve().parents[3] / "k8s"
FILES = ("value-job.yaml", "awr-job.yaml")
MULTI_NODE = K8S / "overlays" / "multi-node"
GPU = "nvidia.com/gpu"
# What belongs to one experiment, by component, and how the names of its objects end
ENDINGS = {"value": "value", "policy": "awr", "gate": "awr-gate"}
_OTHERS = {"all": (), "value": ("policy", "gate"), "policy": ("value",)}  # components that a stage leaves out

_LONGEST = 38  # characters behind "hvd-"; a Job's name has 63, and its pods' names add to it

Manifest = dict[str, Any]


def _text(pattern: str, words: str) -> Rule:
    return Rule(lambda text: not text or bool(re.fullmatch(pattern, text)), words)


_NAME = _text(r"[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?", "must be small letters, digits and - only, 42 at most")
_SIZE = _text(r"\d+(Ki|Mi|Gi|Ti|k|M|G|T)?", "is not a size such as 64Gi")
_WORD = _text(r"\S+", "must not hold spaces")


@dataclass(frozen=True)
class Settings:
    """--kubernetes.NAME; an empty text or -1 leaves what the manifests say."""

    overlay: str = option("", "a kustomize folder to start from, such as k8s/overlays/smoke; none: k8s/*.yaml")
    image: str = option("", _WORD, "of the trainer")
    name: str = option("", _NAME, "what the Jobs' names begin with; none: hvd, you and the experiment")
    claim: str = option("", _NAME, "name of the volume claim that all stages share")
    gpus_per_node: int = option(-1, Rule(lambda x: x >= -1, "must not be negative"), "0: a job on CPUs")
    gpu: str = option("", "its kind, such as h100-80gb: settings of XLA and NCCL, and the memory plan")
    cpus: int = option(-1, Rule(lambda x: x == -1 or x >= 1, "must be at least 1"), "of a training pod, such as 16")
    memory: str = option("", _SIZE, "of a training pod, such as 128Gi")
    queue: str = option("", _WORD, "of Kueue")
    priority: str = option("", _NAME, "name of a PriorityClass")


@dataclass(frozen=True)
class _Flags:
    kubernetes: Settings


def settings(flags: Sequence[overrides.Flag]) -> Settings:
    """Of the user's --kubernetes.NAME flags; UserError for one that makes no sense."""
    asked = overrides.apply(_Flags(Settings()), flags)
    check_rules(asked)
    return asked.kubernetes


def render(request: Request, asked: Settings) -> list[Manifest]:
    """The manifests of the stage. Its `options` go to every container."""
    docs = _source(request.nodes, asked)
    name = asked.name or own_name(request.cfg, docs)
    docs = _renamed(docs, name) if name else docs
    left_out = set(_OTHERS[request.stage])
    if request.stage != "value" and not own_needed(request.cfg):  # imitation, and a value run that is given: no wait
        left_out |= {"gate", "value"} if request.cfg.policy.value_run else {"gate"}
    docs = [doc for doc in docs if component(doc) not in left_out]
    for doc in docs:
        if doc["kind"] == "Job" and component(doc) in ENDINGS:
            _fill_in(doc, request, asked)
        elif doc["kind"] == "Role" and request.after:  # the gate reads that Job instead of the files' one
            doc["rules"][0]["resourceNames"] = [request.after]
    return docs


def own_name(cfg: Experiment, docs: Sequence[Manifest]) -> str:
    """What the names of the experiment's objects begin with: hvd, the user (if not root) and the experiment.

    "" for the experiment that the files themselves are about (demo): their names stay. A digest tells apart what would
    be the same name in Kubernetes' letters, such as tau0.7 and tau0_7.
    """
    run = cfg.exp_name or cfg.name
    jobs = [doc for doc in docs if doc["kind"] == "Job" and component(doc) in ENDINGS]
    files = {value_of(own_container(doc).get("args", ()), "exp_name", "config") for doc in jobs}
    if run in files:
        return ""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container without /etc/passwd
        user = ""
    text = f"{user}-{run}" if user not in ("", "root") else run
    short = re.sub("[^a-z0-9]+", "-", text.lower()).strip("-")
    if short != text or len(short) > _LONGEST:
        digest = hashlib.sha256(text.encode()).hexdigest()[:6]
        short = f"{short[: _LONGEST - 7].strip('-')}-{digest}".strip("-")
    return f"hvd-{short}"


def component(doc: Manifest) -> str:
    """value, policy, gate, or what belongs to no stage (storage, accounts)."""
    return doc["metadata"].get("labels", {}).get(COMPONENT, "")


def gpus(manifests: Sequence[Manifest]) -> int:
    """GPUs of a training pod."""
    for doc in manifests:
        if doc["kind"] == "Job" and component(doc) in ("value", "policy"):
            return int(own_container(doc)["resources"]["limits"].get(GPU, 0))
    return 0


def to_yaml(manifests: Sequence[Manifest]) -> str:
    return yaml.safe_dump_all(manifests, sort_keys=False, width=120)


def _source(nodes: int, asked: Settings) -> list[Manifest]:
    """The objects of the files, or of an overlay as kustomize renders it."""
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
    docs = [doc for doc in yaml.safe_load_all(kubectl.ask("kustomize", str(overlay))) if doc]
    if not any(doc["kind"] == "Job" for doc in docs):
        raise UserError(f"kubernetes.overlay {overlay}: it has no Job; apply it with `kubectl apply -k {overlay}`")
    return docs


def _renamed(docs: Sequence[Manifest], name: str) -> list[Manifest]:
    """With `name` as the first part of the experiment's names, and wherever one of them is named.

    Storage, Secret and the trainer's account keep theirs. kustomize's namePrefix would rename all objects, and neither
    the gate's arguments nor the coordinator's address.
    """
    names = {doc["metadata"]["name"]: f"{name}-{ENDINGS[component(doc)]}" for doc in docs if component(doc) in ENDINGS}
    names |= {f"{old}-0.{old}": f"{new}-0.{new}" for old, new in names.items()}  # process 0, by its Service

    def put(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: put(part) for key, part in value.items()}
        if isinstance(value, list):
            return [put(part) for part in value]
        if not isinstance(value, str):
            return value
        host, colon, port = value.partition(":")
        return names.get(host, host) + colon + port

    return [put(doc) for doc in docs]


def _containers(doc: Manifest) -> Iterator[Manifest]:
    """Those of hvd; an overlay's others are left as they are."""
    pod = doc["spec"]["template"]["spec"]
    yield from (one for one in [*pod.get("initContainers", ()), *pod["containers"]] if one["name"] in OWN)


def _fill_in(doc: Manifest, request: Request, asked: Settings) -> None:
    """Put into a Job what the user asked for."""
    spec, pod, nodes = doc["spec"], doc["spec"]["template"]["spec"], request.nodes
    for container in _containers(doc):
        args: list[str] = container["args"]
        step = args[: args.index("--config")] if "--config" in args else args
        again = ["--overwrite"] if request.overwrite and step[0] in ("train-value", "train-policy") else []
        container["args"] = [*step, *request.options, *again]
        container["image"] = asked.image or container["image"]
    for volume in pod["volumes"]:
        if asked.claim and volume["name"] == "storage" and "persistentVolumeClaim" in volume:
            volume["persistentVolumeClaim"]["claimName"] = asked.claim
    if component(doc) == "gate":
        args = own_container(doc)["args"]
        args[args.index("--pods") + 1] = str(nodes)
        if request.stage == "policy":  # without a value Job beside it the run on the storage is all there is to look at
            args[args.index("--value-job") + 1] = request.after
        return
    if "completionMode" in spec:
        # failures are counted pod by pod, and what strikes one node may strike all
        spec["backoffLimit"] = spec["backoffLimit"] * nodes // spec["completions"]
        spec["completions"] = nodes
    elif nodes > 1:
        raise UserError(f"kubernetes.overlay {asked.overlay}: its Jobs are not Indexed, --nodes {nodes} needs that")
    if spec["parallelism"] or not own_needed(request.cfg):
        spec["parallelism"] = nodes
    if asked.queue:
        doc["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = asked.queue
    if asked.priority:
        pod["priorityClassName"] = asked.priority
    for container in _containers(doc):
        _set(container, "HVD_NUM_PROCESSES", str(nodes))
    _size(own_container(doc), nodes, asked)


def _size(container: Manifest, nodes: int, asked: Settings) -> None:
    """CPUs, memory and GPUs of a trainer."""
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    if asked.cpus > 0:
        requests["cpu"] = str(asked.cpus)
    if asked.memory:
        requests["memory"] = limits["memory"] = asked.memory
    if asked.gpus_per_node >= 0:
        _set(container, "HVD_EXPECT_GPUS", "1" if asked.gpus_per_node else "0")
        limits[GPU] = asked.gpus_per_node
        if not asked.gpus_per_node:
            del limits[GPU]
    if asked.gpu:
        for row in gpu_environment.settings(asked.gpu, limits.get(GPU, 0) * nodes):
            container["env"].append({"name": row.name, "value": row.value})


def _set(container: Manifest, name: str, value: str) -> None:
    """Another value for a variable that the container has."""
    for variable in container.get("env", ()):
        if variable["name"] == name:
            variable["value"] = value
