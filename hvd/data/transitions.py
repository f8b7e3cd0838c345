"""K-step transitions from rows of a dataset (docs/method.md, "The value stage"). Pure numpy, without a loop over rows.

For row t of an episode whose frames end at E (exclusive), with the first terminal frame at or after t in it at T:

    n_real = min(K, E - t, T - t + 1)                    actions of the chunk that were really executed
    reward = sum_{j < n_real} gamma^j r[t+j]             rewards after a terminal frame do not count
    discount = gamma^n_real, or 0 if T lies in the chunk  (the factor of the value that the TD target bootstraps)
    next row = min(t + n_real, E - 1)
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, Int64

from hvd.data.dataset import Dataset


@dataclass(frozen=True)
class Chunk:
    """n chunks of K actions: absolute, in raw units. Where the mask is False the last real action is repeated."""

    actions: Float32[np.ndarray, "n k a"]
    action_mask: Bool[np.ndarray, "n k"]


@dataclass(frozen=True)
class Outcome:
    """What followed n chunks: K-step return, the factor of the bootstrapped value (0 after a terminal), next row."""

    reward: Float32[np.ndarray, " n"]
    discount: Float32[np.ndarray, " n"]
    next_row: Int64[np.ndarray, " n"]


class Transitions:
    """Gathers transitions of `dataset` with chunks of `horizon` actions and `gamma` per step."""

    def __init__(self, dataset: Dataset, horizon: int, gamma: float = 1.0):
        self.dataset, self.horizon, self.gamma = dataset, horizon, gamma
        n = dataset.num_frames
        lengths = np.asarray([e.length for e in dataset.all_episodes])
        ends = np.repeat(np.cumsum(lengths), lengths)
        # exclusive end of what can follow row t: its episode's end, or just after the first terminal at or after t
        over = np.where(dataset.terminal, np.arange(n) + 1, n + 1)
        after_terminal = np.minimum.accumulate(over[::-1])[::-1]
        self._last = ends - 1
        self._stop = np.minimum(ends, after_terminal)
        self._steps = np.arange(horizon)
        self._discounts = np.power(np.float64(gamma), np.arange(horizon + 1))

    def num_real(self, rows: Int[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Actions of each row's chunk that were executed, 1..horizon."""
        return np.minimum(self.horizon, self._stop[rows] - rows)

    def chunk(self, rows: Int[np.ndarray, " n"]) -> Chunk:
        """The chunks of actions that start at `rows`."""
        real = self.num_real(rows)
        steps = np.minimum(self._steps, real[:, None] - 1)
        return Chunk(self.dataset.actions[rows[:, None] + steps], self._steps < real[:, None])

    def outcome(self, rows: Int[np.ndarray, " n"]) -> Outcome:
        """Return, discount and next row of the chunks that start at `rows`."""
        real = self.num_real(rows)
        mask = self._steps < real[:, None]
        steps = rows[:, None] + np.minimum(self._steps, real[:, None] - 1)
        reward = (self.dataset.rewards[steps] * mask) @ self._discounts[:-1]
        terminal = self.dataset.terminal[rows + real - 1]
        discount = np.where(terminal, 0.0, self._discounts[real])
        next_row = np.minimum(rows + real, self._last[rows])
        return Outcome(reward.astype(np.float32), discount.astype(np.float32), next_row)
