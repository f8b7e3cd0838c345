"""Which sets a stage trains on, in which role, and what part of a batch each one is. Imports no jax.

Rows of a set in the role "optimal" are imitated; those of "mixed" and "rollouts" are weighted by their advantages.
"""

from collections.abc import Mapping
from typing import Literal

from hvd.configs import Experiment, Role
from hvd.errors import UserError, nearest
from hvd.fields import check_rules

Stage = Literal["value", "policy"]
_DEFAULT: dict[str, Role] = {"optimal": "optimal", "suboptimal": "mixed"}
_RESERVED = ("optimal", "suboptimal", "norm_stats", "value")  # names of inputs of a run


def role(cfg: Experiment, name: str) -> Role:
    """The role of the set called `name`."""
    return cfg.sets()[name].role or _DEFAULT.get(name, "rollouts")


def number(cfg: Experiment, name: str) -> int:
    """The set's number in a batch's `source`, which also keys the order of its rows: optimal 0, suboptimal 1, ..."""
    return list(cfg.sets()).index(name)


def field(name: str) -> str:
    """The config field that holds the set."""
    return f"{name}_data" if name in _DEFAULT else f"more_data.{name}"


def names(cfg: Experiment, stage: Stage) -> tuple[str, ...]:
    """The sets that the stage trains on; the suboptimal one stands for its side where that side names no set."""
    return tuple(name for name in _candidates(cfg) if _used(cfg, stage, name))


def weighted(cfg: Experiment) -> tuple[str, ...]:
    """The sets of the policy stage whose rows are weighted."""
    return tuple(name for name in names(cfg, "policy") if role(cfg, name) != "optimal")


def imitated(cfg: Experiment) -> tuple[int, ...]:
    """The numbers of the sets whose rows are imitated."""
    return tuple(number(cfg, name) for name in cfg.sets() if role(cfg, name) == "optimal")


def parts(cfg: Experiment, stage: Stage, frames: Mapping[str, int]) -> dict[str, float]:
    """What part of a batch each set is, up to a common factor. `frames`: training rows of each set of the stage."""
    given = {name: cfg.sets()[name].share for name in frames if cfg.sets()[name].share}
    free = [name for name in frames if name not in given]
    left = 1.0 - sum(given.values())
    if left < -1e-6 or (free and left < 1e-6):
        wanted = ", ".join(f"{field(name)}.share {share}" for name, share in given.items())
        raise UserError(f"{wanted}: more than a batch" + (f", or nothing left of it for {free[0]}" if free else ""))
    if stage == "value":
        if not given:
            return {name: float(frames[name]) for name in free}
        total = sum(frames[name] for name in free)
        return {name: given.get(name) or left * frames[name] / total for name in frames}
    sides = {name: role(cfg, name) == "optimal" for name in free}
    shares = {side: _side(cfg, "policy", side) for side in sides.values()}
    if len(shares) == 1:
        shares = dict.fromkeys(shares, 1.0)
    within = {side: sum(frames[name] for name in free if sides[name] is side) for side in shares}
    return {
        name: given[name]
        if name in given
        else left * shares[sides[name]] * (frames[name] / max(within[sides[name]], 1))
        for name in frames
    }


def check(cfg: Experiment) -> None:
    """UserError where a set is missing, or has a name or a share that it cannot have; reads no file."""
    for name, data in cfg.more_data.items():
        if name in _RESERVED or not name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"more_data.{name}: {name!r} cannot be the name of a set; take another")
        if not data.repo_id:
            raise UserError(f"more_data.{name} names no dataset; set --more_data.{name}.repo_id")
        check_rules(data, lambda field, name=name: f"more_data.{name}.{field}")
    named = dict(cfg.datasets())
    if "optimal" not in named:
        raise UserError(f"config {cfg.name} has no optimal set; set --optimal_data.repo_id or --optimal_data.root")
    asking: dict[Stage, str] = {
        "policy": f"policy.suboptimal_share {cfg.policy.suboptimal_share}",
        "value": f"value.data {cfg.value.data!r}",
    }
    for stage, asked in asking.items():
        if "suboptimal" not in named and "suboptimal" in names(cfg, stage):
            raise UserError(f"{asked} needs a suboptimal set; set --suboptimal_data.repo_id or .root")
        parts(cfg, stage, dict.fromkeys(names(cfg, stage), 1))
    known = {camera for data in named.values() for camera in data.keys.images}
    for camera in cfg.model.cameras:
        if camera not in known:
            raise UserError(f"model.cameras: {camera!r} is in no dataset's keys.images{nearest(camera, known)}")


def _candidates(cfg: Experiment) -> list[str]:
    named = dict(cfg.datasets())
    others = any(role(cfg, name) != "optimal" for name in named if name != "suboptimal")
    return [name for name in cfg.sets() if name in named or name == "optimal" or (name == "suboptimal" and not others)]


def _used(cfg: Experiment, stage: Stage, name: str) -> bool:
    share = cfg.sets()[name].share if stage == "policy" else 0.0
    return share > 0 or _side(cfg, stage, role(cfg, name) == "optimal") > 0


def _side(cfg: Experiment, stage: Stage, optimal: bool) -> float:
    """The part of a stage's batch that is left to the imitated (`optimal`) or to the weighted sets without a share."""
    if stage == "value":
        return float(cfg.value.data in (("optimal", "both") if optimal else ("mixed", "both")))
    share = cfg.policy.suboptimal_share
    if not 0.0 <= share <= 1.0:
        raise UserError(f"policy.suboptimal_share {share} is not between 0 and 1")
    return 1.0 - share if optimal else share
