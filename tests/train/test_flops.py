"""Counted FLOPs against numbers by hand, and against 6 N D at pi0's real size."""

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct as Shape

from hvd.experiments import get_config
from hvd.method import policy
from hvd.train import flops, mesh, stage_data, state

A, B = Shape((3, 5), jnp.float32), Shape((5, 7), jnp.bfloat16)
PRODUCT = 2 * 3 * 5 * 7


def test_products():
    assert flops.count(jnp.matmul, A, B) == PRODUCT
    heads = Shape((2, 4, 6, 8), jnp.float32)
    assert flops.count(lambda q, k: jnp.einsum("btnh,bsnh->bnts", q, k), heads, heads) == 2 * 2 * 6 * 4 * 4 * 8
    assert flops.count(lambda x: jnp.sin(x) + x.sum(), A) == 0


def test_through_transformations():
    assert flops.count(jax.jit(lambda a, b: jax.checkpoint(jnp.matmul)(a, b)), A, B) == PRODUCT
    layers = Shape((11, 5, 5), jnp.float32)

    def run(x, layers):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, layers)[0].sum()

    assert flops.count(run, A, layers) == 11 * 2 * 3 * 5 * 5
    # backward: one product for the input's gradient, one for the weight's
    assert flops.count(jax.grad(run, argnums=(0, 1)), A, layers) == 3 * 11 * 2 * 3 * 5 * 5
    # a frozen weight has no gradient of its own
    assert flops.count(jax.grad(run), A, layers) == 2 * 11 * 2 * 3 * 5 * 5

    @jax.custom_vjp
    def product(a, b):
        return a @ b

    product.defvjp(lambda a, b: (a @ b, (a, b)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    square = Shape((4, 4), jnp.float32)
    assert flops.count(jax.grad(lambda a, b: product(a, b).sum()), square, square) == 3 * 2 * 4**3


def test_branches_and_loops():
    def branch(p, a, b):
        return jax.lax.cond(p, lambda: (a @ b.astype(a.dtype)) @ jnp.ones((7, 7)), lambda: a @ b.astype(a.dtype))

    assert flops.count(branch, Shape((), jnp.bool_), A, B) == PRODUCT + 2 * 3 * 7 * 7
    square = Shape((4, 4), jnp.float32)
    loop = lambda n, x: jax.lax.fori_loop(0, n, lambda i, y: y @ x, x)  # noqa: E731
    assert flops.count(lambda x: loop(6, x), square) == 6 * 2 * 4**3
    with pytest.raises(ValueError, match="in a while loop"):
        flops.count(loop, 6, square)


def test_convolution():
    images, kernel = Shape((2, 28, 28, 3), jnp.float32), Shape((14, 14, 3, 9), jnp.float32)

    def patches(images, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(images, kernel, (14, 14), "VALID", dimension_numbers=numbers)

    once = 2 * (2 * 2 * 2) * 9 * (14 * 14 * 3)
    assert flops.count(patches, images, kernel) == once
    whole = jax.grad(lambda *args: patches(*args).sum(), argnums=(0, 1))
    assert flops.count(whole, images, kernel) == 3 * once


def test_a_part_of_each_device():
    devices = mesh.make_devices(1)
    rows = jax.sharding.PartitionSpec(("data", "fsdp"))
    part = jax.shard_map(jnp.dot, mesh=devices.mesh, in_specs=(rows, rows), out_specs=rows)
    square = Shape((4, 4), jnp.float32)
    assert flops.count(part, square, square) == 2 * 4**3


def test_abstract_batch_is_the_loaders(trained):
    devices = mesh.make_devices(1)
    for stage in ("value", "policy"):
        data = stage_data.open_data(trained, stage)
        loader = data.loader(0, devices, {})
        _, batch = next(loader)
        loader.close()
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), batch)
        wanted = stage_data.abstract_batch(trained, stage, devices)
        assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), wanted)


@pytest.mark.parametrize("lora", [False, True])
def test_pi0_at_its_real_size(lora):
    """Within a few percent of 6 (LoRA: 4 where frozen) FLOPs a weight and token."""
    cfg = get_config("pi0_r1_lora" if lora else "pi0_r1").resolved()
    devices = mesh.make_devices(1)
    found = flops.of_step(policy.make_program, cfg, "policy", devices)
    like = state.abstract(policy.make_program(cfg, devices, 21).init, devices)
    tokens = {"img": 3 * 256, "trunk": 3 * 256 + 48, "expert": 1 + cfg.model.action_horizon}
    total = 0
    for part, frozen in ((like.trained, False), (like.frozen, True)):
        for name, x in state.named(part).items():
            if "norm" in name or "bias" in name or "embedder" in name or "pos_embedding" in name:
                continue
            where = "img" if "/img/" in name else "trunk" if "/llm/" in name and "_1" not in name else "expert"
            total += (4 if frozen else 6) * tokens[where] * x.size
    assert total * cfg.policy.batch_size == pytest.approx(found, rel=0.06), found / total / cfg.policy.batch_size
