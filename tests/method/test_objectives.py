"""Closed-form checks of the value objectives (docs/method.md, last section)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize_scalar

from hvd.method.objectives import OBJECTIVES, q_loss, td_target, v_loss

NO_CLIP = 1e9


def bound(method, *, alpha=1.0, tau=0.7, exp_clip_log=NO_CLIP):
    """f of u alone."""
    p = {"alpha": alpha, "tau": tau, "exp_clip_log": exp_clip_log}
    return lambda u: OBJECTIVES[method].f(u, p)


def _naive(method, u, alpha, tau):
    if method == "exponential":
        return np.exp(alpha * u) - alpha * u
    weight = np.abs(tau - (u < 0))
    return weight * (u**2 if method == "expectile" else np.abs(u))


@pytest.mark.parametrize("method", ["exponential", "expectile", "quantile"])
@pytest.mark.parametrize(("alpha", "tau"), [(1.0, 0.7), (0.5, 0.9), (3.0, 0.5)])
def test_bandit_minimum(method, alpha, tau):
    """The V that minimises the mean of f over arms and levels is the known one."""
    q = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)

    def mean_f(v):
        f = bound(method, alpha=alpha, tau=tau)(jnp.asarray(q - v, jnp.float32))
        return float(np.asarray(f, np.float64).mean())

    expected = minimize_scalar(lambda v: _naive(method, q.astype(np.float64) - v, alpha, tau).mean(), bracket=(-1, 1)).x
    if method == "exponential":
        assert expected == pytest.approx(np.log(np.mean(np.exp(alpha * q.astype(np.float64)))) / alpha, abs=1e-5)
    around = [mean_f(expected + d) for d in (-0.05, 0.0, 0.05)]
    assert around[1] < around[0] and around[1] < around[2]
    gradient = jax.grad(
        lambda v: v_loss(
            jnp.full((40,), v), jnp.repeat(jnp.asarray(q)[..., None], 2, -1), bound(method, alpha=alpha, tau=tau)
        )
    )
    low, high = float(gradient(expected - 0.05)), float(gradient(expected + 0.05))
    assert low < 0 < high


def test_exponential_gradient_is_clipped_but_continuous():
    clip = float(np.log(6.0))

    f = bound("exponential", alpha=2.0, exp_clip_log=clip)
    slope = jax.vmap(jax.grad(f))(jnp.array([-1.0, 0.0, clip / 2 - 1e-4, clip / 2 + 1e-4, 5.0, 400.0]))
    np.testing.assert_allclose(slope[0], 2 * (np.exp(-2.0) - 1), rtol=1e-5)
    np.testing.assert_allclose(slope[1], 0.0, atol=1e-6)
    np.testing.assert_allclose(slope[2:], 2 * 5.0, rtol=1e-2)
    assert np.isfinite(float(f(jnp.float32(400.0))))


def test_td_target_and_q_loss():
    y = td_target(jnp.array([1.0, 0.5]), jnp.array([0.0, 0.81]), jnp.array([10.0, 2.0]))
    np.testing.assert_allclose(y, [1.0, 0.5 + 0.81 * 2.0], rtol=1e-6)
    q = jnp.zeros((2, 3, 2)).at[:, :, 1].set(2.0)
    expected = np.mean([3 * np.mean([float(t) ** 2, (float(t) - 2.0) ** 2]) for t in y])
    np.testing.assert_allclose(q_loss(q, y), expected, rtol=1e-6)
    assert float(jax.grad(lambda v: td_target(jnp.ones(1), jnp.ones(1), v).sum())(jnp.ones(1))[0]) == 0.0


def test_value_target_takes_the_lower_twin_and_no_gradient():
    target_q = jnp.array([[[1.0, -1.0], [3.0, 2.0]]])
    v = jnp.array([0.5])
    loss = v_loss(v, target_q, bound("expectile"))
    np.testing.assert_allclose(loss, 0.3 * 1.5**2 + 0.7 * 1.5**2, rtol=1e-6)
    gradient = jax.grad(lambda t: v_loss(v, t, bound("expectile")))(target_q)
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


# A chain of 3 states; an action is (parent, child), each 0 or 1. Parent 1 moves on; the last step pays by the child.
STATES, GAMMA, ALPHA = 3, 0.9, 8.0


def _transitions():
    rows = []
    for s in range(STATES):
        for parent in (0, 1):
            for child in (0, 1):
                ends = s == STATES - 1 and parent == 1
                reward = (1.0 if child else 0.25) if ends else 0.0
                rows.append((s, parent, child, reward, 0.0 if ends else GAMMA, min(s + parent, STATES - 1)))
    return [np.array(column) for column in zip(*rows, strict=True)]


def _expected_tables(levels):
    """Fixed point of the backward recursion V(s) = (1/alpha) log mean_{i,a} exp(alpha Q_i)."""
    s, parent, _, reward, discount, nxt = _transitions()
    v = np.zeros(STATES)
    for _ in range(3000):
        y = reward + discount * v[nxt]
        for state in range(STATES):
            here = s == state
            leaf = y[here]
            qs = [leaf]
            if levels == 2:
                by_parent = [y[here & (parent == p)].mean() for p in (0, 1)]
                qs.append(np.array([by_parent[p] for p in parent[here]]))
            v[state] = np.log(np.mean(np.exp(ALPHA * np.stack(qs)))) / ALPHA
    return v, reward + discount * v[nxt]


@pytest.mark.parametrize("levels", [1, 2])
def test_chain_converges_to_its_fixed_point(levels):
    """Gradient descent on our losses, with tables as the model, finds the recursion's values."""
    s, parent, child, reward, discount, nxt = (
        jnp.asarray(c, jnp.int32 if c.dtype.kind == "i" else jnp.float32) for c in _transitions()
    )
    expected_v, expected_q = _expected_tables(levels)
    tables = {"v": jnp.zeros(STATES), "leaf": jnp.zeros((STATES, 2, 2)), "parent": jnp.zeros((STATES, 2))}

    def loss(t):
        leaf = t["leaf"][s, parent, child]
        q = jnp.stack([t["parent"][s, parent], leaf] if levels == 2 else [leaf], axis=-1)
        q = jnp.repeat(q[..., None], 2, axis=-1)
        y = td_target(reward, discount, t["v"][nxt])
        return q_loss(q, y) + v_loss(t["v"][s], q, bound("exponential", alpha=ALPHA))

    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 6000, 0.01))

    def step(carry, _):
        t, state = carry
        updates, state = optimizer.update(jax.grad(loss)(t), state)
        return (optax.apply_updates(t, updates), state), None

    with jax.numpy_dtype_promotion("standard"):  # optax counts its steps in int32
        (tables, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=6000))((tables, optimizer.init(tables)))
    np.testing.assert_allclose(tables["v"], expected_v, atol=5e-3)
    np.testing.assert_allclose(tables["leaf"][s, parent, child], expected_q, atol=5e-3)
    if levels == 2:
        means = [
            float(expected_q[(np.asarray(s) == st) & (np.asarray(parent) == p)].mean())
            for st in range(STATES)
            for p in (0, 1)
        ]
        np.testing.assert_allclose(tables["parent"].reshape(-1), means, atol=5e-3)
    assert np.all(np.diff(expected_v) > 0)  # nearer to the reward is worth more
