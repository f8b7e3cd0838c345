"""The few statistics that evaluation needs: intervals, rank correlation, area under the ROC curve. Pure numpy."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float, Shaped

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95% interval from n observations."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def wilson(successes: int, n: int) -> Estimate:
    """Share of successes with Wilson's score interval (E. B. Wilson, JASA 1927), good for small n and shares near 0
    or 1. n must be positive."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n}")
    p, z2 = successes / n, _Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Estimate(p, float(max(centre - half, 0.0)), float(min(centre + half, 1.0)), n)


def bootstrap(
    values: Float[np.ndarray, " n"],
    statistic: Callable[[np.ndarray], float] = lambda x: float(np.mean(x)),
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """A statistic (the mean) of `values` with the percentile bootstrap's 95% interval; the same seed gives
    the same interval."""
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("no values")
    rng = np.random.default_rng(seed)
    drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(statistic(values), float(low), float(high), len(values))


def ranks(values: Shaped[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Ranks 1..n; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def spearman(x: Shaped[np.ndarray, " n"], y: Shaped[np.ndarray, " n"]) -> float:
    """Rank correlation of `x` and `y` (Spearman's rho, ties averaged); 0 when one of them is constant."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else 0.0


def auc(scores: Float[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> float:
    """Probability that a positive's score is above a negative's (ties count half); NaN without both kinds."""
    p = int(positive.sum())
    q = len(positive) - p
    if p == 0 or q == 0:
        return float("nan")
    return float((ranks(scores)[positive].sum() - p * (p + 1) / 2) / (p * q))
