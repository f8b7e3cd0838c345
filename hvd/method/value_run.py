"""Which value run a policy takes, and whether it fits. The launcher, `hvd plan` and the policy stage ask here.

Imports nothing slow: the launcher asks before it prints its first line.
"""

from typing import Any

from hvd import mixture
from hvd.configs import Experiment
from hvd.errors import UserError


def needed(cfg: Experiment) -> bool:
    """Does the policy need a value run? Imitation does not. UserError where it would weigh no row with one."""
    from hvd.method import extraction

    if not extraction.extractor(cfg)[0].needs_value(cfg):
        return False
    if not mixture.weighted(cfg):
        raise UserError(
            f"policy.weighting {cfg.policy.weighting!r} weighs the rows of mixed and rollouts sets, and this policy "
            "trains on optimal data alone: set policy.suboptimal_share above 0, or --policy.weighting none (imitation)"
        )
    return True


def own_needed(cfg: Experiment) -> bool:
    """Does the policy need the experiment's own value run, and not another one's (policy.value_run)?"""
    return needed(cfg) and not cfg.policy.value_run


def check(cfg: Experiment, *, digests: bool = True) -> Any:
    """The value run that the policy takes, as hvd.train.complete.Complete: undamaged and fitting; UserError otherwise.

    Args:
        digests: read every byte of its checkpoint; False where a later step of the same command does.
    """
    from hvd.train import complete

    if not cfg.policy.value_run:
        return complete.check_complete(cfg.value_dir, stage="value", cfg=cfg, digests=digests)
    folder = cfg.policy.value_run
    _check_fits(cfg, folder)
    return complete.check_complete(folder, stage="value", digests=digests)


def _check_fits(cfg: Experiment, folder: str) -> None:
    """The run's chunks, levels, cameras, normalisation and objective are the policy's."""
    from hvd.method import extraction
    from hvd.train import run_dir as runs

    record = runs.read(folder)
    if record is None:
        raise UserError(f"policy.value_run {folder}: no run there (no {runs.CONFIG}); give the folder of a value run")
    if record.stage != "value":
        raise UserError(f"policy.value_run {folder} holds a {record.stage} run, not a value run")
    if extraction.extractor(cfg)[0].acts:
        extraction.check_judges(cfg, record.config, folder)
    extraction.check_same(_meaning(record.config), _meaning(cfg), f"policy.value_run {folder} does not fit", "here")


def _meaning(cfg: Experiment) -> dict[str, object]:
    """What V, Q and A of a run mean, by field."""
    from hvd.method import extraction, objectives

    of_objective = {f"objective's {name}": value for name, value in objectives.parameters(cfg).items()}
    return extraction.of_actions(cfg) | {"model.method": cfg.model.method} | of_objective
