"""The value stage's objectives: the TD target, the loss of the levels' Q, and OBJECTIVES, the f of V.

Letters in shapes: b rows of a batch, l kinematic levels, 2 twin heads, s any shape. `p` holds the entry's parameters.
JAX is imported by the first formula that is evaluated: login nodes read the names from here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from etils import epy
from jaxtyping import Float

from hvd.configs import Experiment
from hvd.method.parameters import Parameter, Parameters, choose, resolve

with epy.lazy_imports():
    import jax
    import jax.numpy as jnp


# ----------------------------------------------------------------------------------------------------------- losses


def td_target(reward: Float[Any, "b"], discount: Float[Any, "b"], next_v: Float[Any, "b"]) -> Float[Any, "b"]:
    """y = reward + discount * V(next state), without gradient.

    Args:
        reward: K-step discounted return sum_{j<K} gamma^j r_{t+j}.
        discount: gamma^K, or 0 where the task ended inside the chunk.
        next_v: V at the state after the chunk.
    """
    return jax.lax.stop_gradient(reward + discount * next_v)


def q_loss(q: Float[Any, "b l 2"], y: Float[Any, "b"]) -> Float[Any, ""]:
    """L_Q = mean over rows of the plain sum over levels of (y - Q_i)^2, y shared by all; the twins are averaged."""
    return jnp.mean(jnp.sum(jnp.mean(jnp.square(y[:, None, None] - q), axis=-1), axis=-1))


def v_loss(v: Float[Any, "b"], target_q: Float[Any, "b l 2"], f: Callable[[Any], Any]) -> Float[Any, ""]:
    """L_V = mean over rows of sum_i f(Qbar_i - V); Qbar: the target network's minimum over the twins, no gradient."""
    qbar = jax.lax.stop_gradient(jnp.min(target_q, axis=-1))
    return jnp.mean(jnp.sum(f(qbar - v[:, None]), axis=-1))


# ------------------------------------------------------------------------------------------------- f, and its omega


def exponential(u: Float[Any, "*s"], p: Parameters) -> Float[Any, "*s"]:
    """f(u) = exp(alpha u) - alpha u (docs/method.md, first misprint corrected). It goes on as its tangent where
    alpha u > exp_clip_log, which is IDQL's clip of exp inside the gradient f'."""
    x = p["alpha"] * u
    inside = jnp.minimum(x, p["exp_clip_log"])
    return jnp.exp(inside) * (1.0 + (x - inside)) - x


def exponential_omega(a: Float[Any, "*s"], p: Parameters) -> Float[Any, "*s"]:
    """omega(A) = alpha expm1(alpha A) / A, by its series near 0, where the limit is alpha^2."""
    x = jnp.minimum(p["alpha"] * a, 80.0)  # exp of more is past every sensible clip, and overflows float32 at 88
    small = jnp.abs(x) < 1e-2
    series = 1.0 + x * (1 / 2 + x * (1 / 6 + x / 24))
    return p["alpha"] ** 2 * jnp.where(small, series, jnp.expm1(x) / jnp.where(small, 1.0, x))


def expectile(u: Float[Any, "*s"], p: Parameters) -> Float[Any, "*s"]:
    """f(u) = |tau - 1{u<0}| u^2."""
    return _asymmetry(u, p) * jnp.square(u)


def expectile_omega(a: Float[Any, "*s"], p: Parameters) -> Float[Any, "*s"]:
    """omega(A) = |tau - 1{A<0}|."""
    return _asymmetry(a, p)


def quantile(u: Float[Any, "*s"], p: Parameters) -> Float[Any, "*s"]:
    """f(u) = |tau - 1{u<0}| |u|."""
    return _asymmetry(u, p) * jnp.abs(u)


def quantile_omega(a: Float[Any, "*s"], p: Parameters) -> Float[Any, "*s"]:
    """omega(A) = |tau - 1{A<0}| / |A|."""
    return _asymmetry(a, p) / jnp.maximum(jnp.abs(a), 1e-6)


def _asymmetry(u: Float[Any, "*s"], p: Parameters) -> Float[Any, "*s"]:
    return jnp.abs(p["tau"] - (u < 0).astype(u.dtype))


# --------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Objective:
    """What --model.method chooses.

    Attributes:
        f: (u, parameters) -> f(u), elementwise; u = Q - V. L_V is its mean.
        omega: (A, parameters) -> the policy stage's weight |f'(A)| / |A| (IDQL's identity), elementwise, positive.
        parameters: by name; those without a config field of their own are set by --model.method_params.NAME.
    """

    f: Callable[[Any, Parameters], Any]
    omega: Callable[[Any, Parameters], Any]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


_TAU = Parameter(field="model.tau")
OBJECTIVES: dict[str, Objective] = {
    "exponential": Objective(
        exponential,
        exponential_omega,
        {"alpha": Parameter(field="model.alpha"), "exp_clip_log": Parameter(field="value.exp_clip_log")},
    ),
    "expectile": Objective(expectile, expectile_omega, {"tau": _TAU}),
    "quantile": Objective(quantile, quantile_omega, {"tau": _TAU}),
}


def parameters(cfg: Experiment) -> dict[str, float]:
    """Those of the experiment's objective; UserError for an unknown objective or parameter."""
    method = cfg.model.method
    declared = choose(OBJECTIVES, method, "model.method").parameters
    return resolve(declared, cfg.model.method_params, cfg, "model.method_params", f"objective {method!r}")


def objective(cfg: Experiment) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """(f, omega) of the experiment, as functions of u and of A alone."""
    p, chosen = parameters(cfg), OBJECTIVES[cfg.model.method]
    return lambda u: chosen.f(u, p), lambda a: chosen.omega(a, p)
