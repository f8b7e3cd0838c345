"""Statistics of a LeRobot dataset, per episode and over all of them, as meta/episodes and meta/stats.json hold them."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

QUANTILES = (0.01, 0.10, 0.50, 0.90, 0.99)
QUANTILE_KEYS = tuple(f"q{round(100 * q):02d}" for q in QUANTILES)

Stats = dict[str, Float64[np.ndarray, " ..."]]


class ImageStats:
    """Statistics of a camera's images as LeRobot defines them, one frame at a time: per channel, of values in [0, 1],
    over about T^0.75 (at least 100) evenly spaced frames, large images thinned to about 150 pixels a side."""

    def __init__(self, num_frames: int):
        samples = max(min(num_frames, 100), min(int(num_frames**0.75), 10_000))
        self._wanted = np.unique(np.round(np.linspace(0, num_frames - 1, samples)).astype(int))
        self._counts = np.zeros((3, 256), np.int64)
        self._seen = 0

    def add(self, first: int, block: UInt8[np.ndarray, "n h w 3"]) -> None:
        """Count the frames `first` to `first + n` of the episode, those that belong to the sample."""
        height, width = block.shape[1:3]
        thin = 1 if max(height, width) < 300 else int((width if width > height else height) / 150)
        counted = self._wanted[np.searchsorted(self._wanted, first) : np.searchsorted(self._wanted, first + len(block))]
        if len(counted):
            # the frames, one above the other
            tall = block[counted - first, ::thin, ::thin].reshape(-1, len(range(0, width, thin)), 3)
            self._counts += np.asarray(Image.fromarray(tall).histogram()).reshape(3, 256)
            self._seen += len(counted)

    def result(self) -> Stats:
        """min, max, mean, std and quantiles of shape [3, 1, 1]; count [1] is the number of frames looked at."""
        values = np.arange(256) / 255.0
        total = self._counts.sum(axis=1)
        mean = self._counts @ values / total
        spread = np.square(values[None, :] - mean[:, None])
        cumulative = np.cumsum(self._counts, axis=1)
        stats = {
            "min": values[np.argmax(self._counts > 0, axis=1)],
            "max": values[255 - np.argmax(self._counts[:, ::-1] > 0, axis=1)],
            "mean": mean,
            "std": np.sqrt((self._counts * spread).sum(axis=1) / total),
        }
        for key, q in zip(QUANTILE_KEYS, QUANTILES, strict=True):
            stats[key] = values[np.argmax(cumulative >= q * total[:, None] - 1e-6, axis=1)]
        shaped = {key: value.reshape(3, 1, 1) for key, value in stats.items()}
        return shaped | {"count": np.array([float(self._seen)])}


def column_stats(values: np.ndarray) -> Stats:
    """Statistics of a numeric column [T] or [T, d], each of shape [d]; count is [T]. Quantiles are values that occur
    (the smallest whose share of the frames reaches q)."""
    table = values.reshape(len(values), -1).astype(np.float64)
    ordered = np.sort(table, axis=0)
    stats = {"min": ordered[0], "max": ordered[-1], "mean": table.mean(axis=0), "std": table.std(axis=0)}
    for key, q in zip(QUANTILE_KEYS, QUANTILES, strict=True):
        # 1e-9: 0.1 * 30 is 3.0000000000000004
        stats[key] = ordered[max(0, math.ceil(q * len(table) - 1e-9) - 1)]
    return stats | {"count": np.array([float(len(table))])}


class TotalStats:
    """The statistics of a feature over all episodes so far: pooled mean and deviation; quantiles are the episodes'
    quantiles averaged by their frames, as LeRobot has it (norm-stats computes real ones for training)."""

    def __init__(self, stats: Stats):
        self._stats = dict(stats)
        self._squares = np.square(stats["std"]) * stats["count"]

    def add(self, stats: Stats) -> None:
        total, n, m = self._stats, self._stats["count"], stats["count"]
        delta = stats["mean"] - total["mean"]
        self._squares = self._squares + np.square(stats["std"]) * m + np.square(delta) * (n * m / (n + m))
        for key in ("mean", *QUANTILE_KEYS):
            total[key] = total[key] + (stats[key] - total[key]) * (m / (n + m))
        total["min"], total["max"] = np.minimum(total["min"], stats["min"]), np.maximum(total["max"], stats["max"])
        total["count"] = n + m

    def json(self) -> dict[str, Any]:
        stats = self._stats | {"std": np.sqrt(self._squares / self._stats["count"])}
        return {key: plain(key, value) for key, value in stats.items()}


def plain(name: str, value: np.ndarray) -> list[Any]:
    """The statistic `name` as nested lists of Python numbers; counts are whole."""
    return np.atleast_1d(value.astype(np.int64) if name == "count" else value).tolist()
