"""The forms of attention: they agree, and each is taken where it can be."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from hvd.models import attention


def random(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).normal(size=shape), dtype)


def language(t, s, cached=0, batch=3, heads=4, size=8, dtype=jnp.float32):
    """Inputs of `attend`; every query sees some key."""
    q, k, v = (random(batch, n, h, size, seed=i, dtype=dtype) for i, (n, h) in enumerate(((t, heads), (s, 1), (s, 1))))
    cache = tuple(random(batch, cached, 1, size, seed=i, dtype=dtype) for i in (3, 4)) if cached else None
    mask = np.random.default_rng(0).random((batch, t, cached + s)) < 0.6
    mask[..., 0] = True
    return q * size**-0.5, k, v, jnp.asarray(mask), cache


@pytest.mark.parametrize("cached", [0, 5], ids=["alone", "cached"])
def test_row_by_row_is_the_same(cached):
    inputs = language(6, 7, cached)

    def gradients(form):
        def total(q, k, v):
            return jnp.sum(jnp.sin(form(q, k, v, *inputs[3:])))

        return jax.value_and_grad(total, argnums=(0, 1, 2))(*inputs[:3])

    def by_rows():
        return "scan" in str(jax.make_jaxpr(lambda *x: attention.attend_rows(*x, *inputs[3:]))(*inputs[:3]))

    assert not by_rows(), "few logits are made at once"
    want = gradients(attention.attend)
    with mock.patch.object(attention, "ROW_BY_ROW", 0):
        assert by_rows()
        got = gradients(attention.attend_rows)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


# What cuDNN computes by the documentation of jax.nn.dot_product_attention, in a form that a CPU has too
ON_A_CPU = functools.partial(jax.nn.dot_product_attention)


@pytest.mark.parametrize("t, s, cached", [(6, 8, 0), (7, 9, 0), (3, 5, 4), (3, 4, 4)])
def test_padding_and_mask_of_the_fused_form(t, s, cached):
    """Odd numbers of queries and keys are padded; on a CPU the fused call is replaced by XLA's."""
    inputs = language(t, s, cached)
    seen = []

    def fused(q, k, v, *, implementation, **options):
        seen.append((implementation, q.shape[1] % 2, k.shape[1] % 2, v.shape[1] % 2))
        return ON_A_CPU(q, k, v, **options)

    with mock.patch.object(jax.nn, "dot_product_attention", fused):
        got = attention.attend_cudnn(*inputs)
    assert seen == [("cudnn", 0, 0, 0)]
    assert_allclose(got, attention.attend(*inputs), rtol=1e-5, atol=1e-6)


def test_the_image_towers_fused_form():
    q, k, v = (random(2, 6, 3, 8, seed=i) for i in range(3))

    def fused(*inputs, implementation, **options):
        assert implementation == "cudnn"
        return ON_A_CPU(*inputs, **options)

    with mock.patch.object(jax.nn, "dot_product_attention", fused):
        got = attention.attend_all_cudnn(q, k, v)
    assert_allclose(got, attention.attend_all(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind, part, dtype, size, capability, want",
    [
        ("auto", "images", jnp.bfloat16, 72, (8, 0), "cudnn"),
        ("auto", "language", jnp.bfloat16, 256, (9, 0), "xla"),
        ("cudnn", "language", jnp.bfloat16, 256, (9, 0), "cudnn"),
        ("cudnn", "language", jnp.bfloat16, 256, (8, 6), "xla"),
        ("cudnn", "language", jnp.bfloat16, 128, (8, 6), "cudnn"),
        ("cudnn", "images", jnp.float32, 72, (9, 0), "xla"),
        ("cudnn", "images", jnp.bfloat16, 70, (9, 0), "xla"),
        ("xla", "images", jnp.bfloat16, 72, (9, 0), "xla"),
    ],
)
def test_which_form_is_taken_on_a_gpu(kind, part, dtype, size, capability, want):
    with (
        mock.patch.object(attention.sharding, "platform", lambda: "gpu"),
        mock.patch.object(attention, "_capability", lambda: capability),
    ):
        assert attention.choose(kind, part, jnp.dtype(dtype), size) == want
    on_cpu = "rows" if (kind, part) == ("auto", "language") else "xla"
    assert attention.choose(kind, part, jnp.dtype(dtype), size) == on_cpu


@pytest.mark.gpu
@pytest.mark.parametrize("t, s, size", [(837, 837, 256), (21, 837, 256), (21, 837, 64)])
def test_cudnn_computes_the_same(t, s, size):
    inputs = language(t, s, heads=8, size=size, dtype=jnp.bfloat16)

    def gradients(form):
        def total(q, k, v):
            return jnp.sum(form(q, k, v, *inputs[3:]).astype(jnp.float32) ** 2)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*inputs[:3])

    for ours, theirs in zip(
        *(jax.tree.leaves(gradients(f)) for f in (attention.attend, attention.attend_cudnn)), strict=True
    ):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert_allclose(theirs, ours, rtol=2e-2, atol=2e-2 * np.abs(ours).max())
