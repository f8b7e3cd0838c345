"""What the models ask of a mesh: nothing without one, and on one the rows split and the weights whole where used.

That sharded runs give the unsharded numbers is tested in tests/train/test_sharding.py.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from hvd.models import sharding

BF16 = jnp.dtype(jnp.bfloat16)


def traced(function, *args, mesh=None) -> str:
    if mesh is None:
        return str(jax.make_jaxpr(function)(*args))
    with jax.sharding.use_abstract_mesh(AbstractMesh(mesh, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)):
        return str(jax.make_jaxpr(function)(*args))


@pytest.mark.parametrize("mesh", [None, (1, 1)], ids=["none", "one device"])
def test_nothing_is_asked_without_a_mesh(mesh):
    def function(x, w):
        return sharding.rows(x) @ sharding.weight(w, BF16)

    text = traced(function, jnp.ones((8, 4), jnp.bfloat16), jnp.ones((4, 4)), mesh=mesh)
    assert "sharding_constraint" not in text and "convert_element_type" in text


def test_rows_are_split_over_both_axes_where_they_can_be():
    text = traced(sharding.rows, jnp.ones((8, 3)), mesh=(2, 4))
    assert "sharding_constraint" in text and "('data', 'fsdp')" in text
    assert "sharding_constraint" not in traced(sharding.rows, jnp.ones((2, 3)), mesh=(2, 4))


def test_weights_are_cast_before_they_are_gathered():
    text = traced(lambda w: sharding.weight(w, BF16), jnp.ones((4, 4)), mesh=(1, 8))
    assert 0 < text.index("convert_element_type") < text.index("sharding_constraint")
    # split over "data" alone, every device has all weights
    assert "sharding_constraint" not in traced(lambda w: sharding.weight(w, BF16), jnp.ones((4, 4)), mesh=(8, 1))


def test_a_weights_gradient_is_not_gathered():
    """One constraint forward, none backward: the gradient goes where the parameter lies."""
    loss = jax.grad(lambda w: jnp.sum(jnp.sin(sharding.weight(w, jnp.dtype(jnp.float32)))))
    assert traced(loss, jnp.ones((4, 4)), mesh=(1, 8)).count("sharding_constraint[") == 1


def test_platform():
    assert sharding.platform() == jax.default_backend()
