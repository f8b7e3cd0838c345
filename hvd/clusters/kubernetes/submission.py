"""Handing manifests to Kubernetes, beside what the cluster has already: all of them, or nothing.

A Job that is there is never changed, and is replaced only where it has ended and would do the same again.
"""

import contextlib
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvd.clusters.kubernetes import kubectl
from hvd.clusters.kubernetes.difference import difference, same_run
from hvd.clusters.kubernetes.manifests import to_yaml
from hvd.clusters.kubernetes.names import ENDINGS, Manifest, component
from hvd.clusters.kubernetes.queue import AFTER, OURS, PODS, KubernetesJob, own_container, value_of
from hvd.errors import Failed, UserError

_STAGES = ("value", "policy", "evaluate")  # in this order; kustomize sorts by name
_DRY_RUN = "-dry-run"  # behind the name of a Job that another one must make room for


@dataclass(frozen=True)
class Done:
    """(stage, name) of the stages' Jobs in their order; must the launcher release the later ones, having no gate?"""

    stages: Sequence[tuple[str, str]]
    ours_to_release: bool = False


def submit(manifests: Sequence[Manifest], target: kubectl.Target = kubectl.CURRENT) -> Done:
    """Create what is not there, after the cluster has looked at it.

    A Job that lives and does what is asked is left as it is: to apply a released policy Job would pause it. One that
    has ended makes room for its successor, which goes on where the run stopped. A volume claim that is there holds the
    users' data and stays.

    Raises:
        UserError: a Job of that name does something else, another one works on the run, or the cluster refuses a
            manifest; nothing has been changed then.
        Unreachable: it does not answer.
    """
    manifests = _pulled(manifests, target)
    alone = any(doc["kind"] == "Role" for doc in manifests) and not target.may("create", "roles")
    if alone:
        print("you may not create Roles in this namespace, so there is no gate: the launcher waits for each", end=" ")
        print("Job and then releases the next one; call it again where it has ended before", flush=True)
        manifests = _without_gate(manifests)
    jobs = {doc["metadata"]["name"]: doc for doc in manifests if doc["kind"] == "Job" and component(doc) in ENDINGS}
    present = {name: KubernetesJob(job) for name, job in _items(target, "jobs").items()}
    over = {name for name, job in present.items() if _over(job, present)}
    _refuse_others(jobs, present, over)
    kept = _kept(jobs, present, over)
    ended = [name for name in jobs if name in present and name not in kept]
    wanted = [doc for name, doc in jobs.items() if name not in kept]
    rest = [doc for doc in manifests if doc["metadata"]["name"] not in jobs or doc["kind"] != "Job"]
    claims = _claims(rest, target)
    rest = [doc for doc in rest if doc["kind"] != "PersistentVolumeClaim" or doc["metadata"]["name"] not in claims]
    rest = rest if wanted else []
    _hand_over(target, "apply", [*rest, *(_aside(doc, ended) for doc in wanted)], "--dry-run=server")
    for name in kept:
        print(f"Job {name} is there already and does the same; it is left as it is", flush=True)
    if ended:
        target.ask("delete", "jobs", *ended, "--ignore-not-found")
    made = _hand_over(target, "apply", rest)
    try:
        # "create" fails where somebody else has been quicker; "apply" would change their Job
        made += _hand_over(target, "create", wanted, "--save-config")
    except _Half as half:
        _take_back(target, half.made)
        raise UserError(f"{half}; no Job of it is left behind") from None
    for name in made:
        print(f"{name} created", flush=True)
    stages = {component(doc): name for name, doc in jobs.items()}
    return Done([(stage, stages[stage]) for stage in _STAGES if stage in stages], alone)


def _pulled(manifests: Sequence[Manifest], target: kubectl.Target) -> Sequence[Manifest]:
    """With the pull secrets of the trainers' account for the gate, too, which has an account of its own."""
    jobs = {component(doc): doc["spec"]["template"]["spec"] for doc in manifests if doc["kind"] == "Job"}
    gate, policy = jobs.get("gate"), jobs.get("policy")
    if gate is None or policy is None or "imagePullSecrets" in gate:
        return manifests
    secrets = policy.get("imagePullSecrets")
    if not secrets:
        with contextlib.suppress(Failed, ValueError):
            account = policy.get("serviceAccountName", "default")
            secrets = json.loads(target.ask("get", "serviceaccount", account, "-o", "json")).get("imagePullSecrets")
    if secrets:
        gate["imagePullSecrets"] = secrets
    return manifests


def _without_gate(manifests: Sequence[Manifest]) -> list[Manifest]:
    """The paused Jobs say instead which Job each of them waits for, and how many pods it then has."""
    (gate,) = [doc for doc in manifests if doc["kind"] == "Job" and component(doc) == "gate"]
    kept, chain = [doc for doc in manifests if component(doc) != "gate"], KubernetesJob(gate).chain
    pods = {"policy": value_of(own_container(gate)["args"], "pods"), "evaluate": "1"}
    for doc in kept:
        if doc["kind"] == "Job" and component(doc) in pods:
            notes = {AFTER: chain[chain.index(doc["metadata"]["name"]) - 1], PODS: pods[component(doc)]}
            doc["metadata"]["annotations"] = doc["metadata"].get("annotations", {}) | notes
    return kept


class _Half(UserError):
    """The cluster refuses some of what it was given. `made`: kind/name of what it has taken before."""

    def __init__(self, text: str, made: Sequence[str]):
        super().__init__(text)
        self.made = made


def _hand_over(target: kubectl.Target, verb: str, manifests: Sequence[Manifest], *flags: str) -> list[str]:
    """Kind/name of what is new."""
    if not manifests:
        return []
    made, refused = target.hand_over(verb, to_yaml(manifests), *flags)
    if refused:
        raise _Half(f"the cluster refuses the manifests: {refused}", made)
    return made


def _take_back(target: kubectl.Target, made: Sequence[str]) -> None:
    """Delete the Jobs. Accounts, roles and claims stay: who has been quicker may use those of the same names by now."""
    for name in reversed(made):
        with contextlib.suppress(Failed):
            target.ask("delete", name, "--ignore-not-found", "--wait=false")


def _aside(doc: Manifest, ended: Sequence[str]) -> Manifest:
    """The Job by another name for the dry run, where one of its name has yet to make room."""
    name = doc["metadata"]["name"]
    if name not in ended:
        return doc
    doc = copy.deepcopy(doc)
    doc["metadata"]["name"] = name + _DRY_RUN
    return doc


def _over(job: KubernetesJob, present: Mapping[str, KubernetesJob]) -> bool:
    """Has it ended, or can it only end?"""
    if job.component == "gate":  # one whose last Job has ended is about to end, and releases no successor
        held = [present.get(name) for name in job.chain[1:]]
        return (
            job.ended
            or any(one is None or one.state == "FAILED" for one in held)
            or all(one and one.ended for one in held)
        )
    gates = [one for one in present.values() if one.component == "gate" and job.name in one.chain[1:]]
    gates = gates if job.after is None else []
    before = present.get(job.after or "")
    # a Job whose gate has given up will never be released, nor one that waits for a Job that has failed
    lost = before is not None and before.state != "COMPLETED" and _over(before, present)
    return job.ended or (job.state == "PAUSED" and (lost or any(gate.ended for gate in gates)))


def _refuse_others(jobs: Mapping[str, Manifest], present: Mapping[str, KubernetesJob], over: set[str]) -> None:
    """UserError for a Job of such a name that does something else or is going, and for another one on the same run."""
    for name, doc in jobs.items():
        if name in present and present[name].job["metadata"].get("deletionTimestamp"):
            raise UserError(f"Job {name} is being deleted, and its pods may still save: try again once it is gone")
        if name in present and (other := difference(present[name], doc, living=name not in over)):
            mine = "" if other.startswith("belongs") else f", or remove that one first (hvd jobs cancel {name})"
            raise UserError(
                f"Job {name} is there already and {other}; nothing is submitted. Give this one another name with "
                f"--kubernetes.name{mine}"
            )
        for there in present.values():
            ours = there.job["metadata"].get("labels", {}).get(OURS.partition("=")[0]) == OURS.partition("=")[2]
            if ours and there.name not in jobs and there.name not in over and same_run(there, doc):
                raise UserError(
                    f"Job {there.name} works on the same run as {name} would; nothing is submitted. Wait for it "
                    f"(hvd jobs wait {there.name}), or give this run another --exp_name"
                )


def _kept(jobs: Mapping[str, Manifest], present: Mapping[str, KubernetesJob], over: set[str]) -> list[str]:
    """Names of those that stay: the living ones, and a complete Job that a later one has begun behind.

    Raises:
        UserError: a Job has failed and its gate does not know yet.
    """
    living = [name for name in jobs if name in present and name not in over]
    order = sorted((name for name in jobs if component(jobs[name]) in _STAGES), key=lambda n: _place(jobs[n]))
    kept = list(living)
    for place, name in enumerate(order):
        behind = [other for other in living if other not in order[: place + 1]]
        if name in over and behind:
            if present[name].state == "FAILED":
                raise UserError(f"Job {name} has failed, and {behind[0]} has not ended yet: try again in a minute")
            kept.append(name)
    return kept


def _place(job: Manifest) -> int:
    return _STAGES.index(component(job))


def _claims(manifests: Sequence[Manifest], target: kubectl.Target) -> list[str]:
    """Names of the volume claims that are there already."""
    wanted = any(doc["kind"] == "PersistentVolumeClaim" for doc in manifests)
    return list(_items(target, "persistentvolumeclaims")) if wanted else []


def _items(target: kubectl.Target, kind: str) -> dict[str, Manifest]:
    return {item["metadata"]["name"]: item for item in json.loads(target.ask("get", kind, "-o", "json"))["items"]}
