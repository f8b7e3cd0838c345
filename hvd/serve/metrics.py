"""What a server counts: requests by outcome, latencies, batch sizes; as a log line and as Prometheus text."""

import collections
import threading
import time
from collections.abc import Iterable

import numpy as np

OUTCOMES = ("answered", "refused", "failed", "abandoned")
_WINDOW = 10_000  # latencies that quantiles are taken of


class Metrics:
    """Counters of one server; safe to use from several threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._begin = time.monotonic()
        self._outcomes: dict[str, int] = dict.fromkeys(OUTCOMES, 0)
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
            rate = (total - before) / max(now - since, 1e-9)
            return (
                f"requests: {counts}; {rate:.1f}/s; latency {latency}; inference {inference}; "
                f"batches (rows x count): {batches or 'none'}; connections: {self.connections}"
            )

    def prometheus(self, *, ready: bool, waiting: int) -> str:
        """Prometheus' text format 0.0.4."""
        with self._lock:
            lines: list[str] = []

            def add(name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> None:
                lines.extend([f"# HELP hvd_serve_{name} {text}", f"# TYPE hvd_serve_{name} {kind}"])
                lines.extend(f"hvd_serve_{name}{labels} {value:.9g}" for labels, value in samples)

            outcomes = [(f'{{outcome="{name}"}}', count) for name, count in self._outcomes.items()]
            add("requests_total", "counter", "Requests by how they ended.", outcomes)
            sizes = [(f'{{size="{size}"}}', count) for size, count in sorted(self._batches.items())]
            add("batches_total", "counter", "Batches by their compiled size.", sizes)
            add("rows_total", "counter", "Rows computed, padding not counted.", [("", self._rows)])
            for name, text in (("request", "From a message to its reply"), ("inference", "One batch")):
                times = self._times[name]
                p50, p99 = times.quantiles()
                lines.append(f"# HELP hvd_serve_{name}_seconds {text}; quantiles of the last {_WINDOW}.")
                lines.append(f"# TYPE hvd_serve_{name}_seconds summary")
                lines.append(f'hvd_serve_{name}_seconds{{quantile="0.5"}} {p50:.9g}')
                lines.append(f'hvd_serve_{name}_seconds{{quantile="0.99"}} {p99:.9g}')
                lines.append(f"hvd_serve_{name}_seconds_sum {times.total:.9g}")
                lines.append(f"hvd_serve_{name}_seconds_count {times.count}")
            add("connections", "gauge", "Open websocket connections.", [("", self.connections)])
            add("waiting", "gauge", "Requests that wait for the model.", [("", waiting)])
            add("ready", "gauge", "1 when requests are answered.", [("", int(ready))])
            add("uptime_seconds", "gauge", "Since the server's start.", [("", time.monotonic() - self._begin)])
            return "\n".join(lines) + "\n"


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
