"""pi0 by itself: acting with a cached prefix, masks, image forms, and which parameters a LoRA run freezes."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from hvd.configs import ModelConfig
from hvd.errors import UserError
from hvd.models.pi0 import Pi0, freeze_filter
from hvd.models.siglip import SigLIP, get_config
from tests.models.conftest import MINI, observation

CAMERAS = dataclasses.replace(MINI, cameras=("base", "wrist"))
BATCH = 3


@cache
def velocity(config: ModelConfig):
    model = Pi0(config, nnx.Rngs(0))
    return model, jax.jit(model.velocity)


def noise(config: ModelConfig = MINI):
    return jax.random.normal(jax.random.key(5), (BATCH, config.action_horizon, config.action_dim))


@pytest.mark.parametrize("config", [MINI, CAMERAS], ids=["state", "cameras"])
def test_acting_is_euler_integration_of_the_velocity(config):
    model, run = velocity(config)
    obs, x = observation(config), noise()
    steps = 4
    for i in range(steps):
        x = x - run(obs, x, jnp.full(BATCH, 1.0 - i / steps)) / steps
    got = jax.jit(model.sample_actions)(obs, noise(), jnp.int32(steps))
    assert_allclose(got, x, rtol=1e-4, atol=1e-5)


def test_without_cameras_there_is_no_image_tower():
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(velocity(MINI)[0]))]
    assert not any("img" in path for path in paths)
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(velocity(CAMERAS)[0]))]
    assert any("img" in path for path in paths)


def test_padded_prompt_and_masked_camera_do_not_matter():
    _, run = velocity(CAMERAS)
    obs, t = observation(CAMERAS), jnp.full(BATCH, 0.3)
    want = np.asarray(run(obs, noise(), t))
    prompt = jnp.where(obs["tokenized_prompt_mask"], obs["tokenized_prompt"], 9)
    other = dict(obs["images"], wrist=255 - obs["images"]["wrist"])
    got = np.asarray(run({**obs, "tokenized_prompt": prompt, "images": other}, noise(), t))
    assert_allclose(got[-1], want[-1], rtol=1e-5, atol=1e-6)  # the last row: wrist masked, prompt padded
    assert np.abs(got[:-1] - want[:-1]).max() > 1e-4


def test_bytes_and_floats_are_the_same_image():
    _, run = velocity(CAMERAS)
    obs, t = observation(CAMERAS), jnp.full(BATCH, 0.3)
    floats = {name: x.astype(jnp.float32) / 127.5 - 1 for name, x in obs["images"].items()}
    got = run({**obs, "images": floats}, noise(), t)
    assert_allclose(got, run(obs, noise(), t), rtol=1e-5, atol=1e-5)


def test_one_pass_over_all_cameras_equals_one_each():
    model, _ = velocity(CAMERAS)
    obs = observation(CAMERAS)
    prefix = model.embed_prefix(obs)
    per_camera = [model.PaliGemma.img(x.astype(jnp.float32) / 127.5 - 1) for x in obs["images"].values()]
    n = per_camera[0].shape[1]
    for i, x in enumerate(per_camera):
        assert_allclose(prefix.x[:, i * n : (i + 1) * n], x, rtol=1e-5, atol=1e-5)
    assert_array_equal(prefix.valid[-1], [True] * n + [False] * n + [True, True, False, False])


def test_a_missing_camera_is_named():
    model, _ = velocity(CAMERAS)
    obs = observation(MINI)
    with pytest.raises(UserError, match="lacks camera 'base'; the model wants base, wrist"):
        model.embed_prefix(obs)


def test_image_size_must_fit_the_patch():
    with pytest.raises(UserError, match=r"model.image_size 10 .* patch 4"):
        SigLIP(get_config("mini"), 16, (10, 10), jnp.dtype("float32"), nnx.Rngs(0))
    with pytest.raises(UserError, match="unknown siglip variant"):
        get_config("So400m")


def test_bfloat16_is_near_float32():
    obs, t = observation(CAMERAS), jnp.full(BATCH, 0.3)
    want = velocity(CAMERAS)[1](obs, noise(), t)
    model = Pi0(dataclasses.replace(CAMERAS, dtype="bfloat16"), nnx.Rngs(0))
    got = jax.jit(model.velocity)(obs, noise(), t)
    assert got.dtype == jnp.float32
    assert_allclose(got, want, atol=0.03 * np.abs(np.asarray(want)).max())
    assert {str(x.dtype) for x in jax.tree.leaves(nnx.state(model))} == {"float32"}


@pytest.mark.parametrize("trunk", ["gemma_2b", "gemma_2b_lora"])
@pytest.mark.parametrize("expert", ["gemma_300m", "gemma_300m_lora"])
def test_what_a_lora_run_freezes(trunk, expert):
    frozen = freeze_filter(ModelConfig(paligemma_variant=trunk, action_expert_variant=expert))
    layer = ("PaliGemma", "llm", "layers")
    assert frozen((*layer, "attn", "q_einsum", "w")) == ("lora" in trunk)
    assert frozen((*layer, "mlp", "gating_einsum")) == ("lora" in trunk)
    assert frozen((*layer, "attn", "q_einsum_1", "w")) == ("lora" in expert)
    assert frozen(("PaliGemma", "llm", "final_norm_1", "scale")) == ("lora" in expert)
    for trained in (
        (*layer, "attn", "q_einsum", "lora_a"),
        (*layer, "mlp_1", "gating_einsum_lora_b"),
        ("PaliGemma", "img", "head", "kernel"),
        ("PaliGemma", "img", "Transformer", "encoderblock", "LayerNorm_1", "scale"),
        ("action_out_proj", "kernel"),
        ("level_proj", 0, "kernel"),
    ):
        assert not frozen(trained)


def test_a_value_expert_of_its_own_decides_its_freezing():
    config = ModelConfig(paligemma_variant="gemma_2b_lora", action_expert_variant="gemma_300m_lora")
    path = ("PaliGemma", "llm", "layers", "attn", "q_einsum_1", "w")
    assert freeze_filter(config)(path)
    assert not freeze_filter(config, "gemma_300m")(path)
