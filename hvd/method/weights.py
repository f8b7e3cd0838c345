"""From values to the weights of the policy loss, one per kinematic level, and WEIGHTINGS, the ways to weigh.

Letters in shapes: b rows, l levels, 2 twin heads, s any shape. JAX is imported by the first formula that is evaluated.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from etils import epy
from jaxtyping import Float

from hvd.configs import Experiment
from hvd.method import objectives
from hvd.method.parameters import Parameter, Parameters, choose, resolve

with epy.lazy_imports():
    import jax.numpy as jnp

type OfObjective = Callable[[Any], Any]  # A -> |f'(A)| / |A| of the value stage's objective


def advantages(
    v: Float[Any, "b"], q: Float[Any, "b l 2"], kind: Literal["q_minus_v", "marginal"] = "q_minus_v"
) -> Float[Any, "b l"]:
    """A_i = Q_i - V, Q_i the minimum over the twins; "marginal": Q_i - Q_{i-1} with Q_{-1} = V (an ablation)."""
    q_min = jnp.min(q, axis=-1)
    if kind == "marginal":
        return jnp.diff(q_min, axis=-1, prepend=v[:, None])
    return q_min - v[:, None]


def imitation(a: Float[Any, "*s"], p: Parameters, of_objective: OfObjective) -> Float[Any, "*s"]:
    """omega(A) = 1: no value run is needed."""
    return jnp.ones_like(a)


def awr(a: Float[Any, "*s"], p: Parameters, of_objective: OfObjective) -> Float[Any, "*s"]:
    """omega(A) = exp(beta A)."""
    return jnp.exp(jnp.minimum(p["beta"] * a, 80.0))  # exp of more is past every clip, and overflows float32 at 88


def hvd(a: Float[Any, "*s"], p: Parameters, of_objective: OfObjective) -> Float[Any, "*s"]:
    """omega(A) = |f'(A)| / |A| (docs/method.md, second misprint corrected)."""
    return of_objective(a)


@dataclass(frozen=True)
class Weighting:
    """What --policy.weighting chooses.

    Attributes:
        omega: (A, parameters, omega of the objective) -> weights >= 0, elementwise, in float32; clipped afterwards.
        parameters: by name; those without a config field of their own are set by --policy.weighting_params.NAME.
        needs_value: it asks for A; without it the policy needs no value run.
    """

    omega: Callable[[Any, Parameters, OfObjective], Any]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    needs_value: bool = True


WEIGHTINGS: dict[str, Weighting] = {
    "hvd": Weighting(hvd),
    "awr": Weighting(awr, {"beta": Parameter(field="policy.beta")}),
    "none": Weighting(imitation, needs_value=False),
}


def weighting(cfg: Experiment) -> Weighting:
    """The experiment's; UserError for an unknown one."""
    return choose(WEIGHTINGS, cfg.policy.weighting, "policy.weighting")


def parameters(cfg: Experiment) -> dict[str, float]:
    """Those of the experiment's weighting; UserError for an unknown weighting or parameter."""
    entry, field = f"weighting {cfg.policy.weighting!r}", "policy.weighting_params"
    return resolve(weighting(cfg).parameters, cfg.policy.weighting_params, cfg, field, entry)


def omega(a: Float[Any, "*s"], cfg: Experiment) -> Float[Any, "*s"]:
    """Weight of the flow-matching error for advantage `a`, elementwise, in float32; at most policy.weight_clip."""
    of_objective = objectives.objective(cfg)[1]
    weight = weighting(cfg).omega(a.astype(jnp.float32), parameters(cfg), of_objective)
    return jnp.minimum(weight, cfg.policy.weight_clip)
