"""Layers by lax.scan and jax.checkpoint, in the place of hvd.models.stack (`bench_train_step --layers scan`)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hvd.models.stack import POLICIES, Layer, Remat


def run(
    segments: Sequence[tuple[Layer, int]],
    stacked: Any,
    x: Any,
    extra: Any = (),
    shared: Any = (),
    *,
    remat: Remat = "none",
    unroll: bool = False,
) -> tuple[Any, list[Any]]:
    """As hvd.models.stack.run."""
    leaves, tree = jax.tree.flatten((stacked, extra))
    counts = [count for _, count in segments]
    parts = [jax.lax.split(leaf, counts) if len(counts) > 1 else [leaf] for leaf in leaves]
    ys = []
    for i, (layer, count) in enumerate(segments):
        step = jax.checkpoint(layer, policy=POLICIES[remat], prevent_cse=unroll and remat != "none")
        mine = [part[i] for part in parts]
        if count > 1 and not unroll:

            def body(x: Any, at: Any, step: Layer = step) -> tuple[Any, Any]:
                return step(at[0], x, at[1], shared)

            x, y = jax.lax.scan(body, x, jax.tree.unflatten(tree, mine))
        else:
            outs = []
            for one in zip(*(jax.lax.split(leaf, [1] * count) for leaf in mine), strict=True):
                params, of_layer = jax.tree.unflatten(tree, [jnp.squeeze(leaf, 0) for leaf in one])
                x, y = step(params, x, of_layer, shared)
                outs.append(y)
            y = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)
        ys.append(y)
    return x, ys
