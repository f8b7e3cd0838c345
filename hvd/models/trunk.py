"""What policy and value model share: images and prompt as a prefix through PaliGemma, a second expert beside it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from hvd.configs import ModelConfig
from hvd.errors import UserError
from hvd.models import gemma, siglip

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


class Trunk(nnx.Module):
    """PaliGemma (`llm`, and `img` where there are cameras) with a second expert in `llm`. Named as in openpi.

    Args:
        cfg: the model's config; its first expert is cfg.paligemma_variant.
        expert_variant: sizes of the second expert.
    """

    def __init__(self, cfg: ModelConfig, expert_variant: str, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(cfg.dtype)
        self.cameras = cfg.cameras
        self.token_len, self.vocab_size = cfg.max_token_len, cfg.vocab_size
        configs = gemma.get_config(cfg.paligemma_variant), gemma.get_config(expert_variant)
        self.llm = gemma.Gemma(configs, cfg.vocab_size, self.dtype, rngs)
        if cfg.cameras:
            size = (cfg.image_size, cfg.image_size)
            self.img = siglip.SigLIP(siglip.get_config(cfg.siglip_variant), configs[0].width, size, self.dtype, rngs)

    @property
    def expert_width(self) -> int:
        return self.llm.configs[1].width

    def embed_prefix(self, obs: Observation) -> Tokens:
        """Tokens of all cameras (in one pass of the image tower), then of the prompt: one attention block."""
        tokens, valid = [], []
        if self.cameras:
            missing = [camera for camera in self.cameras if camera not in obs["images"]]
            if missing:
                raise UserError(
                    f"the observation lacks camera {missing[0]!r}; the model wants {', '.join(self.cameras)}"
                )
            images = jnp.concatenate([as_float(obs["images"][camera]) for camera in self.cameras])
            encoded = self.img(images)
            encoded = encoded.reshape(len(self.cameras), -1, *encoded.shape[1:])
            for camera, x in zip(self.cameras, encoded, strict=True):
                tokens.append(x)
                valid.append(jnp.broadcast_to(obs["image_masks"][camera][:, None], x.shape[:2]))
        prompt = self.llm.embed(obs["tokenized_prompt"]).astype(self.dtype)
        tokens.append(prompt)
        valid.append(obs["tokenized_prompt_mask"])
        x = jnp.concatenate(tokens, axis=1)
        return Tokens(x, jnp.concatenate(valid, axis=1), np.zeros(x.shape[1], bool))

    def joint(self, prefix: Tokens, suffix: Tokens) -> Float[Array, "b t d"]:
        """The second expert's outputs for the suffix, prefix and suffix in one pass."""
        valid = jnp.concatenate([prefix.valid, suffix.valid], axis=1)
        mask = attention_mask(valid, np.concatenate([prefix.starts, suffix.starts]))
        (_, out), _ = self.llm([prefix.x, suffix.x], token_positions(valid), mask)
        return out

    def prefill(self, prefix: Tokens) -> gemma.KVCache:
        """Keys and values of the prefix, for `decode`."""
        mask = attention_mask(prefix.valid, prefix.starts)
        _, cache = self.llm([prefix.x, None], token_positions(prefix.valid), mask)
        return cache

    def decode(self, cache: gemma.KVCache, prefix_valid: Bool[Array, "b p"], suffix: Tokens) -> Float[Array, "b t d"]:
        """The second expert's outputs for the suffix, which sees the whole cached prefix; equals `joint`."""
        valid = suffix.valid
        to_prefix = jnp.broadcast_to(prefix_valid[:, None, :], (*valid.shape, prefix_valid.shape[1]))
        mask = jnp.concatenate([to_prefix & valid[:, :, None], attention_mask(valid, suffix.starts)], axis=2)
        positions = jnp.sum(prefix_valid.astype(jnp.int32), axis=1)[:, None] + token_positions(valid)
        (_, out), _ = self.llm([None, suffix.x], positions, mask, cache=cache)
        return out
