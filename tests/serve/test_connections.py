"""The websocket server with a stand-in for the model: who may connect, and what is answered."""

import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from openpi_client import msgpack_numpy
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import connect

from hvd.serve.command import tls_of
from hvd.serve.limits import Limits
from tests.serve.running import GOOD, OPENPI_CLIENT, STATE, Model, wait_for
from tests.served import get

pytestmark = OPENPI_CLIENT


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
