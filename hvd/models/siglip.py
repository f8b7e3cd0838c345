"""SigLIP vision transformer without pooling, as in openpi: patches -> tokens of the language model's width."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hvd.errors import UserError, nearest
from hvd.models import attention, sharding, stack
from hvd.models.lora import dense, param
from hvd.models.sharding import weight


@dataclass(frozen=True)
class Config:
    """Sizes of the image tower."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch: int


VARIANTS: dict[str, Config] = {
    "So400m/14": Config(width=1152, depth=27, mlp_dim=4304, num_heads=16, patch=14),
    "Ti/14": Config(width=192, depth=12, mlp_dim=768, num_heads=3, patch=14),
    "tiny": Config(width=64, depth=2, mlp_dim=128, num_heads=2, patch=14),  # 56x56 images: 16 tokens a camera
}


def get_config(variant: str) -> Config:
    """The sizes called `variant`; a UserError that offers the nearest names otherwise."""
    if variant not in VARIANTS:
        raise UserError(f"unknown siglip variant {variant!r}{nearest(variant, VARIANTS)}")
    return VARIANTS[variant]


class Dense(nnx.Module):
    """x @ kernel + bias in x's dtype; `shape` (in, out), stacked [depth, in, out]."""

    def __init__(self, shape: tuple[int, int], rngs: nnx.Rngs, depth: int | None = None):
        self.kernel = param(rngs, shape, (2 / (shape[0] + shape[1])) ** 0.5, depth)  # Glorot
        self.bias = param(rngs, shape[1:], 0.0, depth)

    def __call__(self, x: Float[Array, "n t i"]) -> Float[Array, "n t o"]:
        return dense(x, weight(self.kernel[...], x.dtype)) + self.bias[...].astype(x.dtype)[None, None]


def layer_norm(x: Float[Array, "n t d"], scale: Float[Array, "d"], bias: Float[Array, "d"]) -> Float[Array, "n t d"]:
    """Layer norm, eps 1e-6, in float32; output in x's dtype."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)
    return (x32 * scale[None, None] + bias[None, None]).astype(x.dtype)


def patches(
    images: Float[Array, "n h w 3"],
    kernel: Float[Array, "p p 3 d"],
    bias: Float[Array, "d"],
    positions: Float[Array, "1 t d"],
) -> Float[Array, "n t d"]:
    """Patch embeddings (a convolution, as a matrix product of patches) with position embeddings, float32."""
    n, height, width, _ = images.shape
    p = kernel.shape[0]
    x = images.reshape(n, height // p, p, width // p, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, p * p * 3)
    return x @ kernel.reshape(p * p * 3, -1) + bias[None, None] + positions


class LayerNorm(nnx.Module):
    """`layer_norm` with its parameters."""

    def __init__(self, width: int, rngs: nnx.Rngs, depth: int | None = None):
        self.scale = nnx.Param(jnp.ones((width,) if depth is None else (depth, width), jnp.float32))
        self.bias = param(rngs, (width,), 0.0, depth)

    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        return layer_norm(x, self.scale[...], self.bias[...])


class MultiHeadAttention(nnx.Module):
    """Full self-attention with biases; kernels [d, heads, d/heads], out [heads, d/heads, d]."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs, depth: int | None = None, kind: attention.Kind = "auto"):
        self.kind: attention.Kind = kind
        size = width // heads

        def projection():
            kernel = param(rngs, (width, heads, size), width**-0.5, depth)
            return nnx.Dict(kernel=kernel, bias=param(rngs, (heads, size), 0.0, depth))

        self.query, self.key, self.value = projection(), projection(), projection()
        self.out = nnx.Dict(
            kernel=param(rngs, (heads, size, width), width**-0.5, depth), bias=param(rngs, (width,), 0.0, depth)
        )

    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        def project(p):
            y = jnp.einsum("ntd,dhs->nths", x, weight(p.kernel[...], x.dtype))
            return y + p.bias[...].astype(x.dtype)[None, None]

        q, k, v = project(self.query), project(self.key), project(self.value)
        form = attention.choose(self.kind, "images", q.dtype, q.shape[-1])
        y = (attention.attend_all if form == "xla" else attention.attend_all_cudnn)(q * q.shape[-1] ** -0.5, k, v)
        out = jnp.einsum("nths,hsd->ntd", y, weight(self.out.kernel[...], x.dtype))
        return out + self.out.bias[...].astype(x.dtype)[None, None]


class MlpBlock(nnx.Module):
    """Dense, gelu (tanh form), Dense."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs, depth: int | None = None):
        self.Dense_0 = Dense((width, hidden), rngs, depth)
        self.Dense_1 = Dense((hidden, width), rngs, depth)

    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        return self.Dense_1(nnx.gelu(self.Dense_0(x)))


class EncoderBlock(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, cfg: Config, rngs: nnx.Rngs, depth: int | None = None, kind: attention.Kind = "auto"):
        self.LayerNorm_0 = LayerNorm(cfg.width, rngs, depth)
        self.LayerNorm_1 = LayerNorm(cfg.width, rngs, depth)
        self.MultiHeadDotProductAttention_0 = MultiHeadAttention(cfg.width, cfg.num_heads, rngs, depth, kind)
        self.MlpBlock_0 = MlpBlock(cfg.width, cfg.mlp_dim, rngs, depth)

    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        x = x + self.MultiHeadDotProductAttention_0(self.LayerNorm_0(x))
        return sharding.rows(x + self.MlpBlock_0(self.LayerNorm_1(x)))


class SigLIP(nnx.Module):
    """Images to tokens.

    Args:
        cfg: sizes.
        out_width: width of the tokens, that of the language model.
        image_shape: (height, width) of the images, divisible by the patch.
        dtype: of the transformer's computation; patches and position embeddings are float32.
        remat: what the backward pass computes again (StageConfig.remat).
        kind: form of the attention (ModelConfig.attention).
    """

    def __init__(
        self,
        cfg: Config,
        out_width: int,
        image_shape: tuple[int, int],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        remat: stack.Remat = "none",
        kind: attention.Kind = "auto",
    ):
        rows, columns = (side // cfg.patch for side in image_shape)
        if (rows * cfg.patch, columns * cfg.patch) != image_shape:
            raise UserError(f"model.image_size {image_shape[0]} is no multiple of the image tower's patch {cfg.patch}")
        self.cfg, self.image_shape, self.dtype = cfg, image_shape, dtype
        self.remat: stack.Remat = remat
        pixels = cfg.patch * cfg.patch * 3
        self.embedding = nnx.Dict(
            kernel=param(rngs, (cfg.patch, cfg.patch, 3, cfg.width), pixels**-0.5), bias=param(rngs, (cfg.width,), 0.0)
        )
        self.pos_embedding = param(rngs, (1, rows * columns, cfg.width), cfg.width**-0.5)
        self.Transformer = nnx.Dict(
            encoderblock=EncoderBlock(cfg, rngs, cfg.depth, kind), encoder_norm=LayerNorm(cfg.width, rngs)
        )
        self.head = Dense((cfg.width, out_width), rngs)

    def patches(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n t d"]:
        """Patch embeddings with position embeddings, float32."""
        height, width = images.shape[1:3]
        if (height, width) != self.image_shape:
            raise ValueError(f"images of {height}x{width} pixels, the image tower is built for {self.image_shape}")
        return patches(images, self.embedding.kernel[...], self.embedding.bias[...], self.pos_embedding[...])

    def encode(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n t d"]:
        """Tokens after the final norm, in the tower's own width."""
        graphdef, stacked = nnx.split(self.Transformer.encoderblock)

        def layer(params, x, extra, shared):
            return nnx.merge(graphdef, params)(x), None

        x = sharding.rows(self.patches(images).astype(self.dtype))
        depth = self.cfg.depth
        x, _ = stack.run([(layer, depth)], stacked, x, remat=self.remat, unroll=depth <= stack.FEW)
        return self.Transformer.encoder_norm(x)

    def __call__(self, images: Float[Array, "n h w 3"]) -> Float[Array, "n t d"]:
        """Tokens [n, patches, out_width] of float32 images in [-1, 1]."""
        return self.head(self.encode(images))
