"""Weights in 8 bits: what they are, and that a policy acts by them as by the matrices that they stand for."""

import dataclasses
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from hvd.models import acting, gemma, int8, separate
from hvd.models.chunking import Committed, Given, soft_mask
from tests.models.conftest import MINI, observation
from tests.models.test_acting import STEPS, moving

CONFIG = dataclasses.replace(MINI, cameras=("base_0_rgb", "left_wrist_0_rgb"))


def whole(tree):
    """The same tree with the matrices that the numbers and scales stand for."""

    def of(x):
        return x.numbers * x.scale if isinstance(x, int8.Quantised) else x

    return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, int8.Quantised))


def test_each_output_has_a_scale_and_rounds_by_half_of_it():
    w = np.random.default_rng(0).normal(size=(64, 9)).astype(np.float32) * np.logspace(-3, 3, 9, dtype=np.float32)
    w[:, 4] = 0
    got = int8.quantised(jnp.asarray(w))
    assert got.numbers.dtype == jnp.int8 and got.scale.shape == (1, 9)
    assert_array_equal(np.abs(got.numbers).max(axis=0), np.where(np.arange(9) == 4, 0, 127))
    assert (np.abs(got.numbers * got.scale - w) <= 0.5001 * np.asarray(got.scale)).all()
    assert_array_equal(int8.quantised(-jnp.asarray(w)).numbers, -got.numbers)
    by_row = int8.quantised(jnp.asarray(w.T), axis=1)
    assert_array_equal(by_row.numbers, got.numbers.T)
    index = jnp.array([[8, 0], [3, 4]])
    assert_array_equal(int8.rows(by_row, index), (by_row.numbers * by_row.scale)[index])
    assert_array_equal(int8.rows(jnp.asarray(w), index), w[index])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_and_its_gradient_are_those_of_the_matrix(dtype):
    rng = np.random.default_rng(1)
    x, w = jnp.asarray(rng.normal(size=(2, 3, 32)), dtype), jnp.asarray(rng.normal(size=(32, 5)), jnp.float32)
    kept = int8.quantised(w)
    matrix, wide = kept.numbers * kept.scale, x.astype(jnp.float32)
    tolerance = {"atol": 1e-5} if dtype == "float32" else {"atol": 0.05, "rtol": 0.02}
    assert int8.dense(x, kept).dtype == dtype
    assert_allclose(int8.dense(x, kept).astype("float32"), wide @ matrix, **tolerance)
    slope = jax.grad(lambda x: int8.dense(x, kept).astype("float32").sum())(x).astype("float32")
    assert_allclose(slope, jnp.broadcast_to(matrix.sum(axis=1), x.shape), **tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_a_policy_acts_by_the_matrices_that_are_kept(family):
    """Also towards committed actions, which takes a backward pass, and from given ones."""
    config = dataclasses.replace(CONFIG, family=family)
    obs = observation(config)
    noise, old = jax.random.normal(jax.random.key(5), (2, 3, config.action_horizon, config.action_dim))
    given = jnp.arange(config.action_horizon)[None] < jnp.array([2, 5, 0])[:, None]
    soft = np.stack([soft_mask(n, 1, config.action_horizon) for n in (4, 6, 2)])
    params = nnx.to_pure_dict(nnx.state(moving(config)))
    full, kept = (separate.separate(config, jax.tree.map(jnp.array, params), in_8_bits) for in_8_bits in (False, True))
    act = jax.jit(lambda weights, told: acting.sample_actions(config, weights, obs, noise, STEPS, told))
    for told in (None, Committed(old, soft), Given(old, given)):
        got = act(kept, told)
        assert_allclose(got, act(whole(kept), told), rtol=1e-4, atol=1e-4)
        error = np.asarray(got - act(full, told))
        assert 1e-4 < np.sqrt(np.mean(error**2)) < 0.05 * np.sqrt(np.mean(np.square(got)))


def test_which_weights_are_kept_in_8_bits():
    weights = separate.separate(CONFIG, jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(moving(CONFIG)))), True)
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
        if leaf.dtype == jnp.int8
    ]
    llm = [f"expert/{i}/{name}" for i in (0, 1) for name in ("down", "gate_up", "out", "qkv")]
    llm += [f"trunk/{name}" for name in ("0/down", "0/gate_up", "0/out", "0/qkv", "1/kv")]
    image = [f"img/layers/0/{name}" for name in ("down", "out", "qkv", "up")]
    want = [f"PaliGemma/{name}/numbers" for name in (*image, "llm/embedding", *(f"llm/{name}" for name in llm))]
    assert sorted(names) == sorted(want)


def test_the_wide_matrices_are_given_back(monkeypatch):
    """A policy of some GB is never there twice: the image tower is freed before the first expert is
    quantised, and that one before the second."""
    params = jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(moving(CONFIG))))
    llm, img = params["PaliGemma"]["llm"], params["PaliGemma"]["img"]
    first = {name: part for name, part in llm["layers"]["attn"].items() if gemma.expert_of((name,)) == 0}
    matrices = [llm["embedder"], img["Transformer"]["encoderblock"], first, llm["layers"]["mlp"]]
    refs = [weakref.ref(leaf) for leaf in jax.tree.leaves(matrices)]
    del llm, img, first, matrices
    left, of_mlp = [], separate._of_mlp

    def watched(*args):  # traced once for each of the two experts
        left.append(sum(ref() is not None for ref in refs))
        return of_mlp(*args)

    monkeypatch.setattr(separate, "_of_mlp", watched)
    separate.separate(CONFIG, params, True)
    calls = len(left) // 2
    assert len(refs) > 12 and left[-1] == 0 and left[calls - 1] <= 5  # the first expert's own
