"""The form that acts beside Pi0 itself: actions, guidance towards committed actions, and its mask."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from hvd.models import acting
from hvd.models.chunking import Committed, Given, soft_mask
from hvd.models.pi0 import Pi0
from hvd.models.separate import separate
from tests.models.conftest import MINI, observation

STEPS = 4


@cache
def moving(config):
    """A model whose every parameter counts, also those that start as zeros."""
    model = Pi0(config, nnx.Rngs(0))
    state = nnx.state(model)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    moved = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    nnx.update(model, jax.tree.unflatten(tree, moved))
    return model


def by_the_paper(model, obs, noise, committed, steps):
    """Black, Galliker, Levine 2025, algorithm 1, with tau from 0 (noise) to 1 (actions)."""

    @jax.jit
    def one(x, tau):
        def estimate(x):
            v = -model.velocity(obs, x, jnp.full(len(x), 1 - tau))  # from noise to actions
            return x + (1 - tau) * v, v

        guess, back, v = jax.vjp(estimate, x, has_aux=True)
        (g,) = back((committed.actions - guess) * committed.weights[..., None])
        r2 = (1 - tau) ** 2 / (tau**2 + (1 - tau) ** 2)
        return x + (v + jnp.minimum(5.0, (1 - tau) / (tau * r2)) * g) / steps

    x = noise
    for i in range(steps):
        x = one(x, jnp.float32(i / steps))
    return x


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_actions_are_drawn_towards_the_committed_ones(family):
    config = dataclasses.replace(MINI, family=family)
    model, obs = moving(config), observation(config)
    noise, old = jax.random.normal(jax.random.key(5), (2, 3, config.action_horizon, config.action_dim))
    masks = [soft_mask(4, 2, config.action_horizon), soft_mask(6, 0, config.action_horizon), np.zeros(6, np.float32)]
    committed = Committed(old, np.stack(masks))
    weights = separate(config, nnx.to_pure_dict(nnx.state(model)))
    act = jax.jit(lambda committed: acting.sample_actions(config, weights, obs, noise, STEPS, committed))
    free, drawn = act(None), act(committed)
    assert_allclose(free, jax.jit(model.sample_actions)(obs, noise, STEPS), rtol=1e-5, atol=1e-5)
    assert_allclose(drawn, by_the_paper(model, obs, noise, committed, STEPS), rtol=1e-4, atol=1e-4)
    assert_allclose(drawn[2], free[2], rtol=1e-5, atol=1e-5)  # a row that counts nothing
    assert np.abs(drawn - old)[0, :2].mean() < 0.5 * np.abs(free - old)[0, :2].mean()


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_given_actions_stay_and_are_at_their_own_time(family):
    config = dataclasses.replace(MINI, family=family)
    model, obs = moving(config), observation(config)
    noise, old = jax.random.normal(jax.random.key(5), (2, 3, config.action_horizon, config.action_dim))
    given = jnp.arange(config.action_horizon)[None] < jnp.array([2, 5, 0])[:, None]
    weights = separate(config, nnx.to_pure_dict(nnx.state(model)))

    @jax.jit
    def act(committed, climb=None):
        return acting.sample_actions(config, weights, obs, noise, STEPS, committed, climb)

    velocity, x = jax.jit(model.velocity), jnp.where(given[..., None], old, noise)
    for i in range(STEPS):
        v = velocity(obs, x, jnp.where(given, 0.0, 1 - i / STEPS))
        x = jnp.where(given[..., None], old, x - v / STEPS)
    got, free = act(Given(old, given)), act(None)
    assert_allclose(got, x, rtol=1e-5, atol=1e-5)
    assert_allclose(got[2], free[2], rtol=1e-5, atol=1e-5)  # a row that is given nothing
    assert np.abs(got - free)[0, 2:].max() > 1e-3  # the others depend on what is given


def test_a_flow_that_is_steered_leaves_given_actions_alone():
    model, obs = moving(MINI), observation(MINI)
    noise, old = jax.random.normal(jax.random.key(5), (2, 3, MINI.action_horizon, MINI.action_dim))
    given = jnp.arange(MINI.action_horizon)[None] < jnp.array([2, 5, 0])[:, None]
    weights = separate(MINI, nnx.to_pure_dict(nnx.state(model)))
    seen = []

    def steer(x, t, velocity):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x - t * velocity)
        return velocity + 1

    got = acting.sample_actions(MINI, weights, obs, noise, STEPS, Given(old, given), steer)
    for actions in (*seen, got):
        assert_allclose(actions[given], old[given], rtol=1e-6)
    assert len(seen) == STEPS


def test_more_flow_steps_than_are_embedded_at_once():
    model, obs = moving(MINI), observation(MINI)
    noise = jax.random.normal(jax.random.key(5), (3, MINI.action_horizon, MINI.action_dim))
    weights = separate(MINI, nnx.to_pure_dict(nnx.state(model)))
    act = jax.jit(lambda steps: acting.sample_actions(MINI, weights, obs, noise, steps))
    for steps in (1, acting.STEPS_AT_ONCE + 3):
        want = jax.jit(model.sample_actions)(obs, noise, jnp.int32(steps))
        assert_allclose(act(jnp.int32(steps)), want, rtol=1e-5, atol=1e-5)
        static = acting.sample_actions(MINI, weights, obs, noise, steps)
        assert_allclose(static, want, rtol=1e-5, atol=1e-5)


def test_what_is_over_counts_whole_and_the_rest_less_and_less():
    c = np.array([3 / 4, 2 / 4, 1 / 4])  # (left - i) / (left - delay + 1) for i = 2, 3, 4
    want = [1, 1, *(c * (np.exp(c) - 1) / (np.e - 1)), 0, 0, 0]
    assert_allclose(soft_mask(5, 2, 8), want, rtol=1e-6)
    assert soft_mask(8, 8, 8).tolist() == [1.0] * 8
