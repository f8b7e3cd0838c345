"""Gradients of a batch in micro-batches that one step scans over: `grad_accum_steps`.

The result does not depend on how many there are, but for rounding. A loss is a mean over rows whose numbers depend on
their own row alone; what belongs to the whole batch (random numbers, the shares of the datasets) is in its rows before
the split. Losses give numbers per row, and metrics are made of all rows at the end.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from hvd.train.mesh import Devices
from hvd.train.program import Batch
from hvd.train.state import Tree

type Rows = dict[str, Float[Array, "b ..."]]
type Losses = Callable[[Tree, Batch], tuple[Float[Array, ""], Rows]]
"""(trained parameters, batch) -> (mean loss of the batch's rows, numbers per row)."""

_ROWS = ("data", "fsdp")


def accumulate(losses: Losses, trained: Tree, batch: Batch, parts: int, devices: Devices) -> tuple[Tree, Rows]:
    """Gradients of the batch's mean loss, placed as the parameters are, and the numbers per row in the batch's order.

    Args:
        trained: parameters, float32; so are the sums of the gradients.
        parts: micro-batches; each device's rows are divided by it.
    """
    # Without this the partitioner may keep whole gradients on every device
    placed = devices.parameters(trained)
    if parts == 1:
        grads, rows = jax.grad(losses, has_aux=True)(trained, batch)
        return jax.lax.with_sharding_constraint(grads, placed), rows

    def part(params: Tree, micro: Batch) -> tuple[Float[Array, ""], Rows]:
        loss, rows = losses(params, micro)
        return loss / parts, rows

    def add(total: Tree, micro: Batch) -> tuple[Tree, Rows]:
        grads, rows = jax.grad(part, has_aux=True)(trained, micro)
        total = jax.tree.map(lambda a, g: a + g.astype(a.dtype), total, grads)
        return jax.lax.with_sharding_constraint(total, placed), rows

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
    start = jax.lax.with_sharding_constraint(zeros, placed)
    grads, rows = jax.lax.scan(add, start, split(batch, parts, devices))
    return grads, merge(rows, devices)


def evaluate(losses: Losses, trained: Tree, batch: Batch, parts: int, devices: Devices) -> Rows:
    """The numbers per row alone, in the same micro-batches: validation needs no more memory than training."""
    if parts == 1:
        return losses(trained, batch)[1]
    _, rows = jax.lax.scan(lambda _, micro: ((), losses(trained, micro)[1]), (), split(batch, parts, devices))
    return merge(rows, devices)


def split(batch: Any, parts: int, devices: Devices) -> Any:
    """[B, ...] -> [parts, B / parts, ...]; every device keeps the rows that it has."""

    def local(x: Array) -> Array:
        return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])

    one, several = PartitionSpec(_ROWS), PartitionSpec(None, _ROWS)
    mapped = functools.partial(jax.tree.map, local)
    return jax.shard_map(mapped, mesh=devices.mesh, in_specs=one, out_specs=several)(batch)


def merge(rows: Any, devices: Devices) -> Any:
    """The inverse of `split`."""

    def local(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    one, several = PartitionSpec(_ROWS), PartitionSpec(None, _ROWS)
    mapped = functools.partial(jax.tree.map, local)
    return jax.shard_map(mapped, mesh=devices.mesh, in_specs=several, out_specs=one)(rows)
