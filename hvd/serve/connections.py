"""openpi's websocket protocol: metadata on connect, then one reply per observation; /healthz and /metrics beside it.

A reply is a binary message {"actions": [K,A], "policy_timing": {...}, "server_timing": {...}, "seed": int}, with the
text "prompt_warning" where the model sees a prompt in part; what went wrong with a request is a text message of one
line, which openpi's client raises, and the connection goes on.
"""

import asyncio
import concurrent.futures
import functools
import hmac
import http
import logging
import socket
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request as HttpRequest
from websockets.http11 import Response
from websockets.protocol import State

from hvd.errors import one_line
from hvd.serve import msgpack as serve_msgpack
from hvd.serve import turns
from hvd.serve.batching import Answer, Batcher, Late
from hvd.serve.limits import Connection, Guard, Limits, Sparingly
from hvd.serve.metrics import Metrics
from hvd.serve.observation import MAX_SEED, Refused, Request, RequestReader
from hvd.serve.translation import NoReply, Translation

_GRACE = 0.2  # seconds for requests that were sent before the client could know that the server stops

_MORE = 4 << 20  # bytes beyond the limit that are read, so that the message can be refused with a line
_CUT_PROMPTS = 100  # lines about prompts that are cut


class PolicyServer:
    """Serves one policy on one socket until it is told to stop.

    Args:
        metadata: sent to each client that connects.
        api_key: clients must send `Authorization: Api-Key <it>`; "" = anybody may come.
        tls: certificate and key; None = in clear.
        noise_seed: of the seeds of requests that name none.
    """

    def __init__(
        self,
        reader: RequestReader,
        batcher: Batcher,
        metrics: Metrics,
        *,
        metadata: Mapping[str, Any],
        limits: Limits | None = None,
        api_key: str = "",
        tls: ssl.SSLContext | None = None,
        noise_seed: int = 0,
        translation: Translation | None = None,
    ):
        self._reader, self._batcher, self._metrics = reader, batcher, metrics
        self._metadata, self._limits = serve_msgpack.pack(dict(metadata)), limits or Limits()
        self._api_key, self._tls, self._translation = api_key, tls, translation or Translation()
        self._seeds = np.random.default_rng(noise_seed)
        self._threads = concurrent.futures.ThreadPoolExecutor(turns.THREADS, "hvd-serve-read")
        self._refusals, self._failures = Sparingly(), Sparingly()
        self._guard = Guard(self._limits, metrics)
        self._stopping = False
        self._cut: set[str] = set()

    async def run(self, sock: socket.socket, stop: asyncio.Event, hurry: asyncio.Event, started: Callable) -> None:
        """Serve on the bound socket until `stop`; then answer what is in flight, unless `hurry` is set too."""
        logger = logging.getLogger("hvd.serve")
        logger.setLevel(logging.CRITICAL)  # the library reports each port scan with a traceback
        options: dict[str, Any] = {
            "create_connection": functools.partial(Connection, guard=self._guard, tls=self._tls),
            "process_request": self._http,
            "process_response": self._place,
        }
        server = await serve(
            self._client,  # pyright: ignore[reportArgumentType]  # of the connections that `options` make
            sock=sock,
            origins=[None],  # no web page: a browser on this machine could otherwise reach a server on 127.0.0.1
            compression=None,
            max_size=self._limits.message + min(self._limits.message, _MORE),
            max_queue=1,
            open_timeout=self._limits.open,
            ping_interval=self._limits.ping,
            ping_timeout=self._limits.pong,
            close_timeout=5,
            logger=logger,
            **options,
        )
        started()
        await stop.wait()
        await self._drain(server, hurry)
        self._threads.shutdown(wait=False)

    async def _drain(self, server: Server, hurry: asyncio.Event) -> None:
        self._stopping = True
        server.close(close_connections=False)
        self._guard.drop_half_open()
        await asyncio.sleep(_GRACE)
        leaving = [asyncio.ensure_future(self._leave(connection)) for connection in self._guard.open - self._guard.busy]
        ends = [asyncio.ensure_future(server.wait_closed()), asyncio.ensure_future(hurry.wait())]
        await asyncio.wait(ends, timeout=self._limits.drain, return_when=asyncio.FIRST_COMPLETED)
        for connection in self._guard.open:
            connection.transport.abort()
        await asyncio.wait([ends[0], *leaving], timeout=5)
        ends[1].cancel()

    async def _leave(self, connection: ServerConnection) -> None:
        await connection.close(CloseCode.GOING_AWAY, "the server is stopping")

    @property
    def ready(self) -> bool:
        return self._batcher.healthy and not self._stopping

    async def _http(self, connection: Connection, request: HttpRequest) -> Response | None:
        """Plain HTTP answers, and who may not connect; None lets a websocket open."""
        await asyncio.sleep(self._guard.http.turn(connection.address))
        path = request.path.partition("?")[0].rstrip("/")
        if path == "/healthz":
            status = http.HTTPStatus.OK if self.ready else http.HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, "ok\n" if self.ready else "not ready\n")
        if path == "/metrics":
            text = self._metrics.prometheus(ready=self.ready, waiting=self._batcher.waiting)
            return connection.respond(http.HTTPStatus.OK, text)
        if self._api_key:
            if self._guard.keys.knows(connection.address):  # it has sent a wrong one
                await asyncio.sleep(self._guard.keys.turn(connection.address))
            given = request.headers.get_all("Authorization")
            expected = f"Api-Key {self._api_key}"
            if len(given) != 1 or not hmac.compare_digest(given[0].encode(errors="replace"), expected.encode()):
                self._guard.wrong_key(connection)
                response = connection.respond(http.HTTPStatus.UNAUTHORIZED, "send Authorization: Api-Key <key>\n")
                response.headers["WWW-Authenticate"] = "Api-Key"
                return response
        return None

    def _place(self, connection: Connection, request: HttpRequest, response: Response) -> Response | None:
        """Another answer for a websocket that would have no place."""
        if response.status_code != http.HTTPStatus.SWITCHING_PROTOCOLS or self._guard.admit(connection):
            return None
        text = f"{self._limits.connections} clients are connected already\n"
        self._guard.denied(connection, "places", f"refused: {text}")
        return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, text)

    async def _client(self, connection: Connection) -> None:
        self._guard.opened(connection)
        last: float | None = None
        try:
            await connection.send(self._metadata)
            while not (self._stopping and last is not None):
                message = await connection.recv()
                size = len(message) if isinstance(message, bytes) else len(message.encode())
                self._guard.busy.add(connection)
                connection.asked = True
                try:
                    last = await self._exchange(connection, message, last)
                finally:
                    del message  # so that it takes no memory until the next one comes
                    self._guard.busy.discard(connection)
                    connection.answered(size)
                if last is None:
                    return
            await self._leave(connection)
        except ConnectionClosed:
            pass  # theirs to say when it is over

    async def _exchange(self, connection: Connection, message: str | bytes, last: float | None) -> float | None:
        """Answer one message; returns the seconds it took, or None when the client had gone."""
        begin = time.monotonic()
        try:
            reply = await self._answer(connection, message, last, begin)
            outcome = "answered"
        except NoReply:
            return time.monotonic() - begin
        except Refused as refused:
            reply, outcome = f"error: {refused}", "refused"
            self._refusals.say(f"refused {connection.name}: {reply}")
        except Late as late:
            timing = {"infer_ms": 1e3 * (time.monotonic() - begin), "wait_ms": 1e3 * late.waited}
            reply, outcome = serve_msgpack.pack({"late": True, "server_timing": timing}), "late"
        except asyncio.CancelledError:
            if connection.state is State.OPEN:
                raise
            self._metrics.request("abandoned", time.monotonic() - begin)
            return None
        except Exception as error:
            reply, outcome = f"error: the server failed ({type(error).__name__}); its log says why", "failed"
            self._failures.failure(error)
        try:
            async with asyncio.timeout(self._limits.send):
                await connection.send(reply)
        except (ConnectionClosed, TimeoutError):  # it has gone, or does not read
            connection.transport.abort()
            self._metrics.request("abandoned", time.monotonic() - begin)
            return None
        seconds = time.monotonic() - begin
        self._metrics.request(outcome, seconds)
        if outcome not in ("answered", "late"):
            await asyncio.sleep(self._limits.pause)
        return seconds

    async def _answer(self, connection: Connection, message: str | bytes, last: float | None, begin: float) -> bytes:
        """The packed reply."""
        read = functools.partial(self._read, message, int(self._seeds.integers(MAX_SEED + 1)))
        request, size = await self._guard.turns.decode(self._threads, read, len(message), connection)
        prepared = time.monotonic() - begin
        wanted = functools.partial(_is_open, connection)
        future = self._batcher.submit(request, wanted, client=connection, share=connection.share, arrived=begin)
        answer: Answer = await asyncio.wrap_future(future)
        timing = {
            "infer_ms": 1e3 * (time.monotonic() - begin),
            "prepare_ms": 1e3 * prepared,
            "wait_ms": 1e3 * answer.waited,
            "batch_rows": answer.rows,
        }
        if last is not None:
            timing["prev_total_ms"] = 1e3 * last
        actions = answer.actions if request.batched else answer.actions[0]
        reply = {
            "actions": actions,
            **self._translation.reply(actions, size),
            "policy_timing": {"infer_ms": 1e3 * answer.inference},
            "server_timing": timing,
        }
        if request.warning:
            reply["prompt_warning"] = request.warning
            self._say_cut(connection, request.warning)
        if request.noise is None:
            reply["seed"] = int(request.seeds[0])
        return serve_msgpack.pack(reply)

    def _read(self, message: str | bytes, seed: int) -> tuple[Request, int]:
        """The request, and how many actions its reply repeats as `action_chunk`."""
        if isinstance(message, str):
            raise Refused("a text message; an observation is a binary message, msgpack as openpi_client sends it")
        if len(message) > self._limits.message:
            found, most = len(message) / 2**20, self._limits.message / 2**20
            raise Refused(f"the message has {found:.1f} MiB, at most {most:g} are taken: resize images before sending")
        try:
            decoded = serve_msgpack.unpack(message)
        except serve_msgpack.Malformed as error:
            raise Refused(f"not a msgpack message of openpi's form: {error}") from None
        horizon = self._reader.cfg.model.action_horizon
        translated, size = self._translation.request(decoded, self._reader.known, horizon)
        return self._reader.read(translated, seed), size

    def _say_cut(self, connection: Connection, line: str) -> None:
        """A prompt that is cut in the log: once, and no more than so many of them."""
        if line not in self._cut and len(self._cut) < _CUT_PROMPTS:
            self._cut.add(line)
            print(one_line(f"warning: {connection.address}: {line}"), file=sys.stderr, flush=True)


def _is_open(connection: ServerConnection) -> bool:
    return connection.state is State.OPEN
