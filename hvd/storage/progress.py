"""How far a download is: a line that moves on a terminal, a line now and then in a log."""

import sys
import threading
import time
from collections import deque

_TERMINAL_S, _LOG_S = 0.5, 15.0
_WINDOW_S = 10.0  # the rate is that of the last seconds


class Progress:
    """Counts bytes from many threads and says at times how many there are, how fast they come, how long it will take.

    Args:
        what: what is fetched.
        total: its bytes.
    """

    def __init__(self, what: str, total: int):
        self._what, self._total = what, total
        self._terminal = sys.stderr.isatty()
        self._lock = threading.Lock()
        self._done = self._fetched = 0
        self._began = self._said = time.monotonic()
        self._past: deque[tuple[float, int]] = deque([(self._began, 0)])

    def add(self, count: int, *, fetched: bool = True) -> None:
        """`count` bytes more are there; not `fetched`: they were there already."""
        now = time.monotonic()
        with self._lock:
            self._done += count
            self._fetched += count if fetched else 0
            due = now - self._said >= (_TERMINAL_S if self._terminal else _LOG_S)
            if due:
                self._said = now
                self._past.append((now, self._fetched))
                while len(self._past) > 2 and now - self._past[0][0] > _WINDOW_S:
                    self._past.popleft()
                line = self.line()
        if due:
            self._print(line, last=False)

    def line(self) -> str:
        (then, before), (now, fetched) = self._past[0], self._past[-1]
        rate = (fetched - before) / (now - then) if now > then else 0.0
        text = f"{self._what}: {size(self._done)} of {size(self._total)}"
        if rate > 0:
            text += f", {size(rate)}/s, {max(0, self._total - self._done) / rate:.0f} s left"
        return text

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        took = time.monotonic() - self._began
        if kind is None:
            kept = self._total - self._fetched
            text = f"{self._what}: {size(self._total)} in {took:.1f} s ({size(self._fetched / max(took, 1e-3))}/s)"
            self._print(text + (f"; {size(kept)} of it were here already" if kept > 0 else ""), last=True)
        elif self._terminal:
            print(file=sys.stderr)

    def _print(self, line: str, *, last: bool) -> None:
        if self._terminal:
            print(f"\r{line}\x1b[K", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def size(count: float) -> str:
    """Bytes for people: 1.4 GB."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
