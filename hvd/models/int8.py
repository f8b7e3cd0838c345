"""Matrices that are kept in 8 bits while a policy is served: whole numbers, and one scale for each output.

What is narrow is how they are kept. Activations stay as they are. A product is computed with the whole numbers, each of
which bfloat16 has exactly, and its outputs are multiplied by the scales.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int8

from hvd.models import lora

_MOST = 127  # -128 is not used: what is kept of -w is minus what is kept of w


class Quantised(NamedTuple):
    """numbers * scale is the matrix, but for the rounding: at most half a scale a number."""

    numbers: Int8[Array, "i o"]
    scale: Float32[Array, "#i #o"]


type Matrix = Array | Quantised


def quantised(w: Float[Array, "i o"], axis: int = 0) -> Quantised:
    """The nearest multiples of a scale, which is the largest |w| along `axis` / 127 (1 where all are 0).

    Args:
        axis: 0 for a matrix that products are computed with: one scale an output. 1: one scale a row.
    """
    wide = w.astype(jnp.float32)
    scale = jnp.abs(wide).max(axis=axis, keepdims=True) / _MOST
    scale = jnp.where(scale > 0, scale, 1.0)
    return Quantised(jnp.round(wide / scale).astype(jnp.int8), scale)


def dense(x: Float[Array, "*rows i"], w: Matrix) -> Float[Array, "*rows o"]:
    """x @ w in the type of x, as hvd.models.lora.dense."""
    if not isinstance(w, Quantised):
        return lora.dense(x, w)
    y = lora.dense(x, w.numbers.astype(x.dtype)).astype(jnp.float32)
    return (y * w.scale.reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)


def rows(table: Matrix, index: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Rows of a table with one scale a row."""
    if not isinstance(table, Quantised):
        return table[index]
    return table.numbers[index] * table.scale[index]
