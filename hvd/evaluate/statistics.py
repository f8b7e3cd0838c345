"""The few statistics that evaluation needs: intervals, rank correlation.

scipy.stats is imported by the function that needs it: it takes longer than everything else that a report imports.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped


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
    """Share of successes with Wilson's score interval, good for small n and shares near 0 or 1. n must be positive."""
    from scipy.stats import binomtest

    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is not a share")
    interval = binomtest(successes, n).proportion_ci(0.95, "wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n)


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


def spearman(x: Shaped[np.ndarray, " n"], y: Shaped[np.ndarray, " n"]) -> float:
    """Rank correlation of `x` and `y` (Spearman's rho, ties averaged); 0 when one of them is constant."""
    from scipy.stats import spearmanr

    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    result: Any = spearmanr(x, y)
    return float(result.statistic)
