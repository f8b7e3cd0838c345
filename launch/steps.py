"""Which steps a stage has, as commands of `hvd`, in their order. Imports no jax and runs nothing.

A step may be asked for again and again: each one finds out by itself what is done already.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from hvd.configs import Experiment
from hvd.errors import UserError

STAGES = ("all", "value", "policy")

# Imitation by the same code: which data and which weights a baseline has. Results are compared by these names.
BASELINES: dict[str, tuple[str, ...]] = {
    "imitation-expert": ("--policy.weighting", "none", "--policy.suboptimal_share", "0"),
    "imitation-mixed": ("--policy.weighting", "none"),
    "imitation-success": ("--policy.weighting", "none", "--suboptimal_data.success_only", "true"),
}


@dataclass(frozen=True)
class Task:
    """One step: a name for its log, the arguments after `hvd`, and whether it is spread over the nodes."""

    name: str
    args: tuple[str, ...]
    spread: bool = False


Group = tuple[Task, ...]  # tasks that do not wait for each other


def plan(cfg: Experiment, stage: str, options: Sequence[str], overwrite: bool = False) -> list[Group]:
    """The groups of a stage, in order. `options`: what the user gave (`--config NAME --dotted.field value ...`)."""
    if stage not in STAGES:
        raise UserError(f"--stage {stage!r} is not one of {', '.join(STAGES)}")

    def task(step: str, *extra: str, name: str = "", spread: bool = False) -> Task:
        again = ("--overwrite",) if overwrite and step in ("train-value", "train-policy") else ()
        return Task(name or step, (step, *options, *extra, *again), spread)

    runs = {cfg.policy.run_name: ()}
    if cfg.evaluate.baselines:
        runs |= {name: ("--policy.run_name", name, *flags) for name, flags in BASELINES.items()}

    value = [*_prepare(cfg, options), (task("norm-stats"),), (task("train-value", spread=True),)]
    policy = [
        *([(task("advantages", spread=True),)] if needs_value(cfg) else []),
        tuple(task("train-policy", *extra, name=name, spread=True) for name, extra in runs.items()),
    ]
    after = [
        *((task("evaluate", *extra, name=f"evaluate-{name}"),) for name, extra in runs.items()),
        (task("report"),),
    ]
    return {"value": value, "policy": policy, "all": value + policy + after}[stage]


def needs_value(cfg: Experiment) -> bool:
    """Does the policy use the value run? Imitation does not."""
    return cfg.policy.weighting != "none"


def _prepare(cfg: Experiment, options: Sequence[str]) -> list[Group]:
    """Simulated recordings, and the datasets made of them as a user would make his own."""
    if not cfg.sim.task:
        return []
    groups: list[Group] = [(Task("simulate", ("simulate", *options)),)]
    for role, data in cfg.datasets():
        folder = {"optimal": "optimal", "suboptimal": "mixed"}[role]
        recordings = os.path.join(cfg.exp_dir, "recordings", folder)
        args = ("convert", "--raw-dirs", recordings, "--repo-id", data.repo_id, "--root", str(data.path()))
        groups.append((Task(f"convert-{folder}", args),))
    return groups
