"""Which rows a step's batch holds: a pure function of seed and step, so that a resumed run needs no iterator state."""

import threading
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int32, Int64

from hvd.errors import UserError

_CHANCES = 1 << 20  # no source has that number


class Order:
    """The order in which rows are visited.

    Each source is an endless stream of epochs; an epoch visits every row of the source once, in an order drawn from
    (seed, the source's number, epoch). A step takes the next `share` rows of each stream, so an epoch may end within a
    batch.

    Args:
        rows: rows of each source.
        shares: rows of each source per global batch; a source of share 0 is never visited.
        numbers: of the sources; default 0, 1, ...
    """

    def __init__(
        self,
        rows: Sequence[Int64[np.ndarray, " _"]],
        shares: Sequence[int],
        seed: int,
        numbers: Sequence[int] | None = None,
    ):
        numbers = range(len(rows)) if numbers is None else numbers
        for i, source, share in zip(numbers, rows, shares, strict=True):
            if share and not len(source):
                raise UserError(
                    f"dataset {i} has no rows to train on, but {share} rows of each batch must come from it"
                )
        self._rows, self._seed = dict(zip(numbers, rows, strict=True)), seed
        self._shares = dict(zip(numbers, shares, strict=True))
        self._source = np.repeat(np.asarray(numbers, np.int32), shares)
        self._epochs: dict[int, tuple[int, Int64[np.ndarray, " n"]]] = {}  # source -> (epoch, its order)
        self._lock = threading.Lock()

    @property
    def batch_size(self) -> int:
        return len(self._source)

    def batch_rows(self, step: int) -> tuple[Int32[np.ndarray, " b"], Int64[np.ndarray, " b"]]:
        """Source and row of each sample of the global batch of `step`."""
        parts = [self._stream(i, step * share, share) for i, share in self._shares.items()]
        return self._source, np.concatenate(parts)

    def slice(self, step: int, index: int, count: int) -> tuple[Int32[np.ndarray, " b"], Int64[np.ndarray, " b"]]:
        """The part of a step's batch that process `index` of `count` loads: a contiguous slice."""
        if self.batch_size % count:
            raise UserError(f"batch_size {self.batch_size} is not divisible by {count} processes")
        part = slice(self.batch_size // count * index, self.batch_size // count * (index + 1))
        source, rows = self.batch_rows(step)
        return source[part], rows[part]

    def chances(self, step: int, index: int, count: int) -> Float64[np.ndarray, " b"]:
        """A number from [0, 1) for each sample of `slice`, which depends on seed and step alone."""
        drawn = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, _CHANCES, step])))
        part = self.batch_size // count
        return drawn.random(self.batch_size)[part * index : part * (index + 1)]

    def _stream(self, source: int, start: int, count: int) -> Int64[np.ndarray, " count"]:
        """Rows number start .. start + count of a source's endless stream."""
        parts: list[np.ndarray] = [np.zeros(0, np.int64)]
        n = len(self._rows[source])
        while count:
            epoch, offset = divmod(start, n)
            take = min(count, n - offset)
            parts.append(self._epoch(source, epoch)[offset : offset + take])
            start, count = start + take, count - take
        return np.concatenate(parts)

    def _epoch(self, source: int, epoch: int) -> Int64[np.ndarray, " n"]:
        with self._lock:
            known = self._epochs.get(source)
            if known is None or known[0] != epoch:
                generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, source, epoch])))
                known = epoch, generator.permutation(self._rows[source])
                self._epochs[source] = known
            return known[1]
