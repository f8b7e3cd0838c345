"""What one client may take from the others: places, bytes, frames, guesses at the key; and a log that stays short."""

import asyncio
import collections
import resource
import ssl
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import CTRL_OPCODES, CloseCode, Frame
from websockets.protocol import State

from hvd.errors import UserError, one_line
from hvd.serve.metrics import Metrics
from hvd.serve.turns import Turns

_HALF_OPEN = 64  # connections that are no websocket yet, or only asked for /healthz
_SLICE = 1 << 14  # bytes that are read of one connection before it may be dropped
_SMALL_FRAME = 1 << 10  # bytes; pings, and parts of a message below it, are counted
_FRAMES, _FRAMES_PER_S = 1_000, 100  # such frames at once, and a second
_GUESSES_PER_S = 5  # keys that are looked at from an address that has sent a wrong one
_HTTP_PER_S, _HTTP = 100, 50  # connections and plain HTTP requests of an address a second, and at once
_ADDRESSES = 10_000  # that are remembered


@dataclass(frozen=True)
class Limits:
    """What one client may take from the others.

    Attributes:
        message: bytes of a request; a little more is read and refused, much more closes the connection.
        memory: bytes of all messages that are being received or answered; 0 = 8 messages.
        connections: at the same time.
        ping, pong: seconds between pings, and until a client that does not answer one is dropped.
        send: seconds for a client to take its reply.
        open: seconds for the websocket handshake, and until a client that asks nothing may lose its place to another.
        idle: seconds until a client that has asked before may lose its place, when there is none left.
        pause: seconds until the next message of a client is read after one that was refused.
        drain: seconds for requests in flight when the server stops.
    """

    message: int = 32 << 20
    memory: int = 0
    connections: int = 32
    ping: float = 20.0
    pong: float = 40.0
    send: float = 20.0
    open: float = 10.0
    idle: float = 60.0
    pause: float = 0.05
    drain: float = 20.0


def allow_files(connections: int) -> None:
    """Let this process open a file for each connection; UserError where it may not."""
    need = connections + 2 * _HALF_OPEN + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= need:
        return
    if hard != resource.RLIM_INFINITY and hard < need:
        raise UserError(
            f"--max-connections {connections} needs {need} open files, the limit is {hard}: ulimit -n {need}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


class Sparingly:
    """Lines on stderr, one a second at most; the next one says how many were left out."""

    def __init__(self):
        self._said, self._left_out = -1.0, 0

    def say(self, *lines: str) -> None:
        """Foreign text in `lines` cannot forge others: what is not printable is escaped."""
        if time.monotonic() - self._said < 1.0:
            self._left_out += 1
            return
        more = f" (and {self._left_out} more since the last line)" if self._left_out else ""
        self._said, self._left_out = time.monotonic(), 0
        print("\n".join(map(one_line, lines)) + more, file=sys.stderr, flush=True)

    def failure(self, error: BaseException) -> None:
        self.say(*(line for part in traceback.format_exception(error) for line in part.splitlines()))


class Pace:
    """Turns of each address: `burst` at once, then `rate` a second."""

    def __init__(self, rate: float, burst: int):
        self._gap, self._ahead = 1 / rate, (burst - 1) / rate
        self._next: dict[str, float] = {}

    def knows(self, address: str) -> bool:
        return address in self._next

    def turn(self, address: str, count: int = 1) -> float:
        """Take the address's next turns; returns in how many seconds the first one is."""
        now = time.monotonic()
        if len(self._next) >= _ADDRESSES:
            self._next = {name: at for name, at in self._next.items() if at > now}
        at = max(now - self._ahead, self._next.get(address, 0.0))
        self._next[address] = at + count * self._gap
        return max(0.0, at - now)


class Guard:
    """Who is connected, what they hold, and who is dropped for it."""

    def __init__(self, limits: Limits, metrics: Metrics):
        self.limits, self._metrics, self._log = limits, metrics, Sparingly()
        self._memory, self._held = limits.memory or 8 * limits.message, 0
        self._half_open: dict[Connection, None] = {}  # oldest first
        self.open: set[Connection] = set()
        self.busy: set[Connection] = set()
        self._of_address: collections.Counter[str] = collections.Counter()
        self.http, self.keys = Pace(_HTTP_PER_S, _HTTP), Pace(_GUESSES_PER_S, 1)
        self.turns = Turns()

    def connecting(self, connection: "Connection") -> None:
        """One more is half open. Beyond the limit, the oldest one of the address that has most of them is dropped."""
        self._half_open[connection] = None
        if len(self._half_open) > _HALF_OPEN:
            [(address, _)] = collections.Counter(each.address for each in self._half_open).most_common(1)
            oldest = next(each for each in self._half_open if each.address == address)
            self.drop(oldest, "handshake", "too many connections are half open")

    def drop_half_open(self) -> None:
        for connection in self._half_open:
            connection.transport.abort()

    def admit(self, connection: "Connection") -> bool:
        """Give a place, if need be that of a client that does nothing; False when there is none."""
        if len(self.open) >= self.limits.connections:
            idle = min(self.open - self.busy, key=lambda c: c.active, default=None)
            if idle is None or time.monotonic() - idle.active < (self.limits.idle if idle.asked else self.limits.open):
                return False
            idle.say_goodbye("it was idle, and its place was needed")
            self.denied(idle, "idle", "dropped: it was idle, and its place was needed")
            self.lost(idle)
        self.open.add(connection)
        self._of_address[connection.address] += 1
        self._metrics.connections = len(self.open)
        return True

    def share(self, connection: "Connection") -> int:
        """How many connections its address has."""
        return max(1, self._of_address[connection.address])

    def opened(self, connection: "Connection") -> None:
        self._half_open.pop(connection, None)

    def lost(self, connection: "Connection") -> None:
        self._held -= connection.held
        connection.held = 0
        self._half_open.pop(connection, None)
        if connection in self.open:
            self.open.discard(connection)
            self._of_address -= collections.Counter({connection.address: 1})  # forgets those that have none left
            self._metrics.connections = len(self.open)

    def holds(self, more: int) -> None:
        """All messages together have `more` bytes than before; the client that holds most is dropped for too many."""
        self._held += more
        if more > 0 and self._held > self._memory:
            text = f"all clients' messages have more than {self._memory >> 20} MiB, and most of them are its own"
            self.drop(max((*self.open, *self._half_open), key=lambda c: c.held, default=None), "memory", text)

    def drop(self, connection: "Connection | None", reason: str, text: str) -> None:
        """At once: it counts no more, else others were dropped for its bytes until it is gone."""
        if connection is not None and not connection.dropped:
            connection.dropped = True
            connection.transport.abort()
            self.lost(connection)
            self.denied(connection, reason, f"dropped: {text}")

    def denied(self, connection: "Connection", reason: str, text: str) -> None:
        self._metrics.deny(reason)
        self._log.say(f"{connection.name}: {text}")

    def wrong_key(self, connection: "Connection") -> None:
        if not self.keys.knows(connection.address):
            self.keys.turn(connection.address)
        self.denied(connection, "key", "refused: no API key, or a wrong one")


class Connection(ServerConnection):
    """A connection that counts what it takes.

    Args:
        tls: its TLS handshake comes first; None = in clear.

    Attributes:
        active: when it connected, or had its last reply.
        asked: it has sent a request.
        held: bytes of its messages, read or not, that are not answered yet.
    """

    def __init__(self, *args: Any, guard: Guard, tls: ssl.SSLContext | None, **options: Any):
        super().__init__(*args, **options)
        self._guard, self._tls, self.dropped, self.asked = guard, tls, False, False
        self._last: Frame | None = None
        self._early = bytearray()  # what came with the end of the TLS handshake
        self.active, self.held, self._whole = time.monotonic(), 0, 0
        self._frames, self._frames_at = 0.0, self.active
        self.address, self.name = "", "a client"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if peer := transport.get_extra_info("peername"):
            self.address, self.name = str(peer[0]), f"{peer[0]}:{peer[1]}"
        if self._tls:
            self.transport = transport
            self._shaking = self.loop.create_task(self._shake_hands(transport, self._tls))
        else:
            super().connection_made(transport)
        self._guard.connecting(self)

    async def _shake_hands(self, transport: asyncio.Transport, tls: ssl.SSLContext) -> None:
        """A TLS handshake counts as half open, as the one of the websocket that follows."""
        seconds = self._guard.limits.open
        try:
            found = await self.loop.start_tls(transport, self, tls, server_side=True, ssl_handshake_timeout=seconds)
        except (OSError, TimeoutError):  # ssl.SSLError is an OSError
            found = None
        if found is None or found.is_closing():
            self._guard.lost(self)
            return
        self._tls = None
        super().connection_made(found)
        self.data_received(bytes(self._early))

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.lost(self)
        if self._tls:
            return
        super().connection_lost(exc)
        self.protocol.reader.buffer = bytearray()  # the rest lives until the next collection of cycles
        self.recv_messages.frames.queue.clear()

    def data_received(self, data: bytes) -> None:
        if self._tls:
            self._early += data
            return
        begin = time.monotonic()
        for at in range(0, len(data), _SLICE):
            if self.dropped:
                return
            super().data_received(data[at : at + _SLICE])
            self._count()
        self._guard.turns.took(self, time.monotonic() - begin)

    @property
    def share(self) -> int:
        return self._guard.share(self)

    def pause(self) -> None:
        self.transport.pause_reading()

    def go_on(self) -> None:
        if not self.recv_messages.paused:  # then the library does it, once a message has been taken
            self.transport.resume_reading()

    def process_event(self, event: Any) -> None:
        super().process_event(event)
        if not isinstance(event, Frame):
            return
        control = event.opcode in CTRL_OPCODES
        if not control:
            self._whole += len(event.data)
            self._last = event
        if (control or not event.fin) and len(event.data) < _SMALL_FRAME:
            now = time.monotonic()
            self._frames = max(0.0, self._frames - (now - self._frames_at) * _FRAMES_PER_S) + 1
            self._frames_at = now
            if self._frames > _FRAMES and not self.dropped:
                self._guard.http.turn(self.address, _HTTP_PER_S)  # a second: the next connection's count begins anew
                self._guard.drop(self, "frames", f"more than {_FRAMES_PER_S} pings or small parts of messages a second")

    def say_goodbye(self, reason: str) -> None:
        """Close the connection with a reason that the client is told, in a second at most."""
        self.dropped = True
        if self.state is State.OPEN:
            self.protocol.fail(CloseCode.TRY_AGAIN_LATER, reason)
            self.send_data()
        self.loop.call_later(1.0, self.transport.abort)

    def answered(self, size: int) -> None:
        """A message of `size` bytes needs no memory any more."""
        self._whole -= size
        self.active = time.monotonic()
        if self._last and not self.recv_messages.frames:
            self._last.data = b""  # the library remembers it until the next one comes
        self._count()

    def _count(self) -> None:
        if self.dropped:
            return
        held = self._whole + len(self.protocol.reader.buffer)
        more, self.held = held - self.held, held
        self._guard.holds(more)
