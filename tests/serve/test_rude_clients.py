"""What slow, rude and leaving clients get of the websocket server, and what it still answers when it stops."""

import contextlib
import gc
import socket
import ssl
import struct
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from openpi_client import msgpack_numpy
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from hvd.serve import limits
from hvd.serve.command import tls_of
from hvd.serve.limits import Limits
from tests.serve.running import GOOD, OPENPI_CLIENT, STATE, Model, wait_for
from tests.served import get

pytestmark = OPENPI_CLIENT


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
