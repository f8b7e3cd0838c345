"""Value-stage objectives: the TD target, the loss of the levels' Q, and the asymmetric objective f of V.

Letters in shapes: b rows of a batch, l kinematic levels, 2 twin heads.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hvd.configs import Method


def td_target(reward: Float[Array, "b"], discount: Float[Array, "b"], next_v: Float[Array, "b"]) -> Float[Array, "b"]:
    """y = reward + discount * V(next state), without gradient.

    Args:
        reward: K-step discounted return sum_{j<K} gamma^j r_{t+j}.
        discount: gamma^K, or 0 where the task ended inside the chunk.
        next_v: V at the state after the chunk.
    """
    return jax.lax.stop_gradient(reward + discount * next_v)


def q_loss(q: Float[Array, "b l 2"], y: Float[Array, "b"]) -> Float[Array, ""]:
    """L_Q = mean over rows of the plain sum over levels of (y - Q_i)^2, y shared by all; the twins are averaged."""
    return jnp.mean(jnp.sum(jnp.mean(jnp.square(y[:, None, None] - q), axis=-1), axis=-1))


def value_objective(
    method: Method, u: Float[Array, "*s"], *, alpha: float, tau: float, exp_clip_log: float
) -> Float[Array, "*s"]:
    """f(u), u = Q - V, elementwise (docs/method.md, first misprint corrected).

    expectile |tau - 1{u<0}| u^2, quantile |tau - 1{u<0}| |u|, exponential exp(alpha u) - alpha u. The exponential
    goes on as its tangent where alpha u > exp_clip_log, which is IDQL's clip of exp inside the gradient f'.
    """
    if method == "exponential":
        x = alpha * u
        inside = jnp.minimum(x, exp_clip_log)
        return jnp.exp(inside) * (1.0 + (x - inside)) - x
    asymmetry = jnp.abs(tau - (u < 0).astype(u.dtype))
    return asymmetry * (jnp.square(u) if method == "expectile" else jnp.abs(u))


def v_loss(
    v: Float[Array, "b"],
    target_q: Float[Array, "b l 2"],
    method: Method,
    *,
    alpha: float,
    tau: float,
    exp_clip_log: float,
) -> Float[Array, ""]:
    """L_V = mean over rows of sum_i f(Qbar_i - V); Qbar: the target network's minimum over the twins, no gradient."""
    qbar = jax.lax.stop_gradient(jnp.min(target_q, axis=-1))
    f = value_objective(method, qbar - v[:, None], alpha=alpha, tau=tau, exp_clip_log=exp_clip_log)
    return jnp.mean(jnp.sum(f, axis=-1))
