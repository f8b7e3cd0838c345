"""What a server counts: requests by outcome, latencies, batch sizes; as a log line and as Prometheus text."""

import collections
import threading
import time
from collections.abc import Iterator

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

OUTCOMES = ("answered", "late", "refused", "failed", "abandoned")
_WINDOW = 10_000  # latencies that quantiles are taken of


class Metrics:
    """Counters of one server; safe to use from several threads.

    Args:
        kept, weight_bytes: what it serves: the type of the large matrices, the size of all weights.
    """

    def __init__(self, kept: str = "", weight_bytes: int = 0):
        self._weights = kept, weight_bytes
        self._lock = threading.Lock()
        self._begin = time.monotonic()
        self._outcomes: dict[str, int] = dict.fromkeys(OUTCOMES, 0)
        self._denied: collections.Counter[str] = collections.Counter()
        self._batches: collections.Counter[int] = collections.Counter()
        self._rows = 0
        self._times = {name: _Times() for name in ("request", "inference")}
        self._last = (self._begin, 0)  # when the last line was made, and the requests until then
        self.connections = 0

    def request(self, outcome: str, seconds: float) -> None:
        """One request: `seconds` from its message's arrival until its reply was handed to the socket."""
        with self._lock:
            self._outcomes[outcome] += 1
            if outcome == "answered":
                self._times["request"].add(seconds)

    def deny(self, reason: str) -> None:
        """A connection was refused or dropped: "key", "places", "handshake", "frames", "memory", "idle"."""
        with self._lock:
            self._denied[reason] += 1

    def batch(self, size: int, rows: int, seconds: float) -> None:
        """One batch of `rows` real rows, computed at `size`."""
        with self._lock:
            self._batches[size] += 1
            self._rows += rows
            self._times["inference"].add(seconds)

    @property
    def requests(self) -> int:
        return sum(self._outcomes.values())

    def line(self, *, whole: bool = False) -> str:
        """One line about the whole life of the server, its rate since the last line (or, `whole`, since its start)."""
        with self._lock:
            now, total = time.monotonic(), sum(self._outcomes.values())
            since, before = (self._begin, 0) if whole else self._last
            self._last = now, total
            counts = ", ".join(f"{count} {name}" for name, count in self._outcomes.items() if count) or "none"
            latency, inference = (self._times[name].text() for name in ("request", "inference"))
            batches = " ".join(f"{size}x{count}" for size, count in sorted(self._batches.items()))
            denied = "".join(f"; denied for {reason}: {count}" for reason, count in sorted(self._denied.items()))
            rate = (total - before) / max(now - since, 1e-9)
            return (
                f"requests: {counts}; {rate:.1f}/s; latency {latency}; inference {inference}; "
                f"batches (rows x count): {batches or 'none'}; connections: {self.connections}{denied}"
            )

    def prometheus(self, *, ready: bool, waiting: int) -> str:
        """Prometheus' text format 0.0.4."""
        with self._lock:
            registry = CollectorRegistry()
            registry.register(_Families(list(self._families(ready, waiting))))
            return generate_latest(registry).decode()

    def _families(self, ready: bool, waiting: int) -> Iterator[Metric]:
        for name, text, label, counts in (
            ("requests", "Requests by how they ended.", "outcome", self._outcomes),
            ("denied", "Connections refused or dropped.", "reason", {"key": 0, "places": 0} | self._denied),
            ("batches", "Batches by their compiled size.", "size", dict(sorted(self._batches.items()))),
        ):
            family = CounterMetricFamily(f"hvd_serve_{name}", text, labels=[label])
            for key, count in counts.items():
                family.add_metric([str(key)], count)
            yield family
        yield CounterMetricFamily("hvd_serve_rows", "Rows computed, padding not counted.", value=self._rows)
        for name, text in (("request", "From a message to its reply"), ("inference", "One batch")):
            times, name = self._times[name], f"hvd_serve_{name}_seconds"
            family = SummaryMetricFamily(
                name, f"{text}; quantiles of the last {_WINDOW}.", count_value=times.count, sum_value=times.total
            )
            for quantile, value in zip(("0.5", "0.99"), times.quantiles(), strict=True):
                family.add_sample(name, {"quantile": quantile}, value)
            yield family
        for name, text, value in (
            ("connections", "Open websocket connections.", self.connections),
            ("waiting", "Requests that wait for the model.", waiting),
            ("ready", "1 when requests are answered.", int(ready)),
            ("uptime_seconds", "Since the server's start.", time.monotonic() - self._begin),
        ):
            yield GaugeMetricFamily(f"hvd_serve_{name}", text, value=value)
        weights = GaugeMetricFamily("hvd_serve_weights_bytes", "By the type of the large matrices.", labels=["kept"])
        weights.add_metric([self._weights[0]], self._weights[1])
        yield weights


class _Families(Collector):
    def __init__(self, families: list[Metric]):
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


class _Times:
    """Sum, count, and a window for quantiles."""

    def __init__(self):
        self.total, self.count = 0.0, 0
        self._window: collections.deque[float] = collections.deque(maxlen=_WINDOW)

    def add(self, seconds: float) -> None:
        self.total += seconds
        self.count += 1
        self._window.append(seconds)

    def quantiles(self) -> tuple[float, float]:
        """p50 and p99 in seconds; NaN before the first one."""
        if not self._window:
            return float("nan"), float("nan")
        p50, p99 = np.quantile(np.asarray(self._window), (0.5, 0.99))
        return float(p50), float(p99)

    def text(self) -> str:
        """The quantiles in milliseconds, for people."""
        if not self._window:
            return "-"
        p50, p99 = self.quantiles()
        return f"p50 {p50 * 1e3:.1f} ms p99 {p99 * 1e3:.1f} ms"
