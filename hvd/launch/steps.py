"""Which steps a stage has, as commands of `hvd`, in their order. Imports no jax and runs nothing.

A step may be asked for again and again: each one finds out by itself what is done already.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hvd import prepare
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


MakeTask = Callable[..., Task]
Group = tuple[Task, ...]  # tasks that do not wait for each other


def plan(cfg: Experiment, stage: str, options: Sequence[str], overwrite: bool = False) -> list[Group]:
    """The groups of a stage, in order. `options`: what the user gave (`--config NAME --dotted.field value ...`)."""
    if stage not in STAGES:
        raise UserError(f"--stage {stage!r} is not one of {', '.join(STAGES)}")

    task = _tasks(options, overwrite)
    value = [*_prepare(cfg, options), (task("norm-stats"),), (task("train-value", spread=True),)]
    policy = [
        *([(task("advantages", spread=True),)] if needs_value(cfg) else []),
        tuple(task("train-policy", *extra, name=name, spread=True) for name, extra in _runs(cfg).items()),
    ]
    return {"value": value, "policy": policy, "all": value + policy + _results(cfg, task)}[stage]


def after(cfg: Experiment, options: Sequence[str], overwrite: bool = False) -> list[Group]:
    """What comes after the two stages where they are jobs of their own: the baselines, evaluation, report."""
    task = _tasks(options, overwrite)
    baselines = {name: extra for name, extra in _runs(cfg).items() if extra}
    trained = [(task("train-policy", *extra, name=name, spread=True),) for name, extra in baselines.items()]
    return [*trained, *_results(cfg, task)]


def _runs(cfg: Experiment) -> dict[str, tuple[str, ...]]:
    """The policy runs that are compared: name -> its options."""
    return {cfg.policy.run_name: ()} | (
        {name: ("--policy.run_name", name, *flags) for name, flags in BASELINES.items()}
        if cfg.evaluate.baselines
        else {}
    )


def _results(cfg: Experiment, task: MakeTask) -> list[Group]:
    evaluations = (task("evaluate", *extra, name=f"evaluate-{name}") for name, extra in _runs(cfg).items())
    return [*((one,) for one in evaluations), (task("report"),)]


def _tasks(options: Sequence[str], overwrite: bool) -> MakeTask:
    def task(step: str, *extra: str, name: str = "", spread: bool = False) -> Task:
        again = ("--overwrite",) if overwrite and step in ("train-value", "train-policy") else ()
        return Task(name or step, (step, *options, *extra, *again), spread)

    return task


def needs_value(cfg: Experiment) -> bool:
    """Does the policy use the value run? Imitation does not."""
    return cfg.policy.weighting != "none"


def _prepare(cfg: Experiment, options: Sequence[str]) -> list[Group]:
    """Simulated recordings, and the datasets made of them as a user would make his own."""
    if not cfg.sim.task:
        return []
    groups: list[Group] = [(Task("simulate", ("simulate", *options)),)]
    groups += [(Task(f"convert-{name}", ("convert", *args)),) for name, args in prepare.conversions(cfg)]
    return groups
