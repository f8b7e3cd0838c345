"""The manifests of k8s/ with what the user asked for put in. The files are the one source.

Without options that is what `kubectl apply -f k8s/value-job.yaml -f k8s/awr-job.yaml` applies. Another experiment
than the files' own has names of its own, so that two of them never meet in a namespace.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from hvd import gpu_environment
from hvd.clusters.base import Request
from hvd.clusters.kubernetes import evaluation, kubectl, site
from hvd.clusters.kubernetes.names import ENDINGS, Manifest, component, own_name, renamed
from hvd.clusters.kubernetes.queue import OWN, own_container
from hvd.clusters.kubernetes.site import Settings
from hvd.errors import UserError
from hvd.method.value_run import own_needed

K8S = Path(__file__).resolve().parents[3] / "k8s"
FILES = ("value-job.yaml", "awr-job.yaml")
MULTI_NODE = K8S / "overlays" / "multi-node"
GPU = "nvidia.com/gpu"
VOLUME = "hvd/volume"
_GPUS = re.compile(r"nvidia\.com/(gpu|mig-.*)|amd\.com/gpu|gpu\.intel\.com/.*")  # what GPUs are called
# Components that a stage leaves out
_OTHERS = {
    "all": (),
    "value": ("policy", "gate", "evaluate"),
    "policy": ("value", "evaluate"),
    "evaluate": ("value", "policy", "gate"),
}


def render(request: Request, asked: Settings) -> list[Manifest]:
    """The manifests of the stage. Its `options` go to every container."""
    docs = _source(request.nodes, asked)
    name = asked.name or own_name(request.cfg, docs)
    docs = renamed(docs, name) if name else docs
    left_out = set(_OTHERS[request.stage])
    # imitation and a value run that is given: no wait
    if request.stage == "policy" and not (request.after or own_needed(request.cfg)):
        left_out |= {"gate"}
    if request.stage == "all" and request.cfg.policy.value_run:
        left_out |= {"value"}
        _prepare_first(docs)
    if asked.gate_account:  # somebody else has made it, with its rights
        docs = [doc for doc in docs if doc["kind"] == "Job" or component(doc) != "gate"]
    policies = [doc for doc in docs if doc["kind"] == "Job" and component(doc) == "policy"]
    last = [] if "evaluate" in left_out else [evaluation.job(doc) for doc in policies]
    docs = [doc for doc in docs if component(doc) not in left_out]
    for doc in docs:
        if doc["kind"] == "Job" and component(doc) in ENDINGS:
            _fill_in(doc, request, asked)
        elif doc["kind"] == "Role" and request.after:  # the gate reads that Job instead of the files' one
            doc["rules"][0]["resourceNames"] = [request.after]
    for doc in last:
        _fill_in(doc, dataclasses.replace(request, nodes=1), _for_evaluation(doc, request, asked))
        evaluation.fill_in(doc, request)
        evaluation.behind_the_gate(docs, doc["metadata"]["name"])
    docs += last
    for doc in docs if asked.namespace else ():
        doc["metadata"]["namespace"] = asked.namespace
        for subject in doc.get("subjects", ()):
            subject |= {"namespace": asked.namespace} if "namespace" in subject else {}
    return docs


def _for_evaluation(doc: Manifest, request: Request, asked: Settings) -> Settings:
    """A step that trains takes a node's GPUs, any other one GPU."""
    number = asked.gpus_per_node if asked.gpus_per_node >= 0 else gpus([doc], asked.gpu_resource)
    trains = any(step.spread for step in evaluation.steps(request))
    return asked if trains or number <= 1 else dataclasses.replace(asked, gpus_per_node=1)


def _prepare_first(docs: Sequence[Manifest]) -> None:
    """What the value Job does before it trains, for a policy Job without one."""
    jobs = {component(doc): doc["spec"]["template"]["spec"] for doc in docs if doc["kind"] == "Job"}
    if "value" in jobs and "policy" in jobs:
        prepare = [one for one in jobs["value"].get("initContainers", ()) if one["name"] == "prepare"]
        jobs["policy"]["initContainers"] = [*jobs["policy"].get("initContainers", ()), *prepare]


def gpus(manifests: Sequence[Manifest], called: str = "") -> int:
    """GPUs of a training pod. `called`: their name, where it is none of those that are known."""
    for doc in manifests:
        if doc["kind"] == "Job" and component(doc) in ("value", "policy", "evaluate"):
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
        # without a value Job beside it the run on the storage is all there is to look at
        if request.stage == "policy" or not own_needed(request.cfg):
            args[args.index("--value-job") + 1] = request.after
        return
    if "completionMode" in spec:
        # failures are counted pod by pod, and what strikes one node may strike all
        spec["backoffLimit"] = spec["backoffLimit"] * nodes // spec["completions"]
        spec["completions"] = nodes
    elif nodes > 1:
        raise UserError(f"kubernetes.overlay {asked.overlay}: its Jobs are not Indexed, --nodes {nodes} needs that")
    if spec["parallelism"] or not (request.after or own_needed(request.cfg)):
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
