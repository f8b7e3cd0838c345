"""The training state: names, the split into trained and frozen, the same start everywhere, one update."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hvd.configs import StageConfig
from hvd.method import policy
from hvd.models import precision
from hvd.models.pi0 import Pi0
from hvd.train import mesh, state
from hvd.train.state import Graph
from tests.train import factory


class Small(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.rest = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.first(x)
        for layer in self.rest:
            x = layer(x)
        return x


@pytest.fixture
def graph():
    return Graph(Small, lambda path: path[0] == "first")


def test_names_and_split(graph):
    assert set(state.named(graph.shapes)) == {
        f"{layer}/{leaf}" for layer in ("first", "rest/0", "rest/1") for leaf in ("kernel", "bias")
    }
    params = graph.init(jax.random.key(0))
    trained, frozen = graph.split(params)
    assert set(state.named(frozen)) == {"first/kernel", "first/bias"}
    assert jax.tree.structure(state.join(trained, frozen)) == jax.tree.structure(params)


def test_module_of_parts_is_the_module(graph):
    params = graph.init(jax.random.key(0))
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(graph.module(*graph.split(params))(x), Small(nnx.Rngs(jax.random.key(0)))(x))


def test_start_is_sharded_and_deterministic(graph):
    devices = mesh.make_devices(1)
    init = state.make_init(graph, optax.adam(1e-3), ema=True, target=True)
    like = state.abstract(init, devices)
    one, two, other = (state.create(init, seed, like) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, two))
    assert not np.array_equal(one.trained["rest"]["0"]["kernel"], other.trained["rest"]["0"]["kernel"])
    assert jax.tree.all(jax.tree.map(np.array_equal, one.ema, one.trained))
    assert one.ema["rest"]["0"]["kernel"] is not one.target["rest"]["0"]["kernel"]
    assert "first" not in one.target and not any(
        "first" in str(path) for path, _ in jax.tree.leaves_with_path(one.opt_state)
    )
    assert jax.tree.map(lambda x: x.sharding, one) == state.shardings(like)
    whole = sum(x.nbytes for x in jax.tree.leaves(one))
    assert state.num_bytes(like) == {"state_bytes": whole, "state_bytes_per_device": whole}


def test_one_update(graph):
    init = state.make_init(graph, optax.sgd(0.5), ema=True, target=True)
    before = init(jax.random.key(0))
    grads = jax.tree.map(jnp.ones_like, before.trained)
    cfg = dataclasses.replace(StageConfig(), ema_decay=0.9)
    after, norm = state.advance(before, grads, optax.sgd(0.5), cfg, target_share=0.25)
    assert after.step == 1 and norm == pytest.approx(np.sqrt(2 * 20))
    b, a = before.trained["rest"]["1"]["bias"], after.trained["rest"]["1"]["bias"]
    np.testing.assert_allclose(a, b - 0.5)
    np.testing.assert_allclose(after.ema["rest"]["1"]["bias"], b - 0.05, atol=1e-6)
    np.testing.assert_allclose(after.target["rest"]["1"]["bias"], b - 0.125, atol=1e-6)
    assert after.frozen is before.frozen


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_all_finite(bad):
    tree = {"a": jnp.ones((2, 2)), "n": jnp.arange(3), "b": jnp.ones(4, jnp.bfloat16)}
    assert state.all_finite(tree) == 1.0
    assert state.all_finite(tree | {"b": tree["b"].at[1].set(bad)}) == 0.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_parameters_are_narrow_and_have_nothing_else(tmp_path, dtype):
    model = factory.model(dtype=dtype, paligemma_variant="dummy_lora", action_expert_variant="dummy_lora")
    cfg = factory.experiment(tmp_path, model=model, policy={"ema_decay": 0.9})
    devices = mesh.make_devices(1)
    program = policy.make_program(cfg, devices, 4)
    like = state.abstract(program.init, devices)
    frozen, trained = state.named(like.frozen), state.named(like.trained)
    prefix = "PaliGemma/llm"
    narrow = {name for name, x in frozen.items() if x.dtype == "bfloat16"}
    assert narrow == ({n for n in frozen if "norm" not in n} if dtype == "bfloat16" else set())
    assert {f"{prefix}/embedder/input_embedding", f"{prefix}/layers/mlp_1/linear"} <= frozen.keys() - trained.keys()
    assert {x.dtype for x in trained.values()} == {jnp.dtype("float32")} and "state_proj/kernel" in trained
    count = len(trained)
    assert [len(jax.tree.leaves(tree)) for tree in (like.opt_state, like.ema)] == [2 * count + 2, count]
    assert {str(x.dtype) for x in jax.tree.leaves((like.opt_state, like.ema))} == {"float32", "int32"}
    fresh = state.create(program.init, 0, like)
    assert jax.tree.map(lambda x: x.dtype, fresh) == jax.tree.map(lambda x: x.dtype, like)


@pytest.mark.parametrize("family, cameras", [("pi0", ("base_0_rgb",)), ("pi05", ())])
def test_parameters_cast_at_use_change_nothing_when_narrow(tmp_path, family, cameras):
    """A bfloat16 model gives the same numbers from the narrow parameters of inference."""
    expert = "dummy_lora"
    model = factory.model(family=family, dtype="bfloat16", action_expert_variant=expert, cameras=cameras)
    model = dataclasses.replace(model, siglip_variant="tiny", image_size=28)
    graphs = [Graph(lambda rngs: Pi0(model, rngs), dtype_of=of) for of in (None, precision.inference("bfloat16"))]
    wide = jax.tree.map(lambda x: x + 0.01, graphs[0].init(jax.random.key(0)))  # nothing is zero
    narrow = jax.tree.map(lambda x, like: x.astype(like.dtype), wide, graphs[1].shapes)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (wide, narrow)]
    assert sizes[1] < 0.6 * sizes[0]
    rng = np.random.default_rng(0)
    observation = {
        "state": rng.normal(size=(2, 32)).astype(np.float32),
        "images": {camera: rng.integers(0, 256, (2, 28, 28, 3), np.uint8) for camera in cameras},
        "image_masks": {camera: np.ones(2, bool) for camera in cameras},
        "tokenized_prompt": np.ones((2, 4), np.int32),
        "tokenized_prompt_mask": np.ones((2, 4), bool),
    }
    observation, noise = jax.tree.map(jnp.asarray, (observation, rng.normal(size=(2, 4, 32)).astype(np.float32)))
    sample = jax.jit(lambda params: graphs[0].module(params).sample_actions(observation, noise, 2))
    np.testing.assert_array_equal(sample(wide), sample(narrow))


def test_a_seed_keeps_its_model():
    """The first numbers of version 7f2472e: its layers drew them in this order, and a run is known by its seed."""
    drawn = nnx.state(Pi0(factory.model(), nnx.Rngs(0)))
    firsts = {"/".join(map(str, path)): jnp.ravel(x[...])[0] for path, x in nnx.to_flat_state(drawn)}
    expected = {
        "state_proj/kernel": 0.018245088,
        "action_in_proj/kernel": -0.109897055,
        "action_time_mlp_in/kernel": 0.028026596,
        "action_time_mlp_out/kernel": -0.041079268,
        "action_out_proj/kernel": -0.026577836,
    }
    np.testing.assert_allclose([firsts[name] for name in expected], list(expected.values()), rtol=1e-5)
