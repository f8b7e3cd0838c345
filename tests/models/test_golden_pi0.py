"""The whole pi0 and pi0.5 against openpi's arrays: time embedding, tokens, masks, loss, gradients, actions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_array_equal

from hvd.models import acting
from hvd.models.pi0 import posemb_sincos
from hvd.models.separate import separate
from hvd.models.trunk import attention_mask, token_positions
from tests.models.golden import below, cases, close, flat, load, need
from tests.models.golden_pi0 import pi0_case

pytestmark = pytest.mark.optimised


@cases("posemb*.npz")
def test_time_embedding(case):
    a = load(case)
    for name in [name for name in a if name.startswith("out_")]:
        embed = jax.jit(posemb_sincos, static_argnums=1)
        close(embed(jnp.asarray(a["pos"]), int(name.removeprefix("out_"))), a[name])


@cases("pi0_*tiny.npz", "pi05_*tiny.npz")
def test_pi0_tokens_and_masks(case):
    a, c = load(case), pi0_case(case)
    need(a, "prefix_tokens", "suffix_tokens")
    model, x_t, time = c.model(), jnp.asarray(a["x_t"]), jnp.asarray(a["time"])
    starts = []  # known while tracing: no arrays of jax

    @jax.jit
    def run():
        prefix, (suffix, condition) = model.embed_prefix(c.obs), model.embed_suffix(c.obs, x_t, time)
        starts.extend([prefix.starts, suffix.starts])
        out = model.PaliGemma.joint(prefix, suffix, condition)
        return (prefix.x, suffix.x), (prefix.valid, suffix.valid), out, condition

    tokens, valid, out, condition = run()
    assert (condition is None) == ("adarms_cond" not in a)
    if condition is not None:
        close(condition, a["adarms_cond"], case)
    for i, name in enumerate(("prefix", "suffix")):
        close(tokens[i], a[f"{name}_tokens"], case)
        assert_array_equal(valid[i], a[f"{name}_mask"])
        assert_array_equal(starts[i], a[f"{name}_ar"])
    all_valid = jnp.concatenate(valid, axis=1)
    assert_array_equal(attention_mask(all_valid, np.concatenate(starts)), a["attn_mask"])
    assert_array_equal(token_positions(all_valid), a["positions"])
    close(out, a["suffix_out"], case)


@cases("pi0_*tiny.npz", "pi05_*tiny.npz")
def test_pi0_loss_and_gradients(case):
    a, c = load(case), pi0_case(case)
    (mean, (loss, x_t, u_t, v_t)), grads = c.loss_and_grad(c.trainable, jnp.asarray(a["noise"]), jnp.asarray(a["time"]))
    close(loss, a["loss"], case)
    close(mean, a["loss"].mean(), case)
    for ours, name in ((x_t, "x_t"), (u_t, "u_t"), (v_t, "v_t")):
        if name in a:
            close(ours, a[name], case)
    golden = below(a, "g/")
    ours = flat(grads)
    assert not golden or set(ours) <= set(golden)
    for name, grad in ours.items():
        if golden:
            close(grad, golden[name], case)
    if "rng_loss" in a:
        noise, time = jnp.asarray(a["rng_noise"]), jnp.asarray(a["rng_time"])
        close(c.loss_and_grad(c.trainable, noise, time)[0][1][0], a["rng_loss"], case)


@cases("pi0_*tiny.npz", "pi05_*tiny.npz")
def test_pi0_samples(case):
    a, c = load(case), pi0_case(case)
    noise = jnp.asarray(a["noise"])
    act = jax.jit(c.model().sample_actions)
    for name in [name for name in a if name.startswith("sample_steps")]:
        close(act(c.obs, noise, jnp.int32(name.removeprefix("sample_steps"))), a[name], case)


@cases("pi0_*tiny.npz", "pi05_*tiny.npz")
def test_samples_of_the_form_that_acts(case):
    a, c = load(case), pi0_case(case)
    noise = jnp.asarray(a["noise"])
    with c.sizes():
        weights = separate(c.config, nnx.to_pure_dict(nnx.state(c.model())))
        act = jax.jit(partial(acting.sample_actions, c.config))
        for name in [name for name in a if name.startswith("sample_steps")]:
            close(act(weights, c.obs, noise, jnp.int32(name.removeprefix("sample_steps"))), a[name], case)
