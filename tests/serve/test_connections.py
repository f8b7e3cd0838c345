"""The websocket server with a stand-in for the model: who may connect, what slow, rude and leaving clients get."""

import asyncio
import base64
import contextlib
import gc
import os
import socket
import ssl
import struct
import subprocess
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import connect

from hvd.serve import limits
from hvd.serve.batching import Batcher
from hvd.serve.command import bound, tls_of
from hvd.serve.connections import PolicyServer
from hvd.serve.limits import Limits
from hvd.serve.metrics import Metrics
from hvd.serve.observation import RequestReader
from tests.serve.test_observation import make_reader
from tests.served import get

# openpi's client calls connect() in the way that websockets 17.1 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")

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


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def run(model):
    """run(**options): a running server; it is stopped afterwards."""
    made: list[Running] = []

    def start(**options):
        made.append(Running(model, make_reader(cameras=()), **options))
        return made[-1]

    yield start
    model.enough.set()
    for server in made:
        server.close()


def wait_for(condition, seconds: float = 20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def test_metadata_actions_and_timings(run):
    client = run().client()
    assert client.get_server_metadata() == {"robot": "r1"}
    first, second = client.infer(GOOD), client.infer({**GOOD, "state": STATE + 1, "seed": 5})
    assert first["actions"].shape == (4, 21) and first["actions"].dtype == np.float32
    assert first["actions"][0, 0] == 0 and second["actions"][0, 0] == 1
    assert set(first["policy_timing"]) == {"infer_ms"}
    assert set(first["server_timing"]) == {"infer_ms", "prepare_ms", "wait_ms", "batch_rows"}
    assert second["server_timing"]["prev_total_ms"] > 0
    assert second["seed"] == 5 and first["seed"] != 5
    batch = client.infer({"state": np.stack([STATE, STATE + 2])})
    assert batch["actions"].shape == (2, 4, 21) and batch["actions"][1, 0, 0] == 2


def test_seeds_are_a_stream_that_the_servers_seed_decides(run):
    a, b, c = (run(noise_seed=seed).client() for seed in (0, 0, 1))
    seeds = [[client.infer(GOOD)["seed"] for _ in range(3)] for client in (a, b, c)]
    assert seeds[0] == seeds[1] != seeds[2] and len(set(seeds[0])) == 3


def test_the_chunk_broker_hands_out_one_action_after_another(run):
    from openpi_client.action_chunk_broker import ActionChunkBroker

    broker = ActionChunkBroker(run().client(), action_horizon=2)
    first = [broker.infer({"state": STATE + i}) for i in range(3)]
    assert [r["actions"].shape for r in first] == [(21,)] * 3
    assert [r["actions"][0] for r in first] == [0, 0, 2]


def test_a_prompt_that_is_cut_is_answered_and_said(run, capfd):
    from openpi_client.action_chunk_broker import ActionChunkBroker

    client = run().client()
    assert "prompt_warning" not in client.infer(GOOD)
    long = {**GOOD, "prompt": "carry the tote to the left\x1b[31m"}
    for reply in (client.infer(long), client.infer(long), ActionChunkBroker(client, action_horizon=2).infer(long)):
        assert "is cut to the first 4" in reply["prompt_warning"] and "max_token_len" in reply["prompt_warning"]
    said = capfd.readouterr().err
    assert said.count("is cut to the first 4") == 1 and "\x1b" not in said


@pytest.mark.parametrize(
    "message, why",
    [
        (b"\xc1garbage", "error: not a msgpack message of openpi's form: its bytes are no msgpack"),
        (b"", "error: not a msgpack message of openpi's form: cut off"),
        ("text", "error: a text message; an observation is a binary message"),
        (msgpack_numpy.packb({"state": STATE, "stat": 1}), "error: unknown key 'stat'; nearest: state"),
        (msgpack_numpy.packb({"state": np.zeros(400_000)}), r"error: the message has 3.1 MiB, at most 2 are taken"),
    ],
)
def test_a_refused_message_leaves_the_connection_usable(run, message, why):
    server = run(limits=Limits(message=2 << 20))
    client, other = server.client(), server.client()
    for _ in range(2):
        client._ws.send(message)
        said = client._ws.recv()
        assert isinstance(said, str) and said.startswith(why)
        assert client.infer(GOOD)["actions"].shape == other.infer(GOOD)["actions"].shape == (4, 21)
    assert server.count("refused") == 2


def test_what_the_client_raises_names_the_error(run):
    with pytest.raises(RuntimeError, match=r"error: state has shape \[3\]; expected \[5\]"):
        run().client().infer({"state": np.zeros(3)})


def test_far_too_large_a_message_closes_that_connection(run):
    server = run(limits=Limits(message=1 << 16))
    client, other = server.client(), server.client()
    with pytest.raises(ConnectionClosed, match="1009"):
        client.infer({"state": np.zeros(1 << 16)})
    assert other.infer(GOOD)["actions"].shape == (4, 21)


def test_a_bug_is_that_request_s_alone(run, model, monkeypatch, capfd):
    client = run().client()

    def broken(requests):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Model, "__call__", lambda self, requests: broken(requests))
    with pytest.raises(RuntimeError, match=r"error: the server failed \(ZeroDivisionError\); its log says why"):
        client.infer(GOOD)
    monkeypatch.undo()
    assert client.infer(GOOD)["actions"].shape == (4, 21)
    assert "a bug" in capfd.readouterr().err


def test_health_and_metrics(run, model, monkeypatch):
    server = run()
    client = server.client()
    client.infer(GOOD)
    assert get(server.port, "/healthz") == get(server.port, "/healthz/") == (200, "ok\n")
    status, text = get(server.port, "/metrics?x=1")
    assert status == 200 and 'hvd_serve_requests_total{outcome="answered"} 1' in text
    assert "hvd_serve_connections 1" in text and "hvd_serve_ready 1" in text
    assert get(server.port, "/nothing")[0] == 426
    monkeypatch.setattr(server.batcher, "_failures", 3)
    assert get(server.port, "/healthz") == (503, "not ready\n")
    assert "hvd_serve_ready 0" in get(server.port, "/metrics")[1]


def test_health_is_answered_while_the_model_computes(run, model):
    model.seconds = 1.0
    server = run()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(server.client().infer, GOOD)
        assert model.started.acquire(timeout=10)
        begin = time.monotonic()
        assert get(server.port, "/healthz")[0] == 200
        assert not future.done() and time.monotonic() - begin < 0.9
        future.result(30)


def test_api_key(run):
    server = run(api_key="hush hush")
    for options in ({}, {"api_key": "hush"}, {"api_key": "hush hush "[:-2]}):
        with pytest.raises(InvalidStatus) as refused:
            server.client(**options)
        assert refused.value.response.status_code == 401
        assert b"Api-Key" in bytes(refused.value.response.body or b"")
    assert server.client(api_key="hush hush").infer(GOOD)["actions"].shape == (4, 21)
    assert get(server.port, "/healthz")[0] == 200


def test_wrong_keys_are_slowed_counted_and_logged(run, capfd):
    server = run(api_key="hush hush")
    begin = time.monotonic()
    for i in range(5):
        with pytest.raises(InvalidStatus):
            server.client(api_key=f"guess {i}")
    assert time.monotonic() - begin > 0.5
    assert server.client(api_key="hush hush").infer(GOOD)["actions"].shape == (4, 21)
    assert 'hvd_serve_denied_total{reason="key"} 5' in get(server.port, "/metrics")[1]
    assert "denied for key: 5" in server.metrics.line()
    said = capfd.readouterr().err
    assert 1 <= said.count("no API key, or a wrong one") <= 3 and "guess" not in said


@pytest.fixture
def pem(tmp_path):
    """A certificate and its key in one file."""
    pem = tmp_path / "both.pem"
    words = "req -x509 -newkey ed25519 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(["openssl", *words.split(), "-keyout", pem, "-out", tmp_path / "c.pem"], check=True)
    pem.write_text(pem.read_text() + (tmp_path / "c.pem").read_text())
    return pem


def test_tls(run, pem):
    server = run(tls=tls_of(str(pem), ""))
    with connect(f"wss://127.0.0.1:{server.port}", ssl=ssl.create_default_context(cafile=str(pem))) as client:
        assert msgpack_numpy.unpackb(client.recv()) == {"robot": "r1"}
        client.send(msgpack_numpy.packb(GOOD))
        assert msgpack_numpy.unpackb(client.recv())["actions"].shape == (4, 21)
    with pytest.raises((ConnectionClosed, OSError, InvalidMessage)):
        server.client()


def test_no_web_page_may_connect(run):
    server = run()
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://127.0.0.1:{server.port}", origin="http://evil.example")  # pyright: ignore[reportArgumentType]
    assert refused.value.response.status_code == 403


def test_connections_are_limited(run):
    server = run(limits=Limits(connections=2))
    first, second = server.client(), server.client()
    with pytest.raises(InvalidStatus) as refused:
        server.client()
    assert refused.value.response.status_code == 503
    assert get(server.port, "/healthz")[0] == 200
    first._ws.close()
    wait_for(lambda: server.metrics.connections == 1)
    assert server.client().infer(GOOD)["actions"].shape == second.infer(GOOD)["actions"].shape == (4, 21)


def test_a_client_that_does_nothing_loses_its_place_when_there_is_none_left(run):
    server = run(limits=Limits(connections=2, idle=0.5, open=0.3))
    idle, first = server.client(), server.client()
    first.infer(GOOD)
    with pytest.raises(InvalidStatus):
        server.client()
    time.sleep(0.35)
    assert server.client().infer(GOOD)["actions"].shape == first.infer(GOOD)["actions"].shape == (4, 21)
    with pytest.raises(ConnectionClosed, match="its place was needed"):
        idle.infer(GOOD)
    text = get(server.port, "/metrics")[1]
    assert 'denied_total{reason="idle"} 1' in text and 'denied_total{reason="places"} 1' in text


def test_requests_without_a_websocket_take_no_place(run):
    server = run(limits=Limits(connections=1))
    for _ in range(3):
        sock = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        server._sockets.append(sock)
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 426 " in sock.recv(100)
    assert server.client().infer(GOOD)["actions"].shape == (4, 21)


def test_what_is_refused_is_logged_once_and_escaped(run, capfd):
    server = run(limits=Limits(pause=0.0))
    client = server.client()
    for _ in range(50):
        with pytest.raises(RuntimeError, match="unknown key"):
            client.infer({"x\n\x1b[31mserving EVIL": 1})
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if "unknown key" in line]
    assert 1 <= len(lines) <= 3 and "\x1b" not in said and not any(line.startswith("serving") for line in lines)


def test_failures_are_logged_once_a_second(run, monkeypatch, capfd):
    def broken(self, requests):
        raise ZeroDivisionError("one\x1b[31m")

    monkeypatch.setattr(Model, "__call__", broken)
    client = run(limits=Limits(pause=0.0)).client()
    for _ in range(30):
        with pytest.raises(RuntimeError, match="the server failed"):
            client.infer(GOOD)
    said = capfd.readouterr().err
    assert 1 <= said.count("ZeroDivisionError: one\\x1b[31m") <= 6 and "\x1b" not in said


# ------------------------------------------------------------------------------------------------- rude, slow, leaving


def frame(payload: bytes) -> bytes:
    return struct.pack(">BBQ4x", 0x82, 0xFF, len(payload)) + payload  # a mask of zeros


def closed(sock: socket.socket) -> bool:
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def test_a_client_that_leaves_in_the_middle_of_a_message(run):
    server = run()
    other = server.client()
    sock = server.raw()
    sock.sendall(frame(msgpack_numpy.packb(GOOD))[:-20])
    sock.close()
    wait_for(lambda: server.metrics.connections == 1)
    assert other.infer(GOOD)["actions"].shape == (4, 21)
    assert server.count("abandoned") == server.count("failed") == 0


def test_a_client_that_does_not_wait_for_its_answer(run, model):
    """One request is being computed when its client leaves, another one waits: that one is not computed at all."""
    model.seconds = 0.5
    server = run()
    other = server.client()
    leaving = [server.raw(), server.raw()]
    leaving[0].sendall(frame(msgpack_numpy.packb(GOOD)))
    assert model.started.acquire(timeout=10)
    leaving[1].sendall(frame(msgpack_numpy.packb(GOOD)))
    wait_for(lambda: server.batcher.waiting == 1)
    for sock in leaving:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as when a robot dies
        sock.close()
    assert other.infer(GOOD)["actions"].shape == (4, 21)
    wait_for(lambda: server.count("abandoned") == 2 and server.count("answered") == 1)
    assert model.answered == 2 and server.metrics.connections == 1


@pytest.mark.parametrize("sent", [b"", frame(b"x" * 100)[:-20]], ids=["idle", "half a message"])
def test_a_client_that_is_dead_is_dropped(run, sent):
    """No answer to a ping, be it that nothing comes, or that a message never ends."""
    server = run(limits=Limits(ping=0.2, pong=0.3))
    sock = server.raw()
    sock.sendall(sent)
    alive = server.client()
    begin = time.monotonic()
    assert closed(sock) and time.monotonic() - begin < 20
    time.sleep(0.6)
    assert alive.infer(GOOD)["actions"].shape == (4, 21), "openpi's client answers pings while it does nothing"


@pytest.mark.parametrize("code", [0x89, 0x00], ids=["pings", "parts of a message"])
def test_a_flood_of_small_frames_costs_its_client_the_connection(run, code):
    server = run()
    other = server.client()
    sock = server.raw()
    small = struct.pack(">BB4x", code, 0x80)
    with contextlib.suppress(OSError):
        sock.sendall(struct.pack(">BB4x", 0x02, 0x80) + small * 100_000)
    assert closed(sock)
    assert other.infer(GOOD)["actions"].shape == (4, 21)
    waits = server.server._guard.http.turn("127.0.0.1")
    assert 0.2 < waits < 1, "a new connection, with a new count, is not to be had at once"
    assert 'denied_total{reason="frames"} 1' in get(server.port, "/metrics")[1]


def test_a_message_in_large_parts_is_taken(run):
    sock, whole = run().raw(), msgpack_numpy.packb(GOOD | {"noise": np.zeros((4, 32))})
    parts = [whole[at : at + 100] for at in range(0, len(whole), 100)]
    for i, part in enumerate(parts):
        code = (0x80 if i == len(parts) - 1 else 0) | (0 if i else 2)
        sock.sendall(struct.pack(">BB4x", code, 0x80 | len(part)) + part)
    assert sock.recv(1)[0] == 0x82


def test_all_messages_together_have_a_limit(run):
    """Clients that never finish their messages: one of those that hold most is dropped, the others are served."""
    server = run(limits=Limits(message=4 << 20, memory=10 << 20))
    holding, message, begin = [server.raw() for _ in range(4)], frame(b"x" * (3 << 20)), (5 << 19) - (1 << 14)
    for sock in holding:
        sock.sendall(message[:begin])
    wait_for(lambda: server.server._guard._held >= 4 * (begin - 100))
    server._loop.call_soon_threadsafe(time.sleep, 0.5)  # what comes meanwhile is read in one go: each overtakes others
    for sock in holding:
        sock.sendall(message[begin : begin + (1 << 18)])
    other = server.client()
    for _ in range(30):  # what has been answered counts no more
        other.infer(GOOD | {"noise": np.zeros((4, 32))})
    wait_for(lambda: server.metrics.connections == 4)
    assert 'denied_total{reason="memory"} 1' in get(server.port, "/metrics")[1]
    for sock in holding:
        sock.close()
    wait_for(lambda: server.server._guard._held == 0)


@pytest.mark.parametrize("encrypted", [False, True])
def test_half_open_connections_leave_room(run, pem, monkeypatch, encrypted):
    """The oldest of the address that has most of them are dropped; a TLS handshake counts as well."""
    monkeypatch.setattr(limits, "_HALF_OPEN", 8)
    server = run(tls=tls_of(str(pem), "") if encrypted else None, limits=Limits(open=60))
    place = ("127.0.0.1", server.port)
    another = socket.create_connection(place, timeout=30, source_address=("127.0.0.2", 0))
    waiting = [socket.create_connection(place, timeout=30) for _ in range(40)]
    server._sockets += [another, *waiting]
    if encrypted:
        context = ssl.create_default_context(cafile=str(pem))
        with connect(f"wss://127.0.0.1:{server.port}", ssl=context) as client:
            assert msgpack_numpy.unpackb(client.recv()) == {"robot": "r1"}
    else:
        assert get(server.port, "/healthz")[0] == 200
        assert server.client().infer(GOOD)["actions"].shape == (4, 21)
    assert closed(waiting[0])
    assert len(server.server._guard._half_open) <= 8
    another.settimeout(0.3)
    with pytest.raises(TimeoutError):
        another.recv(1)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_handshake_that_never_ends(run, pem, encrypted):
    server = run(tls=tls_of(str(pem), "") if encrypted else None, limits=Limits(open=0.3))
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00" if encrypted else b"GET / HTTP/1.1\r\n")
        assert closed(sock)
    wait_for(lambda: not server.server._guard._half_open)


def test_what_has_been_answered_takes_no_memory(run):
    """Clients that do nothing, those that have left, and one that was cut off hold nothing of their large messages."""
    server = run(limits=Limits(message=8 << 20))
    gc.collect()
    tracemalloc.start()
    try:
        clients = [server.client() for _ in range(5)]
        for client in clients:
            client._ws.send(bytes(9 << 20))
            assert "at most 8 are taken" in client._ws.recv()
        half = server.raw()
        with half:
            half.sendall(frame(bytes(7 << 20))[:-20])
            wait_for(lambda: server.server._guard._held > 6 << 20)
        wait_for(lambda: server.metrics.connections == 5)
        wait_for(lambda: tracemalloc.get_traced_memory()[0] < 6 << 20, 5.0)
    finally:
        tracemalloc.stop()


def test_a_client_that_does_not_read(run, monkeypatch):
    """Its replies fill the socket; after `send` seconds it is dropped, and it alone."""
    monkeypatch.setattr(
        Model, "__call__", lambda self, requests: [np.zeros((r.rows, 400, 21), np.float32) for r in requests]
    )
    server = run(limits=Limits(send=0.5))
    sock = server.raw()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    sock.settimeout(1)
    message = frame(msgpack_numpy.packb(GOOD))
    try:
        for _ in range(20_000):
            sock.sendall(message)
    except OSError:  # the server reads no more, or has closed
        pass
    wait_for(lambda: server.metrics.connections == 0)
    assert server.count("abandoned") == 1
    assert server.client().infer(GOOD)["actions"].shape == (400, 21)


@pytest.mark.parametrize("mutation", range(40))
def test_random_bytes_on_the_socket_do_no_harm(run, mutation):
    server = run()
    rng = np.random.default_rng(mutation)
    with server.raw() as sock:
        sock.sendall(rng.bytes(int(rng.integers(1, 500))))
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(rng.bytes(int(rng.integers(1, 500))))
    assert server.client().infer(GOOD)["actions"].shape == (4, 21)


# --------------------------------------------------------------------------------------------------------- stopping


def test_stopping_answers_what_is_in_flight(run, model):
    model.seconds = 1.0
    server = run()
    clients = [server.client() for _ in range(6)]  # four are computed, two wait
    idle = server.client()
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(clients[0].infer, GOOD)]
        assert model.started.acquire(timeout=10)
        futures += [pool.submit(client.infer, {"state": STATE + 1}) for client in clients[1:]]
        wait_for(lambda: server.batcher.waiting == 5)
        server.ask_to_stop()
        assert [f.result(30)["actions"][0, 0] for f in futures] == [0, 1, 1, 1, 1, 1]
    assert server.wait() < 5
    for client in (*clients, idle):
        with pytest.raises(ConnectionClosed, match="1001"):
            client.infer(GOOD)
    with pytest.raises(ConnectionRefusedError):
        server.client()
    assert server.count("answered") == 6 and server.count("abandoned") == 0


def test_a_request_that_crosses_the_signal_is_answered(run):
    server = run()
    client = server.client()
    client.infer(GOOD)
    server.ask_to_stop()
    assert client.infer(GOOD)["actions"].shape == (4, 21)
    assert server.wait() < 5


def test_a_second_signal_does_not_wait(run, model):
    model.seconds = 8.0
    server = run()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(server.client().infer, GOOD)
        assert model.started.acquire(timeout=10)
        begin = time.monotonic()
        server.ask_to_stop(hurry=True)
        with pytest.raises(ConnectionClosed):
            future.result(30)
        assert time.monotonic() - begin < 5
