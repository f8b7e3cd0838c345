"""The websocket server in a thread, with a stand-in for the model."""

import asyncio
import base64
import contextlib
import os
import socket
import threading
import time
from typing import Any

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy

from hvd.serve.batching import Batcher
from hvd.serve.command import bound
from hvd.serve.connections import PolicyServer
from hvd.serve.metrics import Metrics
from hvd.serve.observation import RequestReader

# openpi's client calls connect() in the way that websockets 17.1 deprecates
OPENPI_CLIENT = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")

STATE = np.arange(5.0)
GOOD = {"state": STATE}


class Model:
    """Acts in `seconds`: the chunk is the state's first dim, [4,21]."""

    max_rows = 4

    def __init__(self):
        self.seconds, self.started, self.answered = 0.0, threading.Semaphore(0), 0
        self.enough = threading.Event()  # the test is over: it acts in no time

    def size_for(self, rows):
        return rows

    def __call__(self, requests):
        self.started.release()
        self.enough.wait(self.seconds)
        self.answered += len(requests)
        return [np.broadcast_to(r.state[:, :1, None], (r.rows, 4, 21)).astype(np.float32) for r in requests]


class Running:
    """A PolicyServer in a thread of its own."""

    def __init__(self, model: Model, reader: RequestReader, **options):
        self.metrics = Metrics()
        self._sockets: list[Any] = []
        self.batcher = Batcher(model, self.metrics)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._socket = bound("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, args=(reader, options))
        self._thread.start()
        assert self._ready.wait(30)

    def _run(self, reader, options):
        async def serve():
            self._stop, self._hurry = asyncio.Event(), asyncio.Event()
            self.server = PolicyServer(reader, self.batcher, self.metrics, metadata={"robot": "r1"}, **options)
            await self.server.run(self._socket, self._stop, self._hurry, self._ready.set)

        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(serve())

    def ask_to_stop(self, hurry: bool = False):
        for event in (self._stop, *([self._hurry] if hurry else [])):
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(event.set)

    def wait(self, timeout: float = 30.0) -> float:
        """Seconds until the server had ended."""
        begin = time.monotonic()
        self._thread.join(timeout)
        assert not self._thread.is_alive()
        return time.monotonic() - begin

    def close(self):
        self.ask_to_stop(hurry=True)
        self.wait()
        self.batcher.stop(10)
        for sock in (self._socket, *self._sockets):
            sock.close()

    def count(self, outcome: str) -> int:
        return self.metrics._outcomes[outcome]

    def client(self, **options):
        made = WebsocketClientPolicy("127.0.0.1", self.port, **options)
        self._sockets.append(made._ws)
        return made

    def raw(self) -> socket.socket:
        """A websocket without a library: the handshake done, the metadata read."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        self._sockets.append(sock)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = ["GET / HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
        sock.sendall("\r\n".join([*lines, f"Sec-WebSocket-Key: {key}", "", ""]).encode())
        got = b""
        while b"robot" not in got:
            got += sock.recv(4096)
        return sock


def wait_for(condition, seconds: float = 20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)
