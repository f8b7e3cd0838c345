"""Where a parameter lies on the mesh, as a table. It is openpi's rule; optimiser states and averages follow it."""

import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec

# First match counts: (dims at least, bytes at least, place). "largest": split over fsdp along the largest axis that it
# divides, of equal ones the later; "copy": on every device.
PARAMETER_RULES = (
    (2, 4 << 20, "largest"),
    (0, 0, "copy"),
)


def partition(shape: tuple[int, ...], dtype: Any, parts: int) -> PartitionSpec:
    """The place of an array of this shape on a mesh whose fsdp axis has `parts` devices."""
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    place = next(place for dims, least, place in PARAMETER_RULES if len(shape) >= dims and size >= least)
    divisible = [axis for axis, length in enumerate(shape) if length % parts == 0]
    if place == "copy" or parts == 1 or not divisible:
        return PartitionSpec()
    axis = max(divisible, key=lambda a: (shape[a], a))
    return PartitionSpec(*[None] * axis, "fsdp")
