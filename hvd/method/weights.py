"""From values to the weights of the policy loss, one per kinematic level. Letters: b rows, l levels, 2 twin heads."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from hvd.configs import Method, Weighting


def advantages(
    v: Float[Array, "b"], q: Float[Array, "b l 2"], kind: Literal["q_minus_v", "marginal"] = "q_minus_v"
) -> Float[Array, "b l"]:
    """A_i = Q_i - V, Q_i the minimum over the twins; "marginal": Q_i - Q_{i-1} with Q_{-1} = V (an ablation)."""
    q_min = jnp.min(q, axis=-1)
    if kind == "marginal":
        return jnp.diff(q_min, axis=-1, prepend=v[:, None])
    return q_min - v[:, None]


def omega(
    a: Float[Array, "*s"],
    weighting: Weighting,
    method: Method,
    *,
    alpha: float,
    tau: float,
    beta: float,
    clip: float,
) -> Float[Array, "*s"]:
    """Weight of the flow-matching error for advantage `a`, elementwise, in float32; always > 0 and at most `clip`.

    hvd: |f'(A)| / |A| of the value objective (IDQL's identity; docs/method.md, second misprint corrected): exponential
    alpha expm1(alpha A) / A with limit alpha^2 at 0, expectile |tau - 1{A<0}|, quantile |tau - 1{A<0}| / |A|.
    awr: exp(beta A). none: 1 (imitation).
    """
    a = a.astype(jnp.float32)
    if weighting == "none":
        return jnp.ones_like(a)
    if weighting == "awr":
        # exp of more than 80 is past every sensible clip and would overflow float32 at 88
        return jnp.minimum(jnp.exp(jnp.minimum(beta * a, 80.0)), clip)
    if method == "exponential":
        x = jnp.minimum(alpha * a, 80.0)
        small = jnp.abs(x) < 1e-2
        series = 1.0 + x * (1 / 2 + x * (1 / 6 + x / 24))
        ratio = jnp.where(small, series, jnp.expm1(x) / jnp.where(small, 1.0, x))
        return jnp.minimum(alpha**2 * ratio, clip)
    asymmetry = jnp.abs(tau - (a < 0).astype(jnp.float32))
    if method == "expectile":
        return jnp.minimum(asymmetry, clip)
    return jnp.minimum(asymmetry / jnp.maximum(jnp.abs(a), 1e-6), clip)
