"""What the user and the site want of Kubernetes: the table [kubernetes] of site.toml, then --kubernetes.NAME flags."""

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from hvd import overrides
from hvd.errors import UserError
from hvd.fields import Rule, check_rules, from_plain, leaves, option, to_plain
from hvd.site import files

_SOURCES = ("secretKeyRef", "configMapKeyRef", "fieldRef", "resourceFieldRef")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_AFFINITIES = ("nodeAffinity", "podAffinity", "podAntiAffinity")


def _text(pattern: str, words: str) -> Rule:
    return Rule(lambda text: not text or bool(re.fullmatch(pattern, text)), words)


def _texts(pattern: str, words: str) -> Rule:
    return Rule(lambda texts: all(re.fullmatch(pattern, text, re.DOTALL) for text in texts), words)


_NAME = _text(r"[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?", "must be small letters, digits and - only, 42 at most")
_OBJECT = _text(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", "must be small letters, digits, - and . only")
_SIZE = _text(r"\d+(Ki|Mi|Gi|Ti|k|M|G|T)?", "is not a size such as 64Gi")
_WORD = _text(r"\S+", "must not hold spaces")
_NUMBER = Rule(lambda x: x >= -1, "must not be negative")
_COUNT = Rule(lambda x: x == -1 or x >= 1, "must be at least 1")


@dataclass(frozen=True)
class Settings:
    """--kubernetes.NAME; an empty text or list, or -1, leaves what the manifests or the cluster say."""

    context: str = option("", _WORD, "of kubectl; none: its current one")
    namespace: str = option("", _OBJECT, "none: the overlay's, else that of the context")
    overlay: str = option("", "a kustomize folder to start from, such as k8s/overlays/smoke; none: k8s/*.yaml")
    image: str = option("", _WORD, "of all containers of hvd")
    image_pull_secret: str = option("", _OBJECT, "for a private registry; the gate's pod has it too")
    name: str = option("", _NAME, "what the Jobs' names begin with; none: hvd, you and the experiment")
    claim: str = option("", _OBJECT, "name of the volume claim that all stages share")
    gpus_per_node: int = option(-1, _NUMBER, "0: a job on CPUs")
    gpu_resource: str = option(
        "", _text(r"[\w.-]+/[\w.-]+", "is not a name such as amd.com/gpu"), "what GPUs are called"
    )
    gpu: str = option("", "its kind, such as h100-80gb: settings of XLA and NCCL, and the memory plan")
    cpus: int = option(-1, _COUNT, "of a training pod, such as 16")
    cpu_limit: int = option(-1, _COUNT, "limits.cpu of the containers, where a quota wants it")
    memory: str = option("", _SIZE, "of a training pod, such as 128Gi")
    env: tuple[str, ...] = option((), _texts(r"[A-Za-z_][\w.-]*=.*", "must be NAME=VALUE"), "variables: NAME=VALUE ...")
    node_selector: tuple[str, ...] = option((), _texts(r"[^\s=]+=\S*", "must be LABEL=VALUE"), "LABEL=VALUE ...")
    tolerations: tuple[str, ...] = option(
        (), _texts(rf"[^\s=:]+(=[^\s:]*)?(:({'|'.join(_EFFECTS)}))?", "must be KEY[=VALUE][:EFFECT]"), "of taints"
    )
    affinity: str = option("", "a pod's affinity, as JSON or YAML")
    service_account: str = option("", _OBJECT, "of the training pods")
    gate_account: str = option("", _OBJECT, "of the gate, where you may not create Roles")
    user: int = option(-1, _NUMBER, "that pods run as; 0: the cluster chooses (OpenShift)")
    group: int = option(-1, _NUMBER, "of the pods and of the volume's files")
    queue: str = option("", _WORD, "of Kueue")
    priority: str = option("", _OBJECT, "name of a PriorityClass")


_LISTS = {f"kubernetes.{leaf.name}" for leaf in leaves(Settings).values() if leaf.kind == tuple[str, ...]}


@dataclass(frozen=True)
class _Flags:
    kubernetes: Settings


def load(flags: Sequence[overrides.Flag] = ()) -> Settings:
    """The files' settings with the user's flags; UserError for one that makes no sense."""
    found = Settings()
    for path, data in files.all_files():
        if "kubernetes" in data:
            where = f"{path}: kubernetes"
            given = data["kubernetes"]
            found = from_plain(Settings, to_plain(found) | given if isinstance(given, dict) else given, where)
    asked = overrides.apply(_Flags(found), _together(flags))
    check_rules(asked)
    affinity(asked.kubernetes)
    return asked.kubernetes


def _together(flags: Sequence[overrides.Flag]) -> list[overrides.Flag]:
    """Of a list that is given in several flags all values count: --kubernetes.env A=1 --kubernetes.env B=2."""
    found: dict[str, overrides.Flag] = {}
    for flag in flags:
        before = found.get(flag.field)
        if before is not None and flag.field in _LISTS:
            flag = dataclasses.replace(flag, values=(*before.values, *flag.values))
        found[flag.field] = flag
    return list(found.values())


def environment(asked: Settings) -> list[dict[str, Any]]:
    """Variables of a container. A value such as {"secretKeyRef": {"name": "hf", "key": "token"}} is a valueFrom."""
    return [_variable(*text.split("=", 1)) for text in asked.env]


def _variable(name: str, value: str) -> dict[str, Any]:
    if value.startswith("{"):
        try:
            source = json.loads(value)
        except ValueError:
            source = {}
        if len(source) == 1 and next(iter(source)) in _SOURCES:
            return {"name": name, "valueFrom": source}
    return {"name": name, "value": value}


def tolerations(asked: Settings) -> list[dict[str, str]]:
    """Of `key=value:NoSchedule`, as `kubectl taint` writes it; without a value any one is tolerated."""
    made = []
    for text in asked.tolerations:
        rest, _, effect = text.partition(":")
        key, equals, value = rest.partition("=")
        one = {"key": key, "operator": "Equal" if equals else "Exists"}
        made.append(one | ({"value": value} if equals else {}) | ({"effect": effect} if effect else {}))
    return made


def affinity(asked: Settings) -> dict[str, Any]:
    """Of a pod; {} for none."""
    try:
        found = yaml.safe_load(asked.affinity or "{}")
    except yaml.YAMLError:
        found = None
    if (
        not isinstance(found, dict)
        or not {*found} <= {*_AFFINITIES}
        or not all(isinstance(v, dict) for v in found.values())
    ):
        raise UserError(f"kubernetes.affinity {asked.affinity!r} is no JSON object of {', '.join(_AFFINITIES)}")
    return found
