"""Which steps a stage has, as commands of `hvd`, in their order. Imports no jax and runs nothing.

A step may be asked for again and again: each one finds out by itself what is done already.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hvd.configs import Experiment
from hvd.errors import UserError
from hvd.method import value_run

STAGES = ("all", "value", "policy", "evaluate")

# What a baseline has of its own, by the same code and on the same data. Results are compared by these names.
_WEIGHTED = ("--policy.extractor", "weighted", "--policy.extractor_params", "{}", "--policy.gate", "none")
_UNWEIGHTED = ("--policy.weighting", "none", *_WEIGHTED)
IMITATION: dict[str, tuple[str, ...]] = {
    "imitation-expert": (*_UNWEIGHTED, "--policy.suboptimal_share", "0"),
    "imitation-mixed": _UNWEIGHTED,
    "imitation-success": (*_UNWEIGHTED, "--suboptimal_data.success_only", "true"),
}


def baselines(cfg: Experiment) -> dict[str, tuple[str, ...]]:
    """Name -> fields of what the policy is compared with: imitation; and where its rows are chosen by a score, the
    published weighting and the twin that scores each level by itself, or all of them together."""
    from hvd.method import extraction

    if not extraction.extractor(cfg)[0].scored:
        return IMITATION
    together = cfg.policy.score_levels in ("joint", "mean")
    twin = {"level-by-level": "own"} if together else {"all-levels": "joint"}
    scored = {name: ("--policy.score_levels", levels) for name, levels in twin.items()}
    return {"published-hvd": ("--policy.weighting", "hvd", *_WEIGHTED), **scored, **IMITATION}


@dataclass(frozen=True)
class Step:
    """One step of a stage: `hvd STEP`, how the config is told, `extra`.

    Attributes:
        name: of its log.
        spread: over the nodes; else it is one process.
    """

    step: str
    name: str
    extra: tuple[str, ...] = ()
    spread: bool = False

    def words(self, options: Iterable[str]) -> tuple[str, ...]:
        """The arguments of `hvd`. `options` tell the config: `--config-file PATH`, `--config NAME --field value`."""
        return (self.step, *options, *self.extra)


Group = tuple[Step, ...]  # steps that do not wait for each other


def parts(cfg: Experiment, stage: str, *, overwrite: bool = False, together: bool = False) -> dict[str, list[Group]]:
    """The parts of a stage in their order, "all" being value, policy and evaluate; each could be a job of its own.

    Args:
        overwrite: the trainings delete their run directories and start again.
        together: the baselines of "all" are trained beside the policy; else they are the first steps of the evaluation.
    """
    if stage not in STAGES:
        raise UserError(f"--stage {stage!r} is not one of {', '.join(STAGES)}")
    again = ("--overwrite",) if overwrite else ()

    def training(name: str, extra: Sequence[str]) -> Step:
        return Step("train-policy", name, (*extra, *again), spread=True)

    others = baselines(cfg) if cfg.evaluate.baselines else {}
    runs = {cfg.policy.run_name: ()} | {n: ("--policy.run_name", n, *flags) for n, flags in others.items()}
    policy, *compared = (training(name, extra) for name, extra in runs.items())
    advantages = [(Step("advantages", "advantages", spread=True),)] if stage != "value" and needs_value(cfg) else []
    checks = dict.fromkeys(others, ("--evaluate.checks", "false"))  # those of the policy are about the same table
    evaluations = [(Step("evaluate", f"evaluate-{n}", (*extra, *checks.get(n, ()))),) for n, extra in runs.items()]
    # a policy that takes another experiment's value run is prepared, and trains none of its own
    own_value = stage == "value" or not cfg.policy.value_run
    value = [(Step("train-value", "train-value", again, spread=True),)] if own_value else []
    later = [] if together and stage == "all" else [(one,) for one in compared]
    every = {
        "value": [(Step("prepare", "prepare"),), *value],
        "policy": [*advantages, (policy, *compared) if together else (policy,)],
        "evaluate": [*later, *evaluations, (Step("report", "report"),)],
    }
    return every if stage == "all" else {stage: every[stage]}


needs_value = value_run.needed  # does the policy use a value run? Imitation does not
