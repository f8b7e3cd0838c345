"""The stack of layers against lax.scan: values, gradients, what is saved, and a last layer of another kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from hvd.models import stack

LAYERS, WIDTH = 5, 4


def inputs(seed: int = 0):
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    stacked = {"w": make(LAYERS, WIDTH, WIDTH), "frozen": make(LAYERS, WIDTH)}
    x = {"a": make(3, WIDTH), "b": make(3, WIDTH)}
    return stacked, x, make(LAYERS, WIDTH), {"mask": jnp.asarray([True, True, False, True]), "scale": make(WIDTH)}


def layer(params, x, extra, shared):
    both = x["a"] + x["b"]
    hidden = jnp.tanh(both @ params["w"] + extra[None]) * jnp.where(shared["mask"], params["frozen"], 0.5)[None]
    return {"a": x["a"] + hidden, "b": x["b"] * shared["scale"][None]}, jnp.sum(hidden, axis=0)


def last(params, x, extra, shared):
    out, y = layer(params, x, extra, shared)
    return {"a": out["a"]}, {"sum": y}


def by_scan(stacked, x, extra, shared):
    x, ys = jax.lax.scan(lambda x, at: layer(at[0], x, at[1], shared), x, (stacked, extra))
    return x["a"], ys


def by_stack(stacked, x, extra, shared, **options):
    x, (first, final) = stack.run([(layer, LAYERS - 1), (last, 1)], stacked, x, extra, shared, **options)
    assert x.keys() == {"a"}
    return x["a"], jnp.concatenate([first, final["sum"]])


def total(run, **options):
    def loss(trained, extra, scale, x, rest):
        out, ys = run(
            {"w": trained, "frozen": rest["frozen"]}, x, extra, {"mask": rest["mask"], "scale": scale}, **options
        )
        return jnp.sum(jnp.square(out)) + jnp.sum(jnp.sin(ys))

    return loss


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "straight"])
@pytest.mark.parametrize("remat", stack.POLICIES)
def test_values_and_gradients_are_those_of_a_scan(remat, unroll):
    stacked, x, extra, shared = inputs()
    args = stacked["w"], extra, shared["scale"], x, {"frozen": stacked["frozen"], "mask": shared["mask"]}
    run = jax.jit(jax.value_and_grad(total(by_stack, remat=remat, unroll=unroll), argnums=(0, 1, 2, 3)))
    want = jax.value_and_grad(total(by_scan), argnums=(0, 1, 2, 3))(*args)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=2e-5, atol=2e-5), run(*args), want)


def kept(remat, dtype=jnp.bfloat16):
    """Shapes and types of what the backward pass of a narrow stack is given, but for its inputs."""
    stacked, x, _, _ = inputs()

    def narrow(params, x, extra, shared):
        gate, value = (x @ params["w"].astype(dtype) for _ in range(2))
        logits = jnp.einsum("ad,bd->ab", x, value).astype(jnp.float32)[None] * 1.0
        return x + jnp.einsum("cab,bd->ad", jax.nn.softmax(logits, axis=-1).astype(dtype), jnp.tanh(gate)), None

    def total(w):
        out, _ = stack.run([(narrow, LAYERS)], {"w": w}, x["a"].astype(dtype), remat=remat)
        return jnp.sum(out.astype(jnp.float32))

    _, back = jax.vjp(total, stacked["w"])
    return [(tuple(leaf.shape), leaf.dtype) for leaf in back.opaque_residuals]


def test_what_is_kept_for_the_backward_pass():
    weight = (LAYERS, WIDTH, WIDTH)
    found = {remat: kept(remat) for remat in stack.POLICIES}
    for remat, leaves in found.items():
        assert not [leaf for leaf in leaves if leaf[0] == weight and leaf[1] == jnp.bfloat16], f"{remat}: cast weights"
    assert len(found["full"]) < len(found["dots"]) < len(found["none"])
    per_layer = [leaf for leaf in found["full"] if leaf[0][:1] == (LAYERS,)]
    assert per_layer == [((LAYERS, 3, WIDTH), jnp.bfloat16)], "the layers' inputs alone"


def test_without_any_gradient_to_take_nothing_is_kept():
    """A stack whose inputs are all constants of the differentiated function."""
    stacked, x, extra, shared = inputs()

    def total(scale):
        out, _ = by_stack(stacked, x, extra, shared)
        return jnp.sum(out) * scale

    _, back = jax.vjp(total, 2.0)
    assert all(leaf.ndim == 0 for leaf in back.opaque_residuals)
