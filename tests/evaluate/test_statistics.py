"""Intervals, rank correlation and AUC against closed forms and brute force."""

import numpy as np
import pytest

from hvd.evaluate.credit import separation
from hvd.evaluate.statistics import bootstrap, spearman, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # R: prop.test(x, n, correct = FALSE)$conf.int
        (0, 10, 0.0, 0.27753279),
        (5, 10, 0.23659309, 0.76340691),
        (32, 40, 0.65243240, 0.89498310),
        (40, 40, 0.91237897, 1.0),
    ],
)
def test_wilson(successes, n, low, high):
    got = wilson(successes, n)
    assert got.mean == successes / n and got.n == n
    assert got.low == pytest.approx(low, abs=2e-3) and got.high == pytest.approx(high, abs=2e-3)
    # the interval's ends solve |p - x/n| = z sqrt(p (1-p) / n)
    for end in (got.low, got.high):
        if 0 < end < 1:
            gap = abs(end - successes / n)
            assert gap == pytest.approx(1.959963984540054 * np.sqrt(end * (1 - end) / n), abs=1e-12)


def test_wilson_refuses_nonsense():
    for successes, n in ((1, 0), (3, 2), (-1, 4)):
        with pytest.raises(ValueError):
            wilson(successes, n)


def test_bootstrap_covers_the_mean_and_is_reproducible():
    values = np.random.default_rng(0).normal(2.0, 1.0, 100)
    got = bootstrap(values)
    assert got == bootstrap(values)
    assert got.low < got.mean < got.high
    assert got.high - got.low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.15)
    constant = bootstrap(np.ones(5))
    assert (constant.mean, constant.low, constant.high) == (1, 1, 1)
    with pytest.raises(ValueError):
        bootstrap(np.zeros(0))


def test_spearman():
    x = np.arange(10)
    assert spearman(x, np.exp(x)) == pytest.approx(1)
    assert spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, np.ones(10)) == 0
    # 1 - 6 sum d^2 / (n (n^2 - 1)) without ties
    y = np.random.default_rng(1).permutation(10)
    assert spearman(x, y) == pytest.approx(1 - 6 * ((x - y) ** 2).sum() / (10 * 99))


def test_auc_against_pairs():
    rng = np.random.default_rng(2)
    scores, positive = rng.integers(0, 6, 60).astype(np.float32), rng.random(60) < 0.3
    episode = np.arange(60) // 6
    negative = ~positive & (episode != 3)

    def share(rows: np.ndarray) -> float:
        p, n = scores[rows][positive[rows]][:, None], scores[rows][negative[rows]][None]
        return ((p > n) + 0.5 * (p == n)).mean()

    found = separation(scores, episode, positive, negative)
    assert found and found["mean"] == pytest.approx(share(np.arange(60))) and found["n"] == positive.sum()
    again, drawn = np.random.default_rng(0), []
    for _ in range(200):  # the bootstrap over episodes, by rows
        drawn.append(share(np.concatenate([6 * e + np.arange(6) for e in again.integers(0, 10, 10)])))
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    assert separation(scores, episode, np.zeros(60, bool), negative) is None
