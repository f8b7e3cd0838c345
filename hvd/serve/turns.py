"""Whose message is worked on next: one part at a time, so that no request waits for those of 30 others.

The event loop reads the parts of messages, threads decode them, and both hold up whoever asks meanwhile.
"""

import asyncio
import contextlib
import heapq
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import Executor
from typing import Protocol, runtime_checkable

PART = 1 << 16  # bytes of a message; those above are read in turns, a part (256 KiB at most) each
LARGE = 1 << 18  # bytes; those above, of several parts, take at most a third of the time while others ask
SLOTS = max(1, min(2, len(os.sched_getaffinity(0)) - 1))  # messages up to LARGE that are decoded at a time
THREADS = SLOTS + 1  # and one of the others
_ASKED_S = 1.0  # "while others ask": a smaller one came in this time
_PAUSE_S = 0.001  # until the next part of a large message, in which this one may come


type Turn = tuple[float, float]  # start and end of a piece of work


class Shares:
    """Fair shares of work: the smallest `Turn` is next.

    Each piece of work starts, on a clock that counts work, where its client's last one ended, and now at the earliest.
    Of those that start together the shortest is next: one who asks now and then comes before many of one address.
    """

    def __init__(self):
        self._clock = 0.0  # the start of the latest piece that began
        self._ends: dict[Hashable, float] = {}  # client -> where its last piece ends on that clock

    def turn(self, client: Hashable, work: float, share: int = 1) -> Turn:
        """Of the client's next piece; `share`: clients that share what one of them gets elsewhere."""
        start = max(self._clock, self._ends.get(client, 0.0))
        self._ends = {name: end for name, end in self._ends.items() if end > self._clock}
        self._ends[client] = start + work * share
        return start, self._ends[client]

    def began(self, turn: Turn) -> None:
        self._clock = max(self._clock, turn[0])


class Slots:
    """A number of pieces of work at a time, in fair shares."""

    def __init__(self, number: int):
        self._free, self._shares, self._count = number, Shares(), itertools.count()
        self._queue: list[tuple[Turn, int, asyncio.Future[None]]] = []

    @contextlib.asynccontextmanager
    async def one(self, client: Hashable, work: float, share: int) -> AsyncIterator[None]:
        """Waits for a slot of one's own."""
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (self._shares.turn(client, work, share), next(self._count), granted))
        self._next()
        try:
            await granted
            yield
        finally:
            if not granted.cancelled():
                self._free += 1
                self._next()

    def _next(self) -> None:
        while self._free and self._queue:
            turn, _, granted = heapq.heappop(self._queue)
            if not granted.cancelled():  # else it has left
                self._free -= 1
                self._shares.began(turn)
                granted.set_result(None)


@runtime_checkable
class Reads(Protocol):
    """A connection that is told when to read on."""

    held: int

    @property
    def share(self) -> int:
        """How many connections share what one gets."""
        ...

    def pause(self) -> None: ...
    def go_on(self) -> None: ...


class Turns:
    """Connections in the middle of a message each read one part, then wait for their next turn."""

    def __init__(self):
        self._parts = Shares()
        self._waiting: dict[Reads, Turn] = {}
        self._large_at, self._asked_at = 0.0, -_ASKED_S  # when a large one may be next; when a smaller one came
        self._slots, self._large = Slots(SLOTS), Slots(1)
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
            self._waiting[connection] = self._parts.turn(connection, 1.0, connection.share)
            self._arm(0.0)

    async def decode[T](self, threads: Executor | None, work: Callable[[], T], size: int, connection: Reads) -> T:
        """work() on the connection's message of `size` bytes: a small one at once, others in a thread, in turns."""
        if size <= LARGE:
            self.asked()
        if size <= PART:
            return work()
        loop, share = asyncio.get_running_loop(), connection.share
        if size <= LARGE:
            async with self._slots.one(connection, size, share):
                return await loop.run_in_executor(threads, work)
        async with self._large.one(connection, size, share):
            await asyncio.sleep(self._large_at - time.monotonic())
            begin = time.monotonic()
            try:
                return await loop.run_in_executor(threads, work)
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
        ready = [each for each in self._waiting if rest or each.held <= LARGE]
        chosen = min(ready, key=self._waiting.__getitem__, default=None)
        if chosen is not None:
            self._parts.began(self._waiting.pop(chosen))
            if chosen.held > LARGE and now - self._asked_at < _ASKED_S:
                self._large_at = now + _PAUSE_S
            chosen.go_on()
        if self._waiting:
            self._arm(0.0 if chosen is not None else self._large_at - now)
