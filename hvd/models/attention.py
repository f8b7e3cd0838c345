"""Attention: our own form for XLA, cuDNN's fused kernels, and which of them is taken where.

What cuDNN (9.10 or newer, through jax.nn.dot_product_attention) can do, found by compiling for H100:

    condition                                            else
    bfloat16 or float16                                  XLA
    head size a multiple of 8, at most 128               XLA; at most 256 on Hopper and later (trunk and experts: 256)
    with a mask: even numbers of queries and keys        one padded query or key is added, and its output dropped

A mask becomes an additive bias there, so a query that sees nothing gets a uniform softmax over all keys, as in ours.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from hvd.accelerators import of_kind
from hvd.models import sharding

Kind = Literal["auto", "xla", "cudnn"]
Form = Literal["xla", "rows", "cudnn"]
ROW_BY_ROW = 32 << 20  # bytes of logits from which on attend_rows takes the rows of a batch one at a time
MASKED_LOGIT = -2.3819763e38  # finite, so that a row without any valid key gives finite numbers


Queries = Float[Array, "b t n h"]
Keys = Float[Array, "b s k h"]  # and values
Old = Float[Array, "b p k h"]  # keys and values of earlier tokens
Mask = Bool[Array, "b t p_s"]
Images = Float[Array, "n t h s"]  # queries, keys or values of images


def choose(kind: Kind, part: Literal["images", "language"], dtype: jnp.dtype, head_dim: int) -> Form:
    """The form that `kind` (ModelConfig.attention) means for a part of the model on the platform compiled for.

    "auto" is XLA on a CPU; where that is a single one, row by row for the language model. On a GPU it is cuDNN for the
    image tower and XLA for the language model: on an H200 the other choice takes 1.8 and 1.2 times as long (forward and
    backward, BENCHMARKS.md). A plan made without the device (`hvd plan`) could not compile cuDNN's kernel for heads of
    256 and would show another program's memory.
    "cudnn" is cuDNN wherever the table above allows it.
    """
    if sharding.platform() != "gpu":
        return "rows" if kind == "auto" and part == "language" and not sharding.distributed() else "xla"
    if kind == "xla" or (kind == "auto" and part == "language"):
        return "xla"
    limit = 256 if _capability() >= (9, 0) else 128
    fits = dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= limit
    return "cudnn" if fits else "xla"


def _capability() -> tuple[int, int]:
    """CUDA compute capability of the GPUs of this process; (0, 0) without any, as when compiling for absent ones."""
    if jax.default_backend() != "gpu":
        return 0, 0
    device = jax.local_devices()[0]
    known = of_kind(device.device_kind)
    return known.capability if known else (0, 0)


@jax.custom_vjp
def _logits(q: Float[Array, "b k r h"], keys: Keys) -> Float[Array, "b k r s"]:
    """Products of queries and keys in float32. Their gradient is cast to q's dtype before it meets q and k.

    Otherwise it meets them in float32: on an H200 those two products then take 4 % of a step's time, now 1.6 %.
    """
    return jnp.einsum("bkrh,bskh->bkrs", q, keys, preferred_element_type=jnp.float32)


def _logits_forward(q: Array, keys: Array) -> tuple[Array, tuple[Array, Array]]:
    return _logits(q, keys), (q, keys)


def _logits_backward(saved: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    q, keys = saved
    d = d.astype(q.dtype)
    return jnp.einsum("bkrs,bskh->bkrh", d, keys), jnp.einsum("bkrs,bkrh->bskh", d, q)


_logits.defvjp(_logits_forward, _logits_backward)


def attend(q: Queries, k: Keys, v: Keys, mask: Mask, cache: tuple[Old, Old] | None = None) -> Queries:
    """Grouped-query attention of already scaled queries; softmax in float32, masked logits MASKED_LOGIT.

    `cache` holds keys and values that come before k and v; they are not concatenated with them, only their logits are
    (n_steps of denoising read one cache).
    """
    b, t, n, h = q.shape
    heads, group = k.shape[2], n // k.shape[2]
    # Queries that share a key head become rows of one matrix: twice as fast on a CPU as a five-dimensional einsum.
    q = q.reshape(b, t, heads, group, h).swapaxes(1, 2).reshape(b, heads, t * group, h)

    scores = _logits(q, k) if cache is None else jnp.concatenate([_logits(q, cache[0]), _logits(q, k)], axis=-1)
    scores = jnp.where(jnp.repeat(mask, group, axis=1)[:, None], scores, MASKED_LOGIT)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if cache is None:
        out = jnp.einsum("bkrs,bskh->bkrh", probs, v)
    else:
        p = cache[0].shape[1]
        out = jnp.einsum("bkrs,bskh->bkrh", probs[..., :p], cache[1])
        out = out + jnp.einsum("bkrs,bskh->bkrh", probs[..., p:], v)
    return out.reshape(b, heads, t, group, h).swapaxes(1, 2).reshape(b, t, n, h)


def attend_rows(q: Queries, k: Keys, v: Keys, mask: Mask, cache: tuple[Old, Old] | None = None) -> Queries:
    """`attend`, with the logits of one row of the batch at a time where they are large, made again when going back.

    A fraction of the memory at the same speed on a CPU, which has no kernel that fuses all of it.
    """
    if 4 * q.shape[0] * q.shape[2] * mask.shape[1] * mask.shape[2] <= ROW_BY_ROW:
        return attend(q, k, v, mask, cache)
    inputs = jax.tree.map(lambda x: x[:, None], (q, k, v, mask, cache))
    return jax.lax.map(jax.checkpoint(lambda row: attend(*row)), inputs)[:, 0]


def attend_cudnn(q: Queries, k: Keys, v: Keys, mask: Mask, cache: tuple[Old, Old] | None = None) -> Queries:
    """The same by cuDNN's fused kernel; the cache is concatenated."""
    if cache is not None:
        k, v = (jnp.concatenate([old, new], axis=1) for old, new in zip(cache, (k, v), strict=True))
    t, s = q.shape[1], k.shape[1]
    q = jnp.pad(q, ((0, 0), (0, t % 2), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, s % 2), (0, 0), (0, 0))) for x in (k, v))
    mask = jnp.pad(mask, ((0, 0), (0, t % 2), (0, s % 2)))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=1.0, implementation="cudnn")
    return out[:, :t]


def attend_all(q: Images, k: Images, v: Images) -> Images:
    """Attention of already scaled queries without a mask; softmax in float32."""
    logits = jnp.einsum("nths,nuhs->nhtu", q, k, preferred_element_type=jnp.float32)
    return jnp.einsum("nhtu,nuhs->nths", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v)


def attend_all_cudnn(q: Images, k: Images, v: Images) -> Images:
    """The same by cuDNN's fused kernel."""
    return jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation="cudnn")


FORMS: dict[Form, Callable[..., Array]] = {"xla": attend, "rows": attend_rows, "cudnn": attend_cudnn}
