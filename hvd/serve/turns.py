"""Whose large message is worked on next: one part at a time, so that no request waits for those of 30 others.

The event loop reads the parts of messages, a thread decodes them, and both hold up whoever asks meanwhile.
"""

import asyncio
import collections
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol, runtime_checkable

PART = 1 << 16  # bytes of a message; those above are read in turns, a part (256 KiB at most) each
LARGE = 4 << 20  # bytes; those above take at most a third of the time while others ask
_ASKED_S = 1.0  # "while others ask": a smaller one came in this time
_PAUSE_S = 0.001  # until the next part of a large message, in which this one may come


@runtime_checkable
class Reads(Protocol):
    """A connection that is told when to read on."""

    held: int

    def pause(self) -> None: ...
    def go_on(self) -> None: ...


class Turns:
    """Connections in the middle of a message each read one part, then wait for their next turn."""

    def __init__(self):
        self._waiting: collections.OrderedDict[Reads, None] = collections.OrderedDict()
        self._large_at, self._asked_at = 0.0, -_ASKED_S  # when a large one may be next; when a smaller one came
        self._decoding = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None

    def asked(self) -> None:
        """A request came that is not large."""
        self._asked_at = time.monotonic()

    def took(self, connection: Reads, seconds: float) -> None:
        """The connection has read a part of a message in so many seconds: it waits for its next turn."""
        if connection.held > LARGE:
            self._spent(seconds)
        if connection.held > PART and connection not in self._waiting:
            connection.pause()
            self._waiting[connection] = None
            self._arm(0.0)

    async def decode[T](self, threads: Executor, work: Callable[[], T]) -> T:
        """work() on a large message in a thread; one at a time."""
        async with self._decoding:
            await asyncio.sleep(self._large_at - time.monotonic())
            begin = time.monotonic()
            try:
                return await asyncio.get_running_loop().run_in_executor(threads, work)
            finally:
                self._spent(time.monotonic() - begin)

    def _spent(self, seconds: float) -> None:
        now = time.monotonic()
        if now - self._asked_at < _ASKED_S:
            self._large_at = max(self._large_at, now + 2 * seconds)

    def _arm(self, delay: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay, self._next)

    def _next(self) -> None:
        """Let one connection read on."""
        now = time.monotonic()
        rest = now >= self._large_at
        chosen = next((each for each in self._waiting if rest or each.held <= LARGE), None)
        if chosen is not None:
            del self._waiting[chosen]
            if chosen.held > LARGE and now - self._asked_at < _ASKED_S:
                self._large_at = now + _PAUSE_S
            chosen.go_on()
        if self._waiting:
            self._arm(0.0 if chosen is not None else self._large_at - now)
