"""Flow matching (openpi's convention: t = 1 is noise) and the per-level weighted policy loss.

Letters in shapes: b rows, k actions of a chunk, a action dims (padded), l kinematic levels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt


def sample_time(key: Key[Array, ""] | UInt[Array, "2"], rows: int) -> Float[Array, "b"]:
    """t ~ 0.001 + 0.999 Beta(1.5, 1), one per row."""
    return jax.random.beta(key, 1.5, 1.0, (rows,)) * 0.999 + 0.001


def interpolate(
    noise: Float[Array, "b k a"], actions: Float[Array, "b k a"], time: Float[Array, "b"] | Float[Array, "b k"]
) -> tuple[Float[Array, "b k a"], Float[Array, "b k a"]]:
    """x_t = t noise + (1-t) actions and its velocity u = noise - actions."""
    t = time.reshape(len(time), -1, 1)
    return t * noise + (1.0 - t) * actions, noise - actions


def after_prefix(
    time: Float[Array, "b"], action_mask: Bool[Array, "b k"], given: Int[Array, "b"]
) -> tuple[Float[Array, "b k"], Bool[Array, "b k"]]:
    """The time of each action and which ones count, where the first `given` actions of a row are there as they are: at
    time 0, and without an error.
    """
    free = jnp.arange(action_mask.shape[1])[None] >= given[:, None]
    return jnp.where(free, time[:, None], 0.0), action_mask & free


def level_errors(
    velocity: Float[Array, "b k a"],
    target: Float[Array, "b k a"],
    action_mask: Bool[Array, "b k"],
    levels: tuple[tuple[int, ...], ...],
) -> Float[Array, "b l"]:
    """Squared flow-matching error of each level: summed over its dims, divided by the number of dims of all levels,
    averaged over the real actions of the chunk. Padded dims belong to no level, padded actions do not count.
    """
    n_dims = sum(len(dims) for dims in levels)
    squared = jnp.square(velocity - target)
    per_level = jnp.stack([jnp.sum(squared[..., jnp.array(dims)], axis=-1) for dims in levels], axis=-1) / n_dims
    real = action_mask.astype(per_level.dtype)[..., None]
    return jnp.sum(per_level * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1.0)


def shares(imitated: Bool[Array, "b"]) -> Float[Array, "b"]:
    """What each row counts: rows of the batch / rows of its own side (imitated or weighted), so that a mean over the
    rows of a side, summed over both, is the mean over the batch of share * row. A part of a batch keeps the shares of
    the whole.
    """
    weighted = jnp.sum((~imitated).astype(jnp.float32))
    rows = jnp.where(imitated, imitated.shape[0] - weighted, weighted)
    return imitated.shape[0] / rows


def policy_loss(
    errors: Float[Array, "b l"],
    weights: Float[Array, "b l"],
    imitated: Bool[Array, "b"],
    bc_lambda: float,
    share: Float[Array, "b"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """L_pi = L_RL(weighted rows) + lambda L_BC(imitated rows); each a mean over the rows of its side of the batch.

    Args:
        errors: of `level_errors`.
        weights: omega_i of each row; they carry no gradient, and imitated rows ignore them.
        imitated: the row is of a set in the role "optimal".
        share: `shares` of the batch that these rows are a part of; default: they are the batch.
    """
    share = shares(imitated) if share is None else share
    optimal = imitated.astype(errors.dtype)
    weighted = jnp.sum(jax.lax.stop_gradient(weights) * errors, axis=-1)
    rl = jnp.mean(weighted * share * (1.0 - optimal))
    bc = jnp.mean(jnp.sum(errors, axis=-1) * share * optimal)
    return rl + bc_lambda * bc, {"loss_rl": rl, "loss_bc": bc}
