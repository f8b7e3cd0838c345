"""Layers stacked along a leading axis of their parameters, run one after the other, with a backward pass of our own.

What differentiating `lax.scan` does not give: the last layer may be another function than the first ones without a
sliced copy of all parameters; gradients go into one buffer, in place; and a copy of a weight (cast, gathered from
other devices) is never kept for the backward pass but made again. Against lax.scan and jax.checkpoint this saves
4.4 GiB and 1 % of the time of a step of pi0 on an H200, 96 MB and 5 % of a small one's on a CPU (BENCHMARKS.md).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Remat = Literal["none", "dots", "full"]
# layer(params, x, extra, shared) -> (x, y), with one layer's parameters and extra inputs; shared is the same for all
Layer = Callable[[Any, Any, Any, Any], tuple[Any, Any]]
Leaves = tuple[Any, ...]

FEW = 6  # so few layers are compiled as straight code: faster on a CPU, and soon enough compiled

# Made again even by "none": casts, so that a value is kept in the narrower of two types, and copies of weights
_FREE = frozenset(
    {"convert_element_type", "sharding_constraint", "reshape", "transpose", "broadcast_in_dim", "squeeze", "slice"}
)


def _not_free(prim: Any, *_: Any, **__: Any) -> bool:
    return prim.name not in _FREE


POLICIES: dict[str, Callable[..., bool]] = {
    "none": _not_free,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


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
    """The x after all layers, and per segment the layers' y, stacked along a leading axis.

    Args:
        segments: (function, number of layers), in order; together no more than are stacked.
        stacked: parameters, every leaf [layers, ...].
        x: what goes from layer to layer; its form may change from segment to segment, not within one.
        extra: further inputs of each layer, every leaf [layers, ...].
        shared: inputs that all layers have in common.
        remat: what of a layer the backward pass computes again: "none" but casts, "dots" all but the products with
            weights, "full" everything from the layer's input.
        unroll: as straight code instead of a loop: for few layers.
    """
    trees = [jax.tree.structure(part) for part in (stacked, x, extra, shared)]
    plan = _Plan(segments, trees, remat, unroll)
    go = jax.custom_vjp(plan.primal)
    go.defvjp(plan.forward, plan.backward, symbolic_zeros=True)
    flat, ys = go(*(tuple(jax.tree.leaves(part)) for part in (stacked, x, extra, shared)))
    return jax.tree.unflatten(plan.forms[-1], flat), ys


class _Plan:
    """One call of `run`. Its functions work on leaves: (params, x, extra, shared)."""

    def __init__(self, segments: Sequence[tuple[Layer, int]], trees: Sequence[Any], remat: Remat, unroll: bool):
        self.segments, self.unroll, self.policy = segments, unroll, POLICIES[remat]
        # In straight code XLA sees a value and its recomputation side by side and would merge them
        self.keep_apart = unroll and remat != "none"
        self.params_tree, x_tree, self.extra_tree, self.shared_tree = trees
        self.forms = [x_tree] * (len(segments) + 1)  # of x, before each segment and at the end

    def layer(self, segment: int) -> Callable[[Leaves, Leaves, Leaves, Leaves], tuple[Leaves, Any]]:
        def function(params: Leaves, x: Leaves, extra: Leaves, shared: Leaves) -> tuple[Leaves, Any]:
            out, y = self.segments[segment][0](
                jax.tree.unflatten(self.params_tree, params),
                jax.tree.unflatten(self.forms[segment], x),
                jax.tree.unflatten(self.extra_tree, extra),
                jax.tree.unflatten(self.shared_tree, shared),
            )
            flat, self.forms[segment + 1] = jax.tree.flatten(out)
            return tuple(flat), y

        return function

    def each(self, segment: int, body: Callable, carry: Any, scanned: Any = None, reverse: bool = False) -> Any:
        """lax.scan of body(carry, layer's number, scanned); straight code takes and gives lists for what is scanned."""
        start, count = sum(count for _, count in self.segments[:segment]), self.segments[segment][1]
        if count > 1 and not self.unroll:
            numbers = jnp.arange(start, start + count)
            return jax.lax.scan(lambda carry, at: body(carry, *at), carry, (numbers, scanned), reverse=reverse)
        outs: list[Any] = [None] * count
        for i in reversed(range(count)) if reverse else range(count):
            carry, outs[i] = body(carry, start + i, None if scanned is None else scanned[i])
        return carry, outs

    def primal(self, params: Leaves, x: Leaves, extra: Leaves, shared: Leaves) -> tuple[Leaves, list[Any]]:
        ys = []
        for segment in range(len(self.segments)):
            layer = self.layer(segment)

            def body(x: Leaves, i: Any, _: Any, layer: Callable = layer) -> tuple[Leaves, Any]:
                return layer(_take(params, i), x, _take(extra, i), shared)

            x, y = self.each(segment, body, x)
            ys.append(_joined(y))
        return x, ys

    def forward(self, *inputs: Any) -> tuple[Any, Any]:
        params, x, extra, shared = (tuple(leaf.value for leaf in part) for part in inputs)
        moving = [tuple(leaf.perturbed for leaf in part) for part in inputs]
        moving[1] = (True,) * len(x)  # from the second layer on x depends on the parameters
        ys, backs = [], []
        for segment in range(len(self.segments)):
            layer = jax.checkpoint(self.layer(segment), policy=self.policy, prevent_cse=self.keep_apart)

            def body(x: Leaves, i: Any, _: Any, layer: Callable = layer) -> tuple[Leaves, Any]:
                args = _take(params, i), x, _take(extra, i), shared
                in_nzs = (moving[0], (True,) * len(x), moving[2], moving[3])
                (x, y), back = jax.vjp(layer, *args, saveable_args=(False, True, False, False), in_nzs=in_nzs)
                return x, (y, back)

            x, outs = self.each(segment, body, x)
            if isinstance(outs, list):
                ys.append(_joined([y for y, _ in outs]))
                backs.append([back for _, back in outs])
            else:
                ys.append(outs[0])
                backs.append(outs[1])
        return (x, ys), (params, extra, shared, backs, _Static(moving))

    def backward(self, saved: Any, cotangents: Any) -> tuple[Any, ...]:
        params, extra, shared, backs, moving = saved
        moving = moving.value
        d_x, d_ys = jax.tree.map(_dense, cotangents, is_leaf=_is_zero)
        sums = [
            tuple(map(jnp.zeros_like, _chosen(p, m)))
            for p, m in zip((params, extra, shared), _but_x(moving), strict=True)
        ]
        for segment in reversed(range(len(self.segments))):

            def body(carry: Any, i: Any, scanned: Any) -> tuple[Any, Any]:
                d_x, (d_params, d_extra, d_shared) = carry
                back, d_y = scanned
                back.args_res = [_take(params, i), back.args_res[1], _take(extra, i), shared]  # only x was saved
                of_params, d_x, of_extra, of_shared = back((d_x, d_y))
                d_params = tuple(_put(d, of, i) for d, of in zip(d_params, _chosen(of_params, moving[0]), strict=True))
                d_extra = tuple(_put(d, of, i) for d, of in zip(d_extra, _chosen(of_extra, moving[2]), strict=True))
                d_shared = tuple(d + of for d, of in zip(d_shared, _chosen(of_shared, moving[3]), strict=True))
                return (d_x, (d_params, d_extra, d_shared)), None

            back, d_y = backs[segment], d_ys[segment]
            scanned = (back, d_y)
            if isinstance(back, list):
                scanned = [(b, _take(d_y, i)) for i, b in enumerate(back)]
            (d_x, sums), _ = self.each(segment, body, (d_x, tuple(sums)), scanned, reverse=True)
        d_params, d_extra, d_shared = (_spread(s, m) for s, m in zip(sums, _but_x(moving), strict=True))
        return d_params, d_x, d_extra, d_shared


@jax.tree_util.register_static
class _Static:
    """A value that is known when the program is traced, among those that are not."""

    def __init__(self, value: Any):
        self.value = value


def _but_x(parts: Sequence[Any]) -> list[Any]:
    return [parts[0], parts[2], parts[3]]


def _take(tree: Any, i: Any) -> Any:
    """Layer i of every leaf."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), tree)


def _put(stacked: jax.Array, part: jax.Array, i: Any) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, part, i, 0)


def _joined(ys: Any) -> Any:
    """Straight code's list of y, stacked as a loop gives them."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys) if isinstance(ys, list) else ys


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, SymbolicZero)


def _dense(leaf: Any) -> Any:
    return jnp.zeros(leaf.shape, leaf.dtype) if _is_zero(leaf) else leaf


def _chosen(leaves: Sequence[Any], flags: Sequence[bool]) -> Leaves:
    return tuple(leaf for leaf, flag in zip(leaves, flags, strict=True) if flag)


def _spread(chosen: Sequence[Any], flags: Sequence[bool]) -> Leaves:
    """The inverse of `_chosen`, None (no gradient) elsewhere."""
    rest = iter(chosen)
    return tuple(next(rest) if flag else None for flag in flags)
