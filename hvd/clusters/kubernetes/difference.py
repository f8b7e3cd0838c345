"""Does a Job that is in the cluster do what a manifest asks for?"""

import functools
import json
from collections.abc import Sequence
from typing import Any

from hvd import overrides
from hvd.clusters.kubernetes.names import Manifest
from hvd.clusters.kubernetes.queue import KubernetesJob
from hvd.configs import Experiment
from hvd.errors import UserError
from hvd.fields import leaves

APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_NAMED = 3  # fields in a line


def difference(there: KubernetesJob, wanted: Manifest, *, living: bool) -> str:
    """What a Job of the same name has otherwise, in words; "" where it does the same.

    One that has ended may have had another image or size: its successor works on the same run all the same.

    Args:
        living: it has not ended.
    """
    asked = KubernetesJob(wanted)
    if there.component != asked.component:
        return "is none of hvd's" if not there.component else f"is a Job of the {there.component} stage"
    other = _other_arguments(there, asked, living=living)
    if not other and _claims(there) != _claims(asked):
        other = f"works on another volume claim ({', '.join(_claims(there)) or 'none'})"
    if other or not living:
        return other
    images = [[one.get("image") for one in _containers(job)] for job in (there, asked)]
    if images[0] != images[1]:
        return f"runs another image ({', '.join(sorted({str(one) for one in images[0]}))})"
    applied = there.job["metadata"].get("annotations", {}).get(APPLIED)
    place = _first(json.loads(applied).get("spec"), wanted["spec"], "spec") if applied else ""
    return f"has another {place}" if place else ""


def same_run(there: KubernetesJob, wanted: Manifest) -> bool:
    """Is it a Job of the same stage on the same folder of the same volume?"""
    asked = KubernetesJob(wanted)
    if there.component != asked.component or asked.component not in ("value", "policy", "evaluate"):
        return False
    runs = [_experiment(job.args) for job in (there, asked)]
    if runs[0] is None or runs[1] is None or _claims(there) != _claims(asked):
        return False
    return runs[0].value_dir == runs[1].value_dir and runs[0].policy_dir == runs[1].policy_dir


def _other_arguments(there: KubernetesJob, asked: KubernetesJob, *, living: bool) -> str:
    experiments = [_experiment(job.args) for job in (there, asked)]
    words = [_words(job.args) if living else [] for job in (there, asked)]
    mine, yours = experiments
    if mine is None or yours is None:
        return "" if there.args == asked.args else f"has other arguments ({' '.join(there.args)})"
    if mine.exp_dir != yours.exp_dir:
        return f"belongs to experiment {mine.exp_name or mine.name}"
    fields = [f"{leaf.name} {leaf.of(mine)}" for leaf in leaves(Experiment).values() if leaf.of(mine) != leaf.of(yours)]
    if fields:
        more = ", ..." if len(fields) > _NAMED else ""
        return f"has other arguments ({', '.join(fields[:_NAMED])}{more})"
    return "" if words[0] == words[1] else f"has other arguments ({' '.join(words[0])})"


def _words(args: Sequence[str]) -> list[str]:
    """The arguments without those that say which experiment."""
    step = list(args[: args.index("--config")]) if "--config" in args else list(args)
    return [*step, *(["--overwrite"] if "--overwrite" in args else [])]


def _experiment(args: Sequence[str]) -> Experiment | None:
    """None where the arguments do not say one that we know."""
    if "--config" not in args:
        return None
    return _parsed(tuple(args[args.index("--config") :]))


@functools.cache
def _parsed(options: tuple[str, ...]) -> Experiment | None:
    try:
        return overrides.experiment(overrides.take_overwrite(options)[0], here=False)
    except UserError:
        return None


def _claims(job: KubernetesJob) -> list[str]:
    volumes = job.job["spec"]["template"]["spec"].get("volumes", ())
    return [one["persistentVolumeClaim"]["claimName"] for one in volumes if "persistentVolumeClaim" in one]


def _containers(job: KubernetesJob) -> list[Any]:
    pod = job.job["spec"]["template"]["spec"]
    return [*pod.get("initContainers", ()), *pod["containers"]]


def _first(there: Any, wanted: Any, place: str) -> str:
    """The first place at which the two differ; arguments have been looked at."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        names = [name for name in {**there, **wanted} if name != "args"]
        return next(
            (found for name in names if (found := _first(there.get(name), wanted.get(name), f"{place}.{name}"))), ""
        )
    if isinstance(there, list) and isinstance(wanted, list) and len(there) == len(wanted):
        pairs = enumerate(zip(there, wanted, strict=True))
        return next((found for n, (a, b) in pairs if (found := _first(a, b, f"{place}[{n}]"))), "")
    return "" if there == wanted else place
