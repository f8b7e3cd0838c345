"""A robot's side of `hvd serve`: chunks are asked for while the last one is executed, at a steady rate, within limits.

    from hvd.client import Client, Limits, connect

    with connect("ws://127.0.0.1:8000") as server:
        client = Client(server.ask, server.about, policy_rate=10, rate=50, limits=Limits(low, high, speed))
        while True:
            robot.send(client.next(observe))       # sleeps until the next tick; observe() -> {"state": ..., ...}

Works with any server of openpi's protocol. A server with --real-time-chunking is told what is not executed yet and how
long an answer takes; of every answer, the actions whose time is over are skipped. Needs numpy, jaxtyping, msgpack and
websockets; imports no jax.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from hvd.errors import UserError
from hvd.robots import ROBOTS
from hvd.serve import msgpack
from hvd.serve.exchanges import Record

Action = Float[np.ndarray, " a"]


@dataclass(frozen=True)
class Limits:
    """What no action may exceed, whatever the policy says.

    Attributes:
        low, high: of each dim [A], in the dataset's units; infinite = no limit.
        speed: the most that each dim may change in a second [A].
        point, box: where an action brings the hands, [n,3], and the lowest and highest corner [2,3] of what they may
            reach; an action beyond is not executed: the last one is held.
    """

    low: np.ndarray
    high: np.ndarray
    speed: np.ndarray
    point: Callable[[np.ndarray], np.ndarray] | None = None
    box: np.ndarray | None = None

    def apply(self, action: Action, last: Action, seconds: float) -> tuple[Action, bool]:
        """The action that may be executed `seconds` after `last`, and whether it is another one."""
        step = self.speed * seconds
        limited = np.clip(np.clip(action, last - step, last + step), self.low, self.high)
        if self.point is not None and self.box is not None:
            reached = self.point(limited)
            if not ((reached >= self.box[0]) & (reached <= self.box[1])).all():
                limited = last
        return limited, not np.array_equal(limited, action)


@dataclass(frozen=True)
class Server:
    """A connection: what the server said of itself, and one question after another."""

    about: Mapping[str, Any]
    ask: Callable[[Mapping[str, Any]], Mapping[str, Any]]


@contextlib.contextmanager
def connect(url: str, *, api_key: str = "", timeout: float = 30.0, record: str = "") -> Iterator[Server]:
    """A connection to the server at `url`, ws:// or wss://. Where it refuses, `ask` raises UserError with its line.

    `record`: a new file for all that is asked and answered (`hvd replay` reads it).
    """
    from websockets.sync.client import connect as open_connection

    headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
    connection = open_connection(
        url, compression=None, max_size=None, additional_headers=headers, open_timeout=timeout, proxy=None
    )
    with connection:

        def receive() -> bytes:
            reply = connection.recv(timeout)
            if isinstance(reply, str):
                raise UserError(f"{url}: {reply.strip()}")
            return bytes(reply)

        about = receive()
        kept = Record(record, about) if record else None

        def ask(observation: Mapping[str, Any]) -> Mapping[str, Any]:
            asked, request = time.monotonic(), msgpack.pack(dict(observation))
            connection.send(request)
            reply = receive()
            if kept:
                kept.add(asked, time.monotonic(), request, reply)
            return msgpack.unpack(reply)

        try:
            yield Server(msgpack.unpack(about), ask)
        finally:
            if kept:
                kept.close()


class Client:
    """Actions at a steady rate out of chunks that are asked for in the background.

    Args:
        ask: one observation -> {"actions": [K,A]}; called in a thread, one call at a time.
        about: what the server said of itself: its robot tells which dims are velocities (they are 0 while the client
            waits), and whether it takes part in real-time chunking.
        policy_rate: actions a second of the policy, as in its dataset.
        rate: calls of `next` a second; between two actions of the policy, it interpolates.
        every: ask again after so many actions of the policy, at the earliest.
        pose: the action that holds the robot where it is now: the limits on speed count from there.

    Attributes:
        late: ticks for which no action was there, and the last one was held.
        too_late: questions that the server did not answer, because the old chunk would have been over by then.
        missed: ticks that `next` was called too late for.
        limited: ticks whose action the limits changed.
    """

    def __init__(
        self,
        ask: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        about: Mapping[str, Any] | None = None,
        *,
        policy_rate: float = 10.0,
        rate: float = 10.0,
        every: int = 1,
        limits: Limits | None = None,
        pose: Action | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        about = about or {}
        robot = ROBOTS.get(about.get("robot", ""))
        self._moving = [d for d in range(robot.action_dim) if d not in robot.position_dims] if robot else []
        self._tells, self._has_deadlines = bool(about.get("real_time_chunking")), bool(about.get("deadlines"))
        self._ask, self._limits, self._clock, self._sleep = ask, limits, clock, sleep
        self._period, self._step, self._every, self._policy_rate = 1 / rate, policy_rate / rate, every, policy_rate
        self._chunk = np.zeros((0, 0), np.float32)
        self._at = 0.0  # in the chunk, counted in actions of the policy
        self._asked: tuple[futures.Future[Any], float, float] | None = None  # the answer, when, where in the chunk
        self._delays: deque[float] = deque(maxlen=10)  # seconds
        self._last = pose
        self._due: float | None = None
        self._threads = futures.ThreadPoolExecutor(1, "hvd-client")
        self.late = self.missed = self.limited = self.too_late = 0

    def next(self, observe: Callable[[], Mapping[str, Any]]) -> Action:
        """The action of the next tick, after waiting for it. The first call waits for the first chunk too.

        `observe` is called when a new chunk is asked for. What `ask` raises is raised here.
        """
        if not len(self._chunk):
            futures.wait([self._request(observe)])
            self._due = None
        self._wait()
        self._take()
        if self._asked is None and self._at >= self._every:
            self._request(observe)
        if self._at > len(self._chunk) - 1:
            self.late += 1
            action = self._chunk[-1].copy() if self._last is None else self._last.copy()
            action[self._moving] = 0.0
        else:
            first = int(self._at)
            share = self._at - first
            action = (1 - share) * self._chunk[first] + share * self._chunk[min(first + 1, len(self._chunk) - 1)]
        if self._limits is not None:
            last = action if self._last is None else self._last
            action, changed = self._limits.apply(action, last, self._period)
            self.limited += changed
        self._at += self._step
        self._last = action
        return action

    def close(self) -> None:
        """Wait for the answer that is on its way, which nobody needs: another client may then ask the same server."""
        if self._asked is not None:
            futures.wait([self._asked[0]])
        self._asked = None
        self._threads.shutdown()

    def _wait(self) -> None:
        now = self._clock()
        self._due = now if self._due is None else self._due + self._period
        if now > self._due + self._period:
            self.missed += 1
            self._due = now
        elif now < self._due:
            self._sleep(self._due - now)

    def _request(self, observe: Callable[[], Mapping[str, Any]]) -> futures.Future[Any]:
        message = dict(observe())
        left = self._chunk[int(self._at) :]
        if self._tells and len(left):
            message["prev_chunk_left_over"] = left
            message["inference_delay"] = min(math.ceil(max(self._delays) * self._policy_rate), len(left))
        seconds = (len(self._chunk) - self._at) / self._policy_rate
        if self._has_deadlines and seconds > 0:
            message["deadline_ms"] = max(1, round(1e3 * seconds))
        asked = self._clock()  # before the thread, which may be through before this one goes on
        answer = self._threads.submit(self._timed, message)
        self._asked = answer, asked, self._at
        return answer

    def _timed(self, message: Mapping[str, Any]) -> tuple[Mapping[str, Any], float]:
        return self._ask(message), self._clock()

    def _take(self) -> None:
        """A chunk that has come takes the place of the old one; what is over of it is skipped."""
        if self._asked is None or not self._asked[0].done():
            return
        answer, asked, at = self._asked
        self._asked = None
        reply, came = answer.result()
        if reply.get("late"):
            self.too_late += 1
            return
        self._delays.append(came - asked)
        self._at -= math.floor(at)
        self._chunk = np.asarray(reply["actions"])
