"""omega(A) against high-precision arithmetic, its limits and its safety in low precision."""

import dataclasses
from decimal import Decimal, localcontext

import jax.numpy as jnp
import numpy as np
import pytest

from hvd.experiments import get_config
from hvd.method import weights
from hvd.method.objectives import OBJECTIVES
from hvd.method.weights import WEIGHTINGS, advantages


def omega(a, weighting, method, *, alpha=1.0, clip=100.0):
    """The weights of a config with these fields, tau 0.7 and beta 3."""
    cfg = get_config("demo")
    model = dataclasses.replace(cfg.model, method=method, alpha=alpha, tau=0.7)
    policy = dataclasses.replace(cfg.policy, weighting=weighting, beta=3.0, weight_clip=clip)
    return weights.omega(a, dataclasses.replace(cfg, model=model, policy=policy))


def _exact(a: float, alpha: float) -> float:
    with localcontext() as context:
        context.prec = 60
        a_, alpha_ = Decimal(a), Decimal(alpha)
        return float(alpha_**2 if a == 0 else alpha_ * ((alpha_ * a_).exp() - 1) / a_)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 1.5])
def test_exponential_weight_is_exact_over_the_range(alpha):
    a = np.concatenate(
        [np.linspace(-50, 50, 401), 10.0 ** np.arange(-12, 1), -(10.0 ** np.arange(-12, 1)), [0.0]]
    ).astype(np.float32)
    got = omega(jnp.asarray(a), "hvd", "exponential", alpha=alpha, clip=np.inf)
    expected = np.array([_exact(float(x), float(np.float32(alpha))) for x in a])
    # an error of 1e-7 in alpha * A is one of 1e-7 * |alpha A| in the exponential
    np.testing.assert_allclose(got, expected, rtol=2e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("method", OBJECTIVES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_are_positive_finite_and_clipped(weighting, method, dtype):
    a = jnp.asarray(np.concatenate([np.linspace(-50, 50, 101), [0.0, 1e30, -1e30, 1e-30]]), dtype)
    w = np.asarray(omega(a, weighting, method))
    assert w.dtype == np.float32
    assert np.all(np.isfinite(w)) and np.all(w <= 100.0) and np.all(w >= 0)
    inside = np.abs(np.asarray(a, np.float32)) <= 25  # exp(-3 * 30) is 0 in float32
    assert np.all(w[inside] > 0)


def test_known_weights():
    """docs/method.md: A = -3 -> 0.317, A = +3 -> 6.36 (alpha 1); expectile and quantile by their formulas."""
    a = jnp.array([-3.0, 3.0])
    np.testing.assert_allclose(omega(a, "hvd", "exponential"), [0.317, 6.36], rtol=2e-3)
    np.testing.assert_allclose(omega(a, "hvd", "expectile"), [0.3, 0.7], rtol=1e-6)
    np.testing.assert_allclose(omega(a, "hvd", "quantile"), [0.1, 0.7 / 3], rtol=1e-6)
    np.testing.assert_allclose(omega(a / 3, "awr", "exponential"), np.exp([-3.0, 3.0]), rtol=1e-5)


def test_advantages_use_the_lower_twin():
    v = jnp.array([1.0])
    q = jnp.array([[[2.0, 1.5], [4.0, 5.0], [3.0, 2.0]]])
    np.testing.assert_allclose(advantages(v, q), [[0.5, 3.0, 1.0]])
    np.testing.assert_allclose(advantages(v, q, "marginal"), [[0.5, 2.5, -2.0]])
