"""Dense maps as einsums, with optional low-rank (LoRA) updates; parameter names and arithmetic equal openpi's."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hvd.models.sharding import weight


@dataclass(frozen=True)
class LoraConfig:
    """Rank and strength of a low-rank update a @ b (Hu et al. 2021; rslora: Kalajdzievski 2023)."""

    rank: int
    alpha: float = 1.0
    rslora: bool = False  # scale alpha / sqrt(rank) instead of alpha / rank

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def param(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, depth: int | None = None) -> nnx.Param:
    """A float32 normal parameter of standard deviation `std` (0 = zeros).

    With `depth` the layers are stacked: shape [depth, *shape], the form that lax.scan over the layers takes.
    """
    shape = shape if depth is None else (depth, *shape)
    if std == 0:
        return nnx.Param(jnp.zeros(shape, jnp.float32))
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


def dense(x: Float[Array, "*rows i"], w: Float[Array, "i o"]) -> Float[Array, "*rows o"]:
    """x @ w with all rows along one axis: along two, w's gradient in bf16 is five times slower on a CPU."""
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


class Einsum(nnx.Module):
    """y = einsum(x, w) [+ scale * einsum(einsum(x, lora_a), lora_b)]; the update acts on the last two axes of w.

    Args:
        shape: of one layer's w, [..., in, out].
        fan_in: number of inputs that are summed for one output, for the initial scale.
        lora: adds lora_a [..., in, rank] and lora_b [..., rank, out]. lora_b starts at zero, so a freshly added update
            changes nothing.
        depth: stack this many layers.
    """

    def __init__(
        self, shape: tuple[int, ...], fan_in: int, lora: LoraConfig | None, rngs: nnx.Rngs, depth: int | None = None
    ):
        self.w = param(rngs, shape, fan_in**-0.5, depth)
        self.lora = lora
        if lora is not None:
            self.lora_a = param(rngs, (*shape[:-1], lora.rank), shape[-2] ** -0.5, depth)
            self.lora_b = param(rngs, (*shape[:-2], lora.rank, shape[-1]), 0.0, depth)

    def __call__(self, eqn: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """`eqn` is that of x and w, such as "btd,ndh->btnh"; w's last two labels are its input and output axis."""
        y = jnp.einsum(eqn, x, weight(self.w[...], x.dtype))
        if self.lora is None:
            return y
        # The rank axis takes the place of w's output axis on the way down and of its input axis on the way up. Where
        # the equation sums over a further axis of w (the heads of the output projection), openpi sums it in both maps.
        operands, out = eqn.split("->")
        x_axes, w_axes = operands.split(",")
        down = out.replace(w_axes[-1], "r")
        low = jnp.einsum(f"{x_axes},{w_axes[:-1]}r->{down}", x, weight(self.lora_a[...], x.dtype))
        up = jnp.einsum(f"{down},{w_axes[:-2]}r{w_axes[-1]}->{out}", low, weight(self.lora_b[...], x.dtype))
        return y + up * self.lora.scale


class FeedForward(nnx.Module):
    """Gated feed-forward: gelu(x @ g0) * (x @ g1) @ linear. Its LoRA updates are added unscaled, as in openpi."""

    def __init__(self, width: int, hidden: int, lora: LoraConfig | None, rngs: nnx.Rngs, depth: int | None = None):
        self.gating_einsum = param(rngs, (2, width, hidden), width**-0.5, depth)
        self.linear = param(rngs, (hidden, width), hidden**-0.5, depth)
        self.has_lora = lora is not None
        if lora is not None:
            self.gating_einsum_lora_a = param(rngs, (2, width, lora.rank), width**-0.5, depth)
            self.gating_einsum_lora_b = param(rngs, (2, lora.rank, hidden), 0.0, depth)
            self.linear_lora_a = param(rngs, (hidden, lora.rank), hidden**-0.5, depth)
            self.linear_lora_b = param(rngs, (lora.rank, width), 0.0, depth)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        w = weight(self.gating_einsum[...], x.dtype)
        gate, value = dense(x, w[0]), dense(x, w[1])
        if self.has_lora:
            a, b = weight(self.gating_einsum_lora_a[...], x.dtype), weight(self.gating_einsum_lora_b[...], x.dtype)
            gate, value = (y + dense(dense(x, a[i]), b[i]) for i, y in enumerate((gate, value)))
        hidden = nnx.gelu(gate) * value
        y = dense(hidden, weight(self.linear[...], x.dtype))
        if self.has_lora:
            low = dense(hidden, weight(self.linear_lora_a[...], x.dtype))
            y = y + dense(low, weight(self.linear_lora_b[...], x.dtype))
        return y
