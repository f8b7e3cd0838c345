"""The value model: who sees which actions, what must not matter, and the flat Q as a hierarchy of one level."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from hvd.configs import ModelConfig
from hvd.errors import UserError
from hvd.models.value import ValueModel
from tests.models.conftest import MINI, observation

LEVELS = ((3, 4), (0, 6), (1, 2, 5))  # dim 7 is padding
BATCH = 3
MASK = jnp.ones((BATCH, MINI.action_horizon), bool).at[1, 4:].set(False)


@cache
def model(config: ModelConfig = MINI, levels=LEVELS) -> ValueModel:
    return ValueModel(config, levels, nnx.Rngs(1))


@cache
def compiled(config: ModelConfig = MINI, levels=LEVELS):
    """(params, obs, actions, mask) -> V, Q; parameters as an argument, so that changed ones need no new compilation."""
    graphdef, params = nnx.split(model(config, levels))
    return params, jax.jit(lambda params, obs, a, m: nnx.merge(graphdef, params)(obs, a, m))


@pytest.fixture(scope="module")
def actions():
    return jax.random.normal(jax.random.key(7), (BATCH, MINI.action_horizon, MINI.action_dim))


@pytest.fixture(scope="module")
def obs():
    return observation(MINI, BATCH)


@pytest.fixture(scope="module")
def influence(obs, actions):
    """|d output / d action|, summed over rows and steps: [outputs, action_dim], outputs = V, then twins of Q_0.. ."""
    graphdef, params = nnx.split(model())

    def outputs(a):
        v, q = nnx.merge(graphdef, params)(obs, a, MASK)
        return jnp.concatenate([v[:, None], q.reshape(BATCH, -1)], axis=1).sum(axis=0)

    return np.abs(jax.jit(jax.jacrev(outputs))(actions))


def test_shapes_and_twins_differ(obs, actions):
    params, run = compiled()
    v, q = run(params, obs, actions, MASK)
    assert v.shape == (BATCH,) and q.shape == (BATCH, len(LEVELS), 2)
    assert v.dtype == q.dtype == jnp.float32
    assert np.abs(np.asarray(q[..., 0] - q[..., 1])).min() > 0


def test_a_child_never_influences_its_parents_nor_v(influence):
    per_dim = influence.sum(axis=(1, 2))  # [outputs, action_dim]
    assert_array_equal(per_dim[0], 0)
    for i in range(len(LEVELS)):
        seen = [d for level in LEVELS[: i + 1] for d in level]
        hidden = [d for d in range(MINI.action_dim) if d not in seen]
        for twin in range(2):
            row = per_dim[1 + 2 * i + twin]
            assert np.all(row[seen] > 0)
            assert_array_equal(row[hidden], 0)


def test_masked_actions_do_not_matter(influence, obs, actions):
    gone = ~np.asarray(MASK)
    assert_array_equal(influence[:, gone], 0)
    assert np.all(influence[1:, ~gone].sum(axis=-1) > 0)
    params, run = compiled()
    want = run(params, obs, actions, MASK)
    got = run(params, obs, jnp.where(MASK[..., None], actions, jnp.nan), MASK)
    jax.tree.map(assert_array_equal, got, want)
    changed = run(params, obs, actions, MASK.at[1].set(True))
    assert np.abs(np.asarray(changed[1] - want[1])[1]).min() > 0  # the model is told which actions are real


def test_state_value_is_the_v_of_the_full_call(obs, actions):
    params, run = compiled()
    assert_allclose(jax.jit(model().state_value)(obs), run(params, obs, actions, MASK)[0], rtol=1e-5, atol=1e-6)


def test_permuting_dims_within_a_level(obs, actions):
    """Other dims in the same places: the projection's rows permuted alike give the same values everywhere."""
    params, run = compiled()
    order = (2, 0, 1)  # of the third level's dims
    levels = (*LEVELS[:2], tuple(LEVELS[2][j] for j in order))
    graphdef, _ = nnx.split(model(MINI, levels))
    pure = nnx.to_pure_dict(params)
    kernel = pure["level_proj"][2]["kernel"]
    width = len(LEVELS[2]) + 1
    rows = [step * width + j for step in range(MINI.action_patch) for j in (*order, width - 1)]
    pure["level_proj"][2]["kernel"] = kernel[jnp.asarray(rows)]
    got = jax.jit(nnx.merge(graphdef, pure))(obs, actions, MASK)
    want = run(params, obs, actions, MASK)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_flat_q_is_a_hierarchy_of_one_level(obs, actions):
    """Level 0 of a hierarchy reads exactly what a model of that level alone computes with the same parameters."""
    params, run = compiled()
    pure = nnx.to_pure_dict(params)
    pure["level_proj"] = {0: pure["level_proj"][0]}
    pure["q_tokens"] = pure["q_tokens"][:1]
    pure["q_heads"] = {name: x[:2] for name, x in pure["q_heads"].items()}
    flat = nnx.merge(nnx.split(model(MINI, LEVELS[:1]))[0], pure)
    v, q = jax.jit(flat)(obs, actions, MASK)
    want_v, want_q = run(params, obs, actions, MASK)
    assert_allclose(v, want_v, rtol=1e-5, atol=1e-6)
    assert_allclose(q[:, 0], want_q[:, 0], rtol=1e-5, atol=1e-6)


def test_images_and_bfloat16(actions):
    config = dataclasses.replace(MINI, cameras=("base", "wrist"), dtype="bfloat16")
    images = observation(config, BATCH)
    run = jax.jit(model(config))
    v, q = run(images, actions, MASK)
    assert v.dtype == q.dtype == jnp.float32
    changed = dict(images, images={name: 255 - x for name, x in images["images"].items()})
    assert np.all(np.asarray(run(changed, actions, MASK)[0] != v))
    # the last row's wrist image is masked
    hidden = dict(images, images=dict(images["images"], wrist=255 - images["images"]["wrist"]))
    changed_v = np.asarray(run(hidden, actions, MASK)[0] != v)
    assert_array_equal(changed_v, [True, True, False])


@pytest.mark.parametrize(
    "config, text",
    [
        (dataclasses.replace(MINI, value_expert_variant="gemma_300m"), "must share depth: 2 and 18"),
        (dataclasses.replace(MINI, value_expert_variant="tinny"), "nearest: tiny"),
    ],
)
def test_mistakes_in_the_config(config, text):
    with pytest.raises(UserError, match=text):
        nnx.eval_shape(lambda: ValueModel(config, LEVELS, nnx.Rngs(0)))
