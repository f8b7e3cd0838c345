"""Real-time chunking (Black, Galliker, Levine 2025): a new chunk that goes on from actions already committed.

While the policy computes a chunk, the robot executes the one before. The first `delay` actions of the new chunk will be
over when it is there, so they must be those that are executed; the further ones of the old chunk are followed the less
the later they are. A policy that is trained so (Black, Ren, Equi, Levine 2025) is given the first ones instead.
Imports no jax.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32


class Committed(NamedTuple):
    """What the flow is guided towards: normalised actions [b, k, a] and how much each one counts [b, k], 0 to 1."""

    actions: Any
    weights: Any


class Given(NamedTuple):
    """For a policy that is trained with prefixes: normalised actions [b, k, a], and which ones are given [b, k]."""

    actions: Any
    where: Any


def commit(actions: Float32[np.ndarray, "b n a"], delay: int, horizon: int, prefix_max: int = 0) -> Committed | Given:
    """What a new chunk of `horizon` actions is to go on from.

    Args:
        actions: normalised and padded, not executed yet; the first is executed now.
        delay: how many of them will be over when the new chunk is there.
        prefix_max: how many the policy is trained to be given; longer delays are guided.
    """
    rows, left = actions.shape[:2]
    padded = np.pad(actions, ((0, 0), (0, horizon - left), (0, 0)))
    if 0 < prefix_max >= delay:
        return Given(padded, np.tile(np.arange(horizon) < delay, (rows, 1)))
    return Committed(padded, np.tile(soft_mask(left, delay, horizon), (rows, 1)))


def soft_mask(left: int, delay: int, horizon: int) -> Float32[np.ndarray, "{horizon}"]:
    """How much each action of a chunk counts: 1 before `delay`, falling to 0 at the end of the `left` old ones."""
    c = np.clip((left - np.arange(horizon)) / (left - delay + 1), 0.0, 1.0)
    soft = c * np.expm1(c) / np.expm1(1.0)
    return np.where(np.arange(horizon) < delay, 1.0, soft).astype(np.float32)
