"""The manifests of k8s/ with what the user asked for put in. The files are the one source.

Without options that is what `kubectl apply -f k8s/value-job.yaml -f k8s/awr-job.yaml` applies. Another experiment
than the files' own has names of its own, so that two of them never meet in a namespace.
"""

import getpass
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from hvd import gpu_environment
from hvd.clusters.base import Request
from hvd.clusters.kubernetes import kubectl, site
from hvd.clusters.kubernetes.queue import COMPONENT, OWN, own_container, value_of
from hvd.clusters.kubernetes.site import Settings
from hvd.configs import Experiment
from hvd.errors import UserError
from hvd.method.value_run import own_needed

K8S = Path(__file__).resolve().parents[3] / "k8s"
FILES = ("value-job.yaml", "awr-job.yaml")
MULTI_NODE = K8S / "overlays" / "multi-node"
GPU = "nvidia.com/gpu"
VOLUME = "hvd/volume"
_GPUS = re.compile(r"nvidia\.com/(gpu|mig-.*)|amd\.com/gpu|gpu\.intel\.com/.*")  # what GPUs are called
# What belongs to one experiment, by component, and how the names of its objects end
ENDINGS = {"value": "value", "policy": "awr", "gate": "awr-gate"}
_OTHERS = {"all": (), "value": ("policy", "gate"), "policy": ("value",)}  # components that a stage leaves out

_LONGEST = 38  # characters behind "hvd-"; a Job's name has 63, and its pods' names add to it

Manifest = dict[str, Any]


def render(request: Request, asked: Settings) -> list[Manifest]:
    """The manifests of the stage. Its `options` go to every container."""
    docs = _source(request.nodes, asked)
    name = asked.name or own_name(request.cfg, docs)
    docs = _renamed(docs, name) if name else docs
    left_out = set(_OTHERS[request.stage])
    if request.stage != "value" and not own_needed(request.cfg):  # imitation, and a value run that is given: no wait
        left_out |= {"gate", "value"} if request.cfg.policy.value_run else {"gate"}
    if asked.gate_account:  # somebody else has made it, with its rights
        docs = [doc for doc in docs if doc["kind"] == "Job" or component(doc) != "gate"]
    docs = [doc for doc in docs if component(doc) not in left_out]
    for doc in docs:
        if asked.namespace:
            doc["metadata"]["namespace"] = asked.namespace
            for subject in doc.get("subjects", ()):
                subject |= {"namespace": asked.namespace} if "namespace" in subject else {}
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


def gpus(manifests: Sequence[Manifest], called: str = "") -> int:
    """GPUs of a training pod. `called`: their name, where it is none of those that are known."""
    for doc in manifests:
        if doc["kind"] == "Job" and component(doc) in ("value", "policy"):
            return next((int(number) for _, number in _gpu_limits(own_container(doc), called)), 0)
    return 0


def _gpu_limits(container: Manifest, called: str) -> list[tuple[str, Any]]:
    _, limits = _resources(container)
    return [(name, number) for name, number in limits.items() if name == called or _GPUS.fullmatch(name)]


def _resources(container: Manifest) -> tuple[Manifest, Manifest]:
    """(requests, limits); an overlay may have taken them out."""
    found = container.setdefault("resources", {})
    return found.setdefault("requests", {}), found.setdefault("limits", {})


def namespace(manifests: Sequence[Manifest]) -> str:
    """That of the manifests; "" where they leave it to kubectl."""
    return next((doc["metadata"]["namespace"] for doc in manifests if doc["metadata"].get("namespace")), "")


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
    docs = [doc for doc in yaml.safe_load_all(kubectl.CURRENT.ask("kustomize", str(overlay))) if doc]
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
        args: list[str] = container.get("args", [])
        if not args:
            raise UserError(
                f"{doc['metadata']['name']}: its container {container['name']} has no args; they name the step"
            )
        step = args[: args.index("--config")] if "--config" in args else args
        again = ["--overwrite"] if request.overwrite and step[0] in ("train-value", "train-policy") else []
        container["args"] = [*step, *request.options, *again]
        container["image"] = asked.image or container["image"]
        if "@" in asked.image:  # by digest: every step logs it, and nodes compare theirs
            container.setdefault("env", []).append({"name": "HVD_IMAGE", "value": asked.image})
    for volume in pod.get("volumes", ()):
        if asked.claim and volume["name"] == "storage" and "persistentVolumeClaim" in volume:
            volume["persistentVolumeClaim"]["claimName"] = asked.claim
            _together(spec["template"], asked.claim)
    place(doc, asked)
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
    for container in _containers(doc):
        _set(container, "HVD_NUM_PROCESSES", str(nodes))
    _size(own_container(doc), nodes, asked)


def _together(template: Any, claim: str) -> None:
    """Another volume's name for what keeps its pods on one node (overlays/smoke): a label, and affinities to it."""
    if isinstance(template, dict):
        if VOLUME in template:
            template[VOLUME] = claim
        for value in template.values():
            _together(value, claim)
    elif isinstance(template, list):
        for value in template:
            _together(value, claim)


def place(doc: Manifest, asked: Settings) -> None:
    """What the site wants of a Job's pod: who it is, where it runs, and what its containers know."""
    pod, gate = doc["spec"]["template"]["spec"], component(doc) == "gate"
    if asked.image_pull_secret:
        pod["imagePullSecrets"] = [{"name": asked.image_pull_secret}]
    if account := asked.gate_account if gate else asked.service_account:
        pod["serviceAccountName"] = account
    if asked.node_selector:
        pod["nodeSelector"] = pod.get("nodeSelector", {}) | dict(text.split("=", 1) for text in asked.node_selector)
    if asked.tolerations:
        pod["tolerations"] = [*pod.get("tolerations", ()), *site.tolerations(asked)]
    if asked.affinity:
        pod["affinity"] = _merged(pod.get("affinity", {}), site.affinity(asked))
    if asked.priority:
        pod["priorityClassName"] = asked.priority
    rights = pod.setdefault("securityContext", {})
    numbers = {"runAsUser": asked.user, "runAsGroup": asked.group, "fsGroup": asked.group}
    for name, number in numbers.items():
        if number == 0 or (number < 0 and asked.user == 0):  # the cluster chooses all three
            rights.pop(name, None)
        elif number > 0:
            rights[name] = number
    for container in _containers(doc):
        names = {variable["name"] for variable in site.environment(asked)}
        if names:
            kept = [variable for variable in container.get("env", ()) if variable["name"] not in names]
            container["env"] = [*kept, *site.environment(asked)]
        if asked.cpu_limit > 0:
            requests, limits = _resources(container)
            limits["cpu"] = str(asked.cpu_limit)
            if _cpus(requests.get("cpu", 0)) > asked.cpu_limit:
                requests["cpu"] = str(asked.cpu_limit)


def _merged(one: Any, other: Any) -> Any:
    """Both: mappings key by key, lists one behind the other."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: _merged(one.get(key), other.get(key)) for key in {**one, **other}}
    if isinstance(one, list) and isinstance(other, list):
        return [*one, *other]
    return one if other is None else other


def _cpus(text: str | int) -> float:
    return float(str(text).removesuffix("m")) / (1000 if str(text).endswith("m") else 1)


def _size(container: Manifest, nodes: int, asked: Settings) -> None:
    """CPUs, memory and GPUs of a trainer."""
    requests, limits = _resources(container)
    if asked.cpus > 0:
        requests["cpu"] = str(asked.cpus)
    if asked.memory:
        requests["memory"] = limits["memory"] = asked.memory
    there = _gpu_limits(container, asked.gpu_resource)
    name = asked.gpu_resource or (there[0][0] if there else GPU)
    number = asked.gpus_per_node if asked.gpus_per_node >= 0 else there[0][1] if there else 0
    for old, _ in there:
        del limits[old]
    if number:
        limits[name] = number
    if asked.gpus_per_node >= 0:
        _set(container, "HVD_EXPECT_GPUS", "1" if number else "0")
    if asked.gpu:
        for row in gpu_environment.settings(asked.gpu, int(number) * nodes):
            container.setdefault("env", []).append({"name": row.name, "value": row.value})


def _set(container: Manifest, name: str, value: str) -> None:
    """Another value for a variable that the container has."""
    for variable in container.get("env", ()):
        if variable["name"] == name:
            variable["value"] = value
