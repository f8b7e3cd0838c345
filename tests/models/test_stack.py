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
