"""A mixture of Gemma experts that attend jointly (PaliGemma trunk + action or value expert), as in openpi.

Each expert has its own width, norms and projections; heads, head size and depth are shared, so that queries, keys and
values of all experts are concatenated along the sequence. Layers are stacked along a leading axis (hvd.models.stack).
Parameter names, shapes and arithmetic equal openpi's: expert i > 0 has the suffix _i.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from hvd.errors import UserError, nearest
from hvd.models import attention, sharding, stack
from hvd.models.lora import Einsum, FeedForward, LoraConfig, param

KVCache = tuple[Array, Array]  # keys and values of all layers, each [layers, b, tokens, kv_heads, head_dim]


@dataclass(frozen=True)
class Config:
    """Sizes of one expert."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lora: LoraConfig | None = None
    cond_width: int = 0  # > 0: norms are modulated by a condition vector of this width (adaRMS)


_2B = Config(width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256)
_300M = Config(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256)

VARIANTS: dict[str, Config] = {
    "gemma_2b": _2B,
    "gemma_2b_lora": replace(_2B, lora=LoraConfig(rank=16, alpha=16.0)),
    "gemma_300m": _300M,
    "gemma_300m_lora": replace(_300M, lora=LoraConfig(rank=32, alpha=32.0)),
    # a value expert beside gemma_2b: a third of gemma_300m's size
    "gemma_100m": replace(_300M, width=512, mlp_dim=2048),
    "dummy": Config(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
    # trains on two CPU cores; trunk and expert share depth and heads
    "tiny": Config(width=128, depth=3, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=32),
    "tiny_trunk": Config(width=64, depth=3, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=32),
}


def get_config(variant: str) -> Config:
    """The sizes called `variant`; a UserError that offers the nearest names otherwise."""
    if variant not in VARIANTS:
        raise UserError(f"unknown gemma variant {variant!r}{nearest(variant, VARIANTS)}")
    return VARIANTS[variant]


def rope_angles(
    positions: Int[Array, "b t"], head_dim: int, max_wavelength: float = 10_000.0
) -> tuple[Float[Array, "b t 1 h2"], Float[Array, "b t 1 h2"]]:
    """sin and cos of the rotary embedding's angles, for all heads alike."""
    timescale = (max_wavelength ** (2.0 / head_dim * np.arange(head_dim // 2))).astype(np.float32)
    shape = (*positions.shape, 1, head_dim // 2)
    # The barrier keeps XLA from multiplying by a reciprocal: its rounding shows in the fourth digit at position 800.
    divisor = jax.lax.optimization_barrier(jnp.broadcast_to(timescale, shape))
    radians = jnp.broadcast_to(positions[:, :, None, None].astype(jnp.float32), shape) / divisor
    return jnp.sin(radians), jnp.cos(radians)


def rotate(x: Float[Array, "b t n h"], sin: Float[Array, "b t 1 h2"], cos: Float[Array, "b t 1 h2"]):
    """Rotary embedding, split-half form, computed in float32; returns x's shape and dtype."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def unit_rms(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """x / rms(x) in float32."""
    x32 = x.astype(jnp.float32)
    return x32 * (1 / jnp.sqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6))


class RMSNorm(nnx.Module):
    """x / rms(x) * (1 + scale), in float32; adaptive: scale, shift and a residual gate from a condition vector."""

    def __init__(self, width: int, rngs: nnx.Rngs, depth: int | None = None, cond_width: int = 0):
        self.adaptive = cond_width > 0
        if self.adaptive:
            self.Dense_0 = nnx.Dict(
                kernel=param(rngs, (cond_width, 3 * width), 0.0, depth), bias=param(rngs, (3 * width,), 0.0, depth)
            )
        else:
            self.scale = param(rngs, (width,), 0.0, depth)

    def __call__(
        self, x: Float[Array, "b t d"], cond: Float[Array, "b c"] | Float[Array, "b t c"] | None = None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b #t d"] | None]:
        """The normed x and the residual's gate (None where the norm is not adaptive)."""
        normed = unit_rms(x)
        if not self.adaptive:
            return (normed * (1 + self.scale[...])[None, None]).astype(x.dtype), None
        if cond is None:
            raise ValueError("an adaptive norm needs a condition")
        dense = self.Dense_0
        modulation = cond.astype(x.dtype) @ dense.kernel[...].astype(x.dtype)
        modulation = modulation.reshape(len(x), -1, modulation.shape[-1]) + dense.bias[...].astype(x.dtype)[None, None]
        scale, shift, gate = jnp.split(modulation, 3, axis=-1)
        normed = normed * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)
        return normed.astype(x.dtype), gate


def expert_name(name: str, i: int) -> str:
    """Parameter name of expert i: the first has no suffix, so that PaliGemma weights load as they are."""
    return name if i == 0 else f"{name}_{i}"


def expert_of(path: Sequence[Any]) -> int:
    """The expert that a parameter of the language model belongs to; the embedder is the first's."""
    found = re.search(r"_([1-9]\d*)(?:/|$)", "/".join(map(str, path)))
    return int(found.group(1)) if found else 0


class Attention(nnx.Module):
    """Joint attention of all experts; `kind` is ModelConfig.attention."""

    def __init__(
        self, configs: Sequence[Config], rngs: nnx.Rngs, depth: int | None = None, kind: attention.Kind = "auto"
    ):
        self.configs = tuple(configs)
        self.kind: attention.Kind = kind
        self.query_scale = configs[0].head_dim ** -0.5
        for i, c in enumerate(configs):
            if c.num_kv_heads == c.num_heads:
                shape = (3, c.num_heads, c.width, c.head_dim)
                setattr(self, expert_name("qkv_einsum", i), Einsum(shape, c.width, c.lora, rngs, depth))
            else:
                shape = (c.num_heads, c.width, c.head_dim)
                setattr(self, expert_name("q_einsum", i), Einsum(shape, c.width, c.lora, rngs, depth))
                shape = (2, c.num_kv_heads, c.width, c.head_dim)
                setattr(self, expert_name("kv_einsum", i), Einsum(shape, c.width, c.lora, rngs, depth))
            shape = (c.num_heads, c.head_dim, c.width)
            out = Einsum(shape, c.num_heads * c.head_dim, c.lora, rngs, depth)
            setattr(self, expert_name("attn_vec_einsum", i), out)

    def __call__(self, xs, angles, mask, cache=None, wanted=None):
        """xs: one [b t_i d_i] per expert or None. Returns the same, and the (k, v) of these tokens, k rotated.

        `wanted`: per expert whether its output is (else None comes back); mask has the rows of the wanted tokens only.
        """
        wanted = wanted or [x is not None for x in xs]
        queries, keys, values, sin, cos = [], [], [], [], []
        start = 0
        for i, (x, c) in enumerate(zip(xs, self.configs, strict=True)):
            if x is None:
                continue
            own = slice(start, start + x.shape[1])
            start = own.stop
            if c.num_kv_heads == c.num_heads:
                q, k, v = getattr(self, expert_name("qkv_einsum", i))("btd,cndh->cbtnh", x)
            else:
                k, v = getattr(self, expert_name("kv_einsum", i))("btd,ckdh->cbtkh", x)
                q = getattr(self, expert_name("q_einsum", i))("btd,ndh->btnh", x) if wanted[i] else None
            keys.append(k)
            values.append(v)
            if wanted[i]:
                queries.append(q)
                sin.append(angles[0][:, own])
                cos.append(angles[1][:, own])
        k, v = rotate(_joined(keys), *angles), _joined(values)
        outs: list[Array | None] = [None] * len(xs)
        if not queries:
            return outs, (k, v)
        q = rotate(_joined(queries), _joined(sin), _joined(cos)) * self.query_scale
        form = attention.choose(self.kind, "language", q.dtype, q.shape[-1])
        encoded = attention.FORMS[form](q, k, v, mask, cache)
        start = 0
        for i, x in enumerate(xs):
            if x is not None and wanted[i]:
                part = encoded[:, start : start + x.shape[1]]
                outs[i] = getattr(self, expert_name("attn_vec_einsum", i))("btnh,nhd->btd", part)
                start += x.shape[1]
        return outs, (k, v)


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def residual(x: Array, y: Array, gate: Array | None) -> Array:
    """x + y, or x + y * gate where the norm before y was adaptive."""
    return x + y if gate is None else x + y * gate


class Block(nnx.Module):
    """One layer of all experts: norm, joint attention, norm, feed-forward, each with a residual."""

    def __init__(
        self, configs: Sequence[Config], rngs: nnx.Rngs, depth: int | None = None, kind: attention.Kind = "auto"
    ):
        self.attn = Attention(configs, rngs, depth, kind)
        for i, c in enumerate(configs):
            setattr(self, expert_name("pre_attention_norm", i), RMSNorm(c.width, rngs, depth, c.cond_width))
            setattr(self, expert_name("pre_ffw_norm", i), RMSNorm(c.width, rngs, depth, c.cond_width))
            setattr(self, expert_name("mlp", i), FeedForward(c.width, c.mlp_dim, c.lora, rngs, depth))

    def __call__(self, xs, angles, mask, conds, cache=None, wanted=None):
        """Tokens per expert after the layer, None where an expert's are not `wanted`; and the (k, v) of all of them."""

        def norms(name, xs):
            normed, gates = [], []
            for i, (x, cond) in enumerate(zip(xs, conds, strict=True)):
                y, gate = (None, None) if x is None else getattr(self, expert_name(name, i))(x, cond)
                normed.append(y)
                gates.append(gate)
            return normed, gates

        normed, gates = norms("pre_attention_norm", xs)
        attended, kv = self.attn(normed, angles, mask, cache, wanted)
        xs = [None if y is None else residual(x, y, g) for x, y, g in zip(xs, attended, gates, strict=True)]
        normed, gates = norms("pre_ffw_norm", xs)
        xs = [
            None if x is None else sharding.rows(residual(x, getattr(self, expert_name("mlp", i))(y), g))
            for i, (x, y, g) in enumerate(zip(xs, normed, gates, strict=True))
        ]
        return xs, kv


class Embedder(nnx.Module):
    """Token embeddings, scaled by sqrt(width)."""

    def __init__(self, vocab_size: int, width: int, rngs: nnx.Rngs):
        self.input_embedding = param(rngs, (vocab_size, width), 0.01)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        table = self.input_embedding[...]
        return table[tokens] * jnp.sqrt(jnp.asarray(table.shape[-1], table.dtype))


class Gemma(nnx.Module):
    """The mixture: embedder (expert 0's), stacked layers, final norms.

    Args:
        configs: one per expert; depth, num_heads, num_kv_heads and head_dim must agree.
        vocab_size: rows of the embedding table.
        dtype: of the computation; parameters are float32.
        remat: what the backward pass computes again (StageConfig.remat).
        kind: form of the attention (ModelConfig.attention).
    """

    def __init__(
        self,
        configs: Sequence[Config],
        vocab_size: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        remat: stack.Remat = "none",
        kind: attention.Kind = "auto",
    ):
        first = configs[0]
        for c in configs:
            for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):
                if getattr(c, name) != getattr(first, name):
                    raise UserError(
                        f"gemma experts must share {name}: {getattr(first, name)} and {getattr(c, name)}; choose "
                        "model.paligemma_variant and the expert's variant to match"
                    )
        self.configs = tuple(configs)
        self.dtype = dtype
        self.remat: stack.Remat = remat
        self.embedder = Embedder(vocab_size, first.width, rngs)
        self.layers = Block(configs, rngs, first.depth, kind)
        for i, c in enumerate(configs):
            setattr(self, expert_name("final_norm", i), RMSNorm(c.width, rngs, cond_width=c.cond_width))

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Embeddings of the first expert's width, float32."""
        return self.embedder(tokens)

    def __call__(
        self,
        xs: Sequence[Array | None],
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t p_t"],
        conds: Sequence[Array | None] | None = None,
        cache: KVCache | None = None,
        wanted: Sequence[bool] | None = None,
        keep_kv: bool = True,
    ) -> tuple[list, KVCache | None]:
        """Joint pass over the tokens of the experts, in the experts' order.

        Args:
            xs: per expert its tokens [b t_i d_i], or None to leave that expert out; t = sum of t_i.
            positions: for the rotary embedding.
            mask: True where query t may attend to key s; p_t = length of the cache + t.
            conds: per expert the condition of its adaptive norms, [b cond_width] or, of each token, [b t cond_width].
            cache: keys and values of earlier tokens, stacked over the layers [l b p k h].
            wanted: per expert whether its outputs are; of the others the last layer computes keys and values alone.
            keep_kv: whether the (k, v) are returned.

        Returns:
            Final-normed tokens per expert (or None) in `dtype`, and the (k, v) of the tokens of this call [l b t k h].
        """
        conds = list(conds) if conds is not None else [None] * len(self.configs)
        xs = [None if x is None else sharding.rows(x.astype(self.dtype)) for x in xs]
        wanted = [x is not None and (wanted is None or wanted[i]) for i, x in enumerate(xs)]
        angles = rope_angles(positions, self.configs[0].head_dim)
        # Otherwise the backward pass would make gradients of zeros for the experts that are left out
        absent = tuple(i for i, x in enumerate(xs) if x is None)
        graphdef, stacked, rest = nnx.split(self.layers, lambda path, _: expert_of(path) not in absent, ...)
        stacked = nnx.merge_state(stacked, jax.tree.map(jax.lax.stop_gradient, rest))

        def layer(params, xs, cache, shared):
            angles, mask, _, conds = shared
            xs, kv = nnx.merge(graphdef, params)(xs, angles, mask, conds, cache)
            return xs, kv if keep_kv else None

        def last(params, xs, cache, shared):
            angles, _, mask, conds = shared
            xs, kv = nnx.merge(graphdef, params)(xs, angles, mask, conds, cache, wanted)
            return xs, kv if keep_kv else None

        depth = self.configs[0].depth
        every = all(want or x is None for x, want in zip(xs, wanted, strict=True))
        segments = [(layer, depth)] if every else [(layer, depth - 1), (last, 1)]
        shared = angles, mask, mask if every else _rows_of(mask, xs, wanted), conds
        xs, kvs = stack.run(segments, stacked, xs, cache, shared, remat=self.remat, unroll=depth <= stack.FEW)
        xs = [
            None if x is None else getattr(self, expert_name("final_norm", i))(x, cond)[0]
            for i, (x, cond) in enumerate(zip(xs, conds, strict=True))
        ]
        return xs, jax.tree.map(lambda *parts: jnp.concatenate(parts), *kvs) if keep_kv else None


def _rows_of(mask: Bool[Array, "b t p_s"], xs: Sequence[Array | None], wanted: Sequence[bool]) -> Array:
    """The mask's rows for the tokens of the wanted experts."""
    ends = np.cumsum([0 if x is None else x.shape[1] for x in xs])
    rows = [
        mask[:, end - x.shape[1] : end] for x, end, want in zip(xs, ends, wanted, strict=True) if want and x is not None
    ]
    return jnp.concatenate([mask[:, :0], *rows], axis=1)
