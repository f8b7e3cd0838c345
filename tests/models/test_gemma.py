"""The mixture by itself: caches, conditions, low-rank updates, and queries that see nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from hvd.errors import UserError
from hvd.models import attention, gemma
from hvd.models.lora import Einsum, FeedForward, LoraConfig
from hvd.models.trunk import attention_mask, token_positions

A = gemma.Config(width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
B = dataclasses.replace(A, width=24, cond_width=10)
FULL_HEADS = dataclasses.replace(A, num_kv_heads=2)  # as many keys as queries: one qkv projection


def random(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def with_random_zeros(module):
    """Parameters that start at zero, random instead: adaptive norms and low-rank updates then do something."""
    graphdef, state = nnx.split(module)
    keys = iter(jax.random.split(jax.random.key(3), 1_000))
    leaves = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), nnx.to_pure_dict(state))
    return nnx.merge(graphdef, leaves)


@pytest.mark.parametrize("configs", [(A, B), (FULL_HEADS, FULL_HEADS)], ids=["grouped", "full"])
def test_decoding_with_a_cache_equals_the_joint_pass(configs):
    model = with_random_zeros(gemma.Gemma(configs, 16, jnp.dtype("float32"), nnx.Rngs(0)))
    x_a, x_b = random(2, 4, configs[0].width), random(2, 3, configs[1].width)
    conds = [None, random(2, 10) if configs[1].cond_width else None]
    valid = jnp.ones((2, 7), bool).at[1, 2:4].set(False)
    starts = np.array([False] * 4 + [True, True, False])
    mask, positions = attention_mask(valid, starts), token_positions(valid)
    run = jax.jit(model.__call__)
    (a, b), _ = run([x_a, x_b], positions, mask, conds)
    (prefix, _), cache = run([x_a, None], positions[:, :4], mask[:, :4, :4], conds)
    (_, suffix), _ = run([None, x_b], positions[:, 4:], mask[:, 4:], conds, cache)
    assert_allclose(prefix[valid[:, :4]], a[valid[:, :4]], rtol=1e-4, atol=1e-5)
    assert_allclose(suffix, b, rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_nothing_gives_finite_numbers():
    q, kv = random(1, 2, 2, 8), random(1, 3, 1, 8)
    out = attention.attend(q, kv, kv, jnp.zeros((1, 2, 3), bool))
    assert_allclose(out, jnp.broadcast_to(kv.mean(axis=1, keepdims=True), out.shape), rtol=1e-5, atol=1e-6)


def test_a_fresh_adaptive_norm_is_plain_and_closes_the_gate():
    x = random(2, 3, 16)
    out, gate = gemma.RMSNorm(16, nnx.Rngs(0), cond_width=10)(x, random(2, 10))
    assert_allclose(out, x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True)), rtol=1e-5)
    assert_array_equal(gate, 0)
    with pytest.raises(ValueError, match="needs a condition"):
        gemma.RMSNorm(16, nnx.Rngs(0), cond_width=10)(x)


def test_rope_depends_on_distance_only():
    q, k = random(1, 1, 1, 8), random(1, 1, 1, 8)

    def score(i, j):
        turned = [gemma.rotate(x, *gemma.rope_angles(jnp.array([[p]]), 8)) for x, p in ((q, i), (k, j))]
        return jnp.sum(turned[0] * turned[1])

    assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


@pytest.mark.parametrize("rslora, scale", [(False, 6.0 / 4), (True, 6.0 / 2)])
def test_low_rank_updates(rslora, scale):
    lora = LoraConfig(rank=4, alpha=6.0, rslora=rslora)
    assert lora.scale == scale
    fresh = Einsum((2, 16, 8), 16, lora, nnx.Rngs(0))
    x = random(1, 3, 16)
    plain = jnp.einsum("btd,ndh->btnh", x, fresh.w[...])
    assert_allclose(fresh("btd,ndh->btnh", x), plain, rtol=1e-5, atol=1e-6)
    dense = with_random_zeros(fresh)
    merged = dense.w[...] + scale * jnp.einsum("ndr,nrh->ndh", dense.lora_a[...], dense.lora_b[...])
    assert_allclose(dense("btd,ndh->btnh", x), jnp.einsum("btd,ndh->btnh", x, merged), rtol=1e-4, atol=1e-5)


def test_low_rank_updates_of_the_feed_forward():
    lora = LoraConfig(rank=4, alpha=6.0)
    fresh = FeedForward(16, 32, lora, nnx.Rngs(0))
    x = random(1, 3, 16)
    plain = FeedForward(16, 32, None, nnx.Rngs(0))
    plain.gating_einsum[...], plain.linear[...] = fresh.gating_einsum[...], fresh.linear[...]
    assert_allclose(fresh(x), plain(x), rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(with_random_zeros(fresh)(x) - fresh(x))).max() > 1e-3


def test_experts_must_share_their_heads():
    with pytest.raises(UserError, match="share num_kv_heads: 1 and 2"):
        gemma.Gemma([A, FULL_HEADS], 16, jnp.dtype("float32"), nnx.Rngs(0))
    with pytest.raises(UserError, match=r"unknown gemma variant 'gemma_2B'; nearest: gemma_2b"):
        gemma.get_config("gemma_2B")
