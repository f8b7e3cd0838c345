"""Norms, rotary embedding, masks, attention, feed-forward and the mixture against openpi's arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from hvd.models import gemma
from hvd.models.lora import FeedForward
from hvd.models.trunk import attention_mask
from tests.models.golden import below, build, cases, close, dtype, gemma_config, load, lora_config, need, num_experts

pytestmark = pytest.mark.optimised

BF16_ULP = 2.0**-7


def rounds_to(actual, expected):
    """At most one unit in the last place of bfloat16 apart."""
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, rtol=BF16_ULP, atol=1e-6)


@cases("rmsnorm*.npz")
def test_rmsnorm(case):
    a = load(case)
    if "scale" in a:
        norm = build(partial(gemma.RMSNorm, a["x"].shape[-1]), {"scale": a["scale"]})
        out, gate = norm(jnp.asarray(a["x"]))
        close(out, a["out"])
        assert gate is None
        if "out_bf16" in a:
            rounds_to(norm(jnp.asarray(a["x"], jnp.bfloat16))[0], a["out_bf16"])
    if "ada_out" in a:
        make = partial(gemma.RMSNorm, a["x"].shape[-1], cond_width=a["cond"].shape[-1])
        norm = build(make, {"Dense_0/kernel": a["dense_kernel"], "Dense_0/bias": a["dense_bias"]})
        out, gate = norm(jnp.asarray(a["x"]), jnp.asarray(a["cond"]))
        close(out, a["ada_out"])
        close(gate, a["ada_gate"])


@cases("rope*.npz")
def test_rope(case):
    a = load(case)
    for name in [name for name in a if name == "x" or name.startswith("x_")]:
        suffix = name[1:]
        x = jnp.asarray(a[name])
        angles = gemma.rope_angles(jnp.asarray(a[f"positions{suffix}"]), x.shape[-1])
        close(gemma.rotate(x, *angles), a[f"out{suffix}"])
        if f"out_bf16{suffix}" in a:
            rounds_to(gemma.rotate(x.astype(jnp.bfloat16), *angles), a[f"out_bf16{suffix}"])


@cases("attn_mask*.npz")
def test_attention_mask(case):
    a = load(case)
    for name in [name for name in a if name.startswith("ar_")]:
        mask = attention_mask(jnp.asarray(a["input_mask"]), a[name].astype(bool))
        assert_array_equal(mask, a[f"mask_{name.removeprefix('ar_')}"])


@cases("attention_*.npz")
def test_attention(case):
    a = load(case)
    params = below(a, "p/")
    config = gemma_config(case, params, stacked=False)
    attention = build(partial(gemma.Attention, [config]), params)
    mask = a["mask"][:, 0]
    valid = mask.any(axis=-1)  # a query without any key is padding
    angles = gemma.rope_angles(jnp.asarray(a["positions"], jnp.int32), config.head_dim)
    outs, (k, v) = attention([jnp.asarray(a["x"], dtype(case))], angles, jnp.asarray(mask))
    close(outs[0], a["out"], case, valid)
    close(k, a["k"], case)
    close(v, a["v"], case)


@cases("ffn_*.npz")
def test_feed_forward(case):
    a = load(case)
    params = below(a, "p/")
    hidden, width = params["linear"].shape
    lora = params.get("linear_lora_a")
    lora = None if lora is None else lora_config(case, lora.shape[-1])
    close(build(partial(FeedForward, width, hidden, lora), params)(jnp.asarray(a["x"], dtype(case))), a["out"], case)


@cases("embedder*.npz")
def test_embedder(case):
    a = load(case)
    embedder = build(partial(gemma.Embedder, *a["table"].shape), {"input_embedding": a["table"]})
    close(embedder(jnp.asarray(a["tokens"])), a["out"])


@cases("mixture_*.npz")
def test_mixture(case):
    a = load(case)
    need(a, "out_a", "out_b")
    params = below(a, "p/")
    configs = [gemma_config(case, params, i) for i in range(num_experts(params))]
    vocab = params["embedder/input_embedding"].shape[0]
    model = build(partial(gemma.Gemma, configs, vocab, jnp.dtype(dtype(case))), params)
    cond = jnp.asarray(a["cond"]) if "cond" in a else None
    conds = [cond if c.cond_width else None for c in configs]
    x_a, x_b = jnp.asarray(a["x_a"]), jnp.asarray(a["x_b"])
    positions, mask = jnp.asarray(a["positions"], jnp.int32), jnp.asarray(a["mask"])
    split, valid = x_a.shape[1], a["input_mask"]

    run = jax.jit(lambda *args, **kwargs: model(*args, **kwargs))
    (out_a, out_b), (k, v) = run([x_a, x_b], positions, mask, conds)
    close(out_a, a["out_a"], case, valid[:, :split])
    close(out_b, a["out_b"], case, valid[:, split:])
    close(k.swapaxes(0, 1).swapaxes(1, 2), np.moveaxis(a["k"], 0, 2), case, valid)
    close(v.swapaxes(0, 1).swapaxes(1, 2), np.moveaxis(a["v"], 0, 2), case, valid)

    (prefix, none), cache = run([x_a, None], positions[:, :split], jnp.asarray(a["prefix_mask"]), conds)
    assert none is None
    close(prefix, a["prefix_out"], case, valid[:, :split])
    for ours, name in zip(cache, ("cache_k", "cache_v"), strict=True):
        close(np.moveaxis(ours, 0, 2), np.moveaxis(a[name], 0, 2), case, valid[:, :split])

    suffix_positions = jnp.asarray(a["suffix_positions"], jnp.int32)
    (none, suffix), _ = run([None, x_b], suffix_positions, jnp.asarray(a["suffix_mask"]), conds, cache)
    assert none is None
    close(suffix, a["suffix_out_with_cache"], case, valid[:, split:])
