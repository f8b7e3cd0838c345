"""Where the arrays of a forward pass lie: rows of activations over all devices, one layer's weights whole at a time.

The models are written for one device and say here what must hold on many. All of it follows the ambient mesh
(`jax.set_mesh`, axes "data" and "fsdp"); without one, or on one device, nothing is done.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Shaped

BATCH_AXES = ("data", "fsdp")  # both split the rows of a batch; "fsdp" splits large parameters as well


def _mesh() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if set(BATCH_AXES) <= set(mesh.axis_names) and mesh.size > 1 else None


def distributed() -> bool:
    """Whether there is an ambient mesh of more than one device."""
    return _mesh() is not None


def rows(x: Shaped[Array, "n ..."]) -> Shaped[Array, "n ..."]:
    """x with its first axis split over all devices: else XLA may move activations rather than weights.

    An x whose rows do not split evenly (one request at a time, on many devices) is left as it is.
    """
    mesh = _mesh()
    if mesh is None or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


@jax.custom_vjp
def _whole(w: Array) -> Array:
    return jax.lax.with_sharding_constraint(w, PartitionSpec())


# The constraint is on the copy that is computed with; its gradient goes back to where the parameter lies, so that XLA
# can reduce and scatter it in one. The transpose of a plain constraint would make the whole gradient on every device.
_whole.defvjp(lambda w: (_whole(w), None), lambda _, grad: (grad,))


def weight(w: Shaped[Array, "..."], dtype: jnp.dtype) -> Shaped[Array, "..."]:
    """w in the dtype of the computation, whole on every device: cast where it lies, then gathered in that dtype.

    Call it where the weight is used, so that one layer's weights are whole at a time.
    """
    w = w.astype(dtype)
    mesh = _mesh()
    return w if mesh is None or mesh.shape["fsdp"] == 1 else _whole(w)


def platform() -> str:
    """What the program is compiled for, "cpu" or "gpu": the ambient mesh's devices, else the default backend's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()
