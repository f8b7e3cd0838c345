"""What the objects of an experiment are called, and which part of it each one belongs to."""

import getpass
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hvd.clusters.kubernetes.queue import COMPONENT, own_container, value_of
from hvd.configs import Experiment

# What belongs to one experiment, by component, and how the names of its objects end
ENDINGS = {"value": "value", "policy": "awr", "gate": "awr-gate", "evaluate": "evaluate"}

_LONGEST = 38  # characters behind "hvd-"; a Job's name has 63, and its pods' names add to it

Manifest = dict[str, Any]


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


def renamed(docs: Sequence[Manifest], name: str) -> list[Manifest]:
    """With `name` as the first part of the experiment's names, and wherever one of them is named.

    Storage, Secret and the trainer's account keep theirs. kustomize's namePrefix would rename all objects, and neither
    the gate's arguments nor the coordinator's address.
    """
    names = {doc["metadata"]["name"]: f"{name}-{ENDINGS[component(doc)]}" for doc in docs if component(doc) in ENDINGS}
    return [replaced(doc, names) for doc in docs]


def replaced(value: Any, names: Mapping[str, str]) -> Any:
    """The same with other names for these objects, and for their process 0, which has its address by a Service."""
    names = {**names, **{f"{old}-0.{old}": f"{new}-0.{new}" for old, new in names.items()}}

    def put(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: put(part) for key, part in value.items()}
        if isinstance(value, list):
            return [put(part) for part in value]
        if not isinstance(value, str):
            return value
        host, colon, port = value.partition(":")
        return names.get(host, host) + colon + port

    return put(value)
