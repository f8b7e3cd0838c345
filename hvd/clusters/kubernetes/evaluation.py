"""The Job behind the policy's: baselines, evaluations and report, one after the other in one pod.

It is made of the policy Job: the same image, volume and place. On Slurm it is the third job.
"""

import copy

from hvd import stages
from hvd.clusters.base import Request
from hvd.clusters.kubernetes.names import ENDINGS, Manifest, component, replaced
from hvd.clusters.kubernetes.queue import COMPONENT, OWN, own_container
from hvd.runtime.processes import ENVIRONMENT


def steps(request: Request) -> list[stages.Step]:
    """What the Job does, in this order."""
    groups = stages.parts(request.cfg, request.stage, overwrite=request.overwrite)["evaluate"]
    return [step for group in groups for step in group]


def job(policy: Manifest) -> Manifest:
    """Of a policy Job as the files have it: one pod, and nothing of what several need to find each other."""
    old = policy["metadata"]["name"]
    made = replaced(copy.deepcopy(policy), {old: f"{old.removesuffix(ENDINGS['policy']).rstrip('-')}-evaluate"})
    spec, pod = made["spec"], made["spec"]["template"]["spec"]
    for labels in (made["metadata"]["labels"], spec["template"]["metadata"]["labels"]):
        labels[COMPONENT] = "evaluate"
    spec.pop("completionMode", None)
    if "backoffLimit" in spec:  # failures are counted pod by pod
        spec["backoffLimit"] = -(-spec["backoffLimit"] // spec.get("completions", 1))
    spec["completions"] = 1
    pod.pop("subdomain", None)
    container = own_container(made)
    container.pop("ports", None)
    container["env"] = [one for one in container.get("env", ()) if one["name"] not in ENVIRONMENT]
    pod["initContainers"] = [one for one in pod.get("initContainers", ()) if one["name"] not in OWN]
    return made


def fill_in(made: Manifest, request: Request) -> None:
    """A container for each step, once the Job has what the user wants of it; paused where the policy comes first."""
    pod, own = made["spec"]["template"]["spec"], own_container(made)
    each = [
        copy.deepcopy(own) | {"name": f"{step.step}-{number}", "args": list(step.words(request.options))}
        for number, step in enumerate(steps(request), 1)
    ]
    each[-1]["name"] = "report"
    pod["initContainers"] += each[:-1]
    pod["containers"] = [each[-1] if one is own else one for one in pod["containers"]]
    made["spec"]["parallelism"] = 0 if request.stage == "all" else 1


def behind_the_gate(docs: list[Manifest], name: str) -> None:
    """The gate releases the Job too, and may."""
    for doc in docs:
        if component(doc) == "gate" and doc["kind"] == "Job":
            args = own_container(doc)["args"]
            place = args.index("--pods") + 2
            args[place:place] = ["--evaluate-job", name]
        elif component(doc) == "gate" and doc["kind"] == "Role":
            doc["rules"][1]["resourceNames"].append(name)
