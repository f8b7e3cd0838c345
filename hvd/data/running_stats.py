"""Mean, spread and quantiles of vectors that come in batches, as openpi computes them."""

import dataclasses
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from hvd.errors import UserError

BINS = 5000


@dataclass(frozen=True)
class NormStats:
    """Mean, population std and the 1% and 99% quantiles per dim; openpi's may lack the quantiles."""

    mean: Float64[np.ndarray, " d"]
    std: Float64[np.ndarray, " d"]
    q01: Float64[np.ndarray, " d"] | None = None
    q99: Float64[np.ndarray, " d"] | None = None

    @property
    def dim(self) -> int:
        return len(self.mean)

    def lists(self) -> dict[str, list[float] | None]:
        """The numbers as JSON has them."""
        arrays = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return {name: None if array is None else array.tolist() for name, array in arrays}


class RunningStats:
    """Statistics of vectors that come in batches, as openpi computes them: quantiles from 5000 bins per dim.

    A batch outside the range seen so far widens the bins, and what was counted moves with the lower edge of its old
    bin; that may lose the lowest bin's counts (openpi's way too). `compute` gives the range beforehand instead.
    """

    def __init__(self, low: Float[np.ndarray, " d"] | None = None, high: Float[np.ndarray, " d"] | None = None):
        self.count = 0
        self._low, self._high = low, high
        self._edges: Float64[np.ndarray, "d bins_plus_1"] | None = None

    def update(self, batch: Float[np.ndarray, "*n d"]) -> None:
        batch = batch.reshape(-1, batch.shape[-1])
        if not len(batch):
            return
        wide = batch.astype(np.float64)
        low, high = wide.min(0), wide.max(0)
        mean, square = wide.mean(0), np.square(wide).mean(0)
        if self._edges is None:
            self._mean, self._square = np.zeros_like(mean), np.zeros_like(square)
            self._counts = np.zeros((batch.shape[1], BINS))
            self._low = low if self._low is None else self._low.astype(np.float64)
            self._high = high if self._high is None else self._high.astype(np.float64)
            # openpi widens the first range a little, so that constant dims have bins too
            self._edges = _linspace(self._low - 1e-10, self._high + 1e-10)
        if np.any(low < self._low) or np.any(high > self._high):
            self._low, self._high = np.minimum(low, self._low), np.maximum(high, self._high)
            edges = _linspace(self._low, self._high)
            self._counts = _histogram(self._edges[:, :-1].T, edges, self._counts.T)
            self._edges = edges
        self.count += len(batch)
        share = len(batch) / self.count
        self._mean += (mean - self._mean) * share
        self._square += (square - self._square) * share
        self._counts += _histogram(wide, self._edges)

    def result(self) -> NormStats:
        if self.count < 2 or self._edges is None:
            raise UserError("statistics need at least two frames")
        std = np.sqrt(np.maximum(0.0, self._square - np.square(self._mean)))
        return NormStats(self._mean, std, self._quantile(0.01), self._quantile(0.99))

    def _quantile(self, q: float) -> Float64[np.ndarray, " d"]:
        assert self._edges is not None
        reached = np.cumsum(self._counts, axis=1) < q * self.count
        return np.take_along_axis(self._edges, reached.sum(1)[:, None], axis=1)[:, 0]


def _linspace(low: np.ndarray, high: np.ndarray) -> Float64[np.ndarray, "d bins_plus_1"]:
    return np.linspace(low, high, BINS + 1, axis=1).astype(np.float64)


def _histogram(
    x: Float64[np.ndarray, "n d"], edges: Float64[np.ndarray, "d bins_plus_1"], weights: np.ndarray | None = None
) -> Float64[np.ndarray, "d bins"]:
    """np.histogram of each column with its own equidistant edges, in linear time; weights have the shape of x."""
    d = x.shape[1]
    low, high = edges[:, 0], edges[:, -1]
    width = np.where(high > low, high - low, 1.0)
    at = np.clip(((x - low) * (BINS / width)).astype(np.int64), 0, BINS - 1)
    # rounding can miss by one bin: compare with the edges themselves
    flat = edges.reshape(-1)
    base = np.arange(d) * (BINS + 1)
    at -= x < flat[base + at]
    at += (x >= flat[base + at + 1]) & (at < BINS - 1)
    inside = (x >= low) & (x <= high)
    index = (at + np.arange(d) * BINS)[inside]
    counts = np.bincount(index, None if weights is None else weights[inside], d * BINS)
    return counts.reshape(d, BINS).astype(np.float64)
