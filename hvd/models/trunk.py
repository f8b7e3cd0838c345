"""What policy and value model share: images and prompt as a prefix through PaliGemma, a second expert beside it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from hvd.configs import ModelConfig
from hvd.errors import UserError
from hvd.models import gemma, sharding, siglip, stack

# A batch of observations: state f32[B, action_dim] (normalised, padded); images {camera: uint8 or float32 in [-1, 1]
# [B, H, W, 3]}; image_masks {camera: bool[B]}; tokenized_prompt int32[B, L]; tokenized_prompt_mask bool[B, L]
Observation = Mapping[str, Any]


class Tokens(NamedTuple):
    """A part of the sequence: its tokens, which of them are valid, and where a new attention block starts."""

    x: Float[Array, "b t d"]
    valid: Bool[Array, "b t"]
    starts: Bool[np.ndarray, "t"]


def attention_mask(valid: Bool[Array, "b t"], starts: Bool[np.ndarray, "t"] | Bool[Array, "t"]) -> Bool[Array, "b t t"]:
    """Block-causal mask [b, query, key]: a token sees its own block and those before it, valid tokens only.

    `starts` is true where a new block begins (openpi's "ar" mask).
    """
    block = jnp.cumsum(jnp.asarray(starts, jnp.int32))
    visible = block[None, :] <= block[:, None]
    return visible[None] & valid[:, None, :] & valid[:, :, None]


def token_positions(valid: Bool[Array, "b t"]) -> Int[Array, "b t"]:
    """Positions that count valid tokens only."""
    return jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1


def as_float(images: Float[Array, "b h w 3"] | UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """float32 pixels in [-1, 1]; uint8 0..255 is converted, floats are taken as they are."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1.0
    return images.astype(jnp.float32)


def embed_prefix(
    obs: Observation,
    cameras: Sequence[str],
    encode: Callable[[Array], Array] | None,
    embed: Callable[[Array], Array],
    dtype: jnp.dtype,
) -> Tokens:
    """Tokens of all cameras, in one pass of the image tower `encode`, then of the prompt, by `embed`."""
    tokens, valid = [], []
    if encode is not None:
        missing = [camera for camera in cameras if camera not in obs["images"]]
        if missing:
            raise UserError(f"the observation lacks camera {missing[0]!r}; the model wants {', '.join(cameras)}")
        # Cameras beside each other, not one after the other: rows of a batch stay on their devices
        images = jnp.stack([as_float(obs["images"][camera]) for camera in cameras], axis=1)
        b, count = images.shape[:2]
        encoded = encode(sharding.rows(images.reshape(b * count, *images.shape[2:])))
        tokens.append(encoded.reshape(b, -1, encoded.shape[-1]))
        masks = jnp.stack([obs["image_masks"][camera] for camera in cameras], axis=1)
        valid.append(jnp.repeat(masks, encoded.shape[1], axis=1))
    tokens.append(sharding.rows(embed(obs["tokenized_prompt"]).astype(dtype)))
    valid.append(obs["tokenized_prompt_mask"])
    x = jnp.concatenate(tokens, axis=1)
    return Tokens(x, jnp.concatenate(valid, axis=1), np.zeros(x.shape[1], bool))


class Prefix(NamedTuple):
    """Images and prompt after PaliGemma: keys and values of all layers, and which tokens are valid."""

    cache: gemma.KVCache
    valid: Bool[Array, "b p"]


class Trunk(nnx.Module):
    """PaliGemma (`llm`, and `img` where there are cameras) with a second expert in `llm`. Named as in openpi.

    Args:
        cfg: the model's config.
        trunk_variant: sizes of the first expert.
        expert_variant: sizes of the second expert.
        remat: what the backward pass computes again (StageConfig.remat).
        conditioned: the second expert's norms take a condition of its width (pi0.5).
    """

    def __init__(
        self,
        cfg: ModelConfig,
        trunk_variant: str,
        expert_variant: str,
        rngs: nnx.Rngs,
        remat: stack.Remat = "none",
        conditioned: bool = False,
    ):
        self.dtype = jnp.dtype(cfg.dtype)
        self.cameras = cfg.cameras
        expert = gemma.get_config(expert_variant)
        if conditioned:
            expert = dataclasses.replace(expert, cond_width=expert.width)
        configs = gemma.get_config(trunk_variant), expert
        self.llm = gemma.Gemma(configs, cfg.vocab_size, self.dtype, rngs, remat, cfg.attention)
        if cfg.cameras:
            size = (cfg.image_size, cfg.image_size)
            tower = siglip.get_config(cfg.siglip_variant)
            self.img = siglip.SigLIP(tower, configs[0].width, size, self.dtype, rngs, remat, cfg.attention)

    @property
    def expert_width(self) -> int:
        return self.llm.configs[1].width

    def embed_prefix(self, obs: Observation) -> Tokens:
        """Tokens of all cameras, then of the prompt: one attention block."""
        return embed_prefix(obs, self.cameras, self.img if self.cameras else None, self.llm.embed, self.dtype)

    def joint(
        self, prefix: Tokens, suffix: Tokens, condition: Float[Array, "b *k d"] | None = None
    ) -> Float[Array, "b t d"]:
        """The second expert's outputs for the suffix, prefix and suffix in one pass."""
        valid = jnp.concatenate([prefix.valid, suffix.valid], axis=1)
        mask = attention_mask(valid, np.concatenate([prefix.starts, suffix.starts]))
        xs, positions = [prefix.x, suffix.x], token_positions(valid)
        (_, out), _ = self.llm(xs, positions, mask, (None, condition), wanted=(False, True), keep_kv=False)
        return out

    def prefill(self, prefix: Tokens) -> Prefix:
        """Keys and values of the prefix, for `decode`."""
        mask = attention_mask(prefix.valid, prefix.starts)
        _, cache = self.llm([prefix.x, None], token_positions(prefix.valid), mask, wanted=(False, False))
        assert cache is not None
        return Prefix(cache, prefix.valid)

    def decode(
        self, prefix: Prefix, suffix: Tokens, condition: Float[Array, "b *k d"] | None = None
    ) -> Float[Array, "b t d"]:
        """The second expert's outputs for the suffix, which sees the whole cached prefix; equals `joint`."""
        valid = suffix.valid
        to_prefix = jnp.broadcast_to(prefix.valid[:, None, :], (*valid.shape, prefix.valid.shape[1]))
        mask = jnp.concatenate([to_prefix & valid[:, :, None], attention_mask(valid, suffix.starts)], axis=2)
        positions = jnp.sum(prefix.valid.astype(jnp.int32), axis=1)[:, None] + token_positions(valid)
        (_, out), _ = self.llm([None, suffix.x], positions, mask, (None, condition), prefix.cache, keep_kv=False)
        return out
