"""Models of two thin layers, so that a test compiles in a second or two."""

from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from hvd.configs import ModelConfig
from hvd.models import gemma, siglip

MINI = ModelConfig(
    action_dim=8,
    action_horizon=6,
    max_token_len=4,
    vocab_size=32,
    tokenizer="words",
    dtype="float32",
    paligemma_variant="mini_trunk",
    action_expert_variant="mini",
    value_expert_variant="mini",
    siglip_variant="mini",
    cameras=(),
    image_size=8,
    action_patch=3,
)


@pytest.fixture(scope="session", autouse=True)
def _mini_variants():
    trunk = gemma.Config(width=16, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
    expert = gemma.Config(width=24, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=8)
    tower = siglip.Config(width=16, depth=1, mlp_dim=16, num_heads=2, patch=4)
    with mock.patch.dict(gemma.VARIANTS, mini_trunk=trunk, mini=expert), mock.patch.dict(siglip.VARIANTS, mini=tower):
        yield


def observation(config: ModelConfig, batch: int = 3, seed: int = 0) -> dict:
    """Random inputs; the last row has no second camera and a shorter prompt."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))
    size = (batch, config.image_size, config.image_size, 3)
    mask = jnp.ones((batch, config.max_token_len), bool).at[-1, 2:].set(False)
    return {
        "state": jax.random.normal(next(keys), (batch, config.action_dim)),
        "images": {c: jax.random.randint(next(keys), size, 0, 256).astype(jnp.uint8) for c in config.cameras},
        "image_masks": {c: jnp.ones(batch, bool).at[-1].set(i != 1) for i, c in enumerate(config.cameras)},
        "tokenized_prompt": jax.random.randint(next(keys), mask.shape, 0, config.vocab_size),
        "tokenized_prompt_mask": mask,
    }
