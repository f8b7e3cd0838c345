"""A robot's record and `hvd replay`, with a server whose answers follow from state and seed."""

import contextlib
import itertools
import os
import threading
import time

import msgpack as plain
import numpy as np
import pytest
from websockets.sync.server import serve

from hvd.client import connect
from hvd.errors import UserError
from hvd.replay import command as replay
from hvd.serve import exchanges, msgpack


def packed(content) -> bytes:
    return plain.packb(content) or b""


@contextlib.contextmanager
def running(answer, about):
    """A server's url. `answer`: request -> reply; a text is sent as one."""

    def talk(connection):
        connection.send(msgpack.pack(about))
        for message in connection:
            reply = answer(msgpack.unpack(message))
            connection.send(reply if isinstance(reply, str) else msgpack.pack(reply))

    with serve(talk, "127.0.0.1", 0) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{made.socket.getsockname()[1]}"
        made.shutdown()
        thread.join(10)


def server(about=None, offset=0.0, first_seed=50):
    """One that answers by state and seed. Without a seed in the question it draws the next one."""
    seeds = itertools.count(first_seed)

    def answer(request):
        if "bad" in request:
            return "refused: bad"
        seed = int(request.get("seed", next(seeds)))
        return {"actions": np.full((4, 2), float(request["state"].sum()) + seed + offset, np.float32), "seed": seed}

    return running(answer, about or {"config": "demo", "robot": "r1"})


@pytest.fixture
def record(tmp_path):
    """Three exchanges; the first robot draws seeds 5, 6, 7."""
    path = tmp_path / "monday.hvdx"
    with server(first_seed=5) as url, connect(url, record=str(path)) as robot:
        for i in range(3):
            robot.ask({"state": np.full(2, i, np.float32), "prompt": "go"})
            time.sleep(0.05)
    return path


def test_the_same_server_answers_the_same(record, capsys):
    with server() as url:
        assert replay.main([str(record), "--url", url]) == 0
    out = capsys.readouterr().out
    assert "largest difference of an action: 0" in out and "note:" not in out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith(("then", "now"))] == [
        ["then", "3"],
        ["now", "3"],
    ]


def test_another_one_is_told_apart(record, capsys):
    with server({"config": "g1", "robot": "r1"}, offset=0.5) as url:
        assert replay.main([str(record), "--url", url]) == 1
        assert replay.main([str(record), "--url", url, "--tolerance", "1"]) == 0
    out = capsys.readouterr().out
    assert "largest difference of an action: 0.5" in out
    assert "the record is of config 'demo', the server has 'g1'" in out


def test_what_is_refused_now_is_told(tmp_path, capsys):
    path = tmp_path / "bad.hvdx"
    kept = exchanges.Record(path, msgpack.pack({}))
    reply = msgpack.pack({"actions": np.zeros((1, 2), np.float32)})
    kept.add(0.0, 0.1, msgpack.pack({"bad": 1}), reply)
    kept.close()
    with server() as url:
        assert replay.main([str(path), "--url", url]) == 1
    assert "refused: bad" in capsys.readouterr().out


def test_at_the_record_s_own_times(record):
    with server() as url:
        started = time.monotonic()
        assert replay.main([str(record), "--url", url, "--paced", "true"]) == 0
    assert time.monotonic() - started >= 0.1


def test_what_a_record_holds(record, capsys):
    assert replay.main([str(record), "--first", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "prompt state" in lines[1] and "(4, 2)" in lines[1]


def test_a_record_that_was_cut_off_keeps_its_whole_exchanges(record):
    whole = record.read_bytes()
    record.write_bytes(whole[:-20])
    _, found = exchanges.read(record)
    assert [msgpack.unpack(x.request)["state"][0] for x in found] == [0, 1]


def test_a_record_is_not_written_over(record):
    with server() as url, pytest.raises(UserError, match="is there already"):
        with connect(url, record=str(record)):
            pass


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "Expected `object`, got `null`"),
        (b"\xc1" * 10, "no record of exchanges"),
        (packed([1, 2]), "Expected `object`, got `array`"),
        (packed({"format": 9, "about": b""}), "format 9, this version reads 1"),
        (packed({"format": 1, "about": b"\xc1"}), "cannot be read"),
        (packed({"format": 1, "about": b"\x80"}) + packed({"at": "x"}), "exchange 0: "),
        (packed({"format": 1, "about": b"\x90"}), "a message in it is a list"),
    ],
)
def test_a_file_that_is_no_record(tmp_path, content, line):
    path = tmp_path / "x"
    path.write_bytes(content)
    with server() as url, pytest.raises(UserError, match=line):
        replay.main([str(path), "--url", url])


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        replay.main([str(tmp_path / "none")])
    with pytest.raises(UserError, match="give a record"):
        replay.main([])


@pytest.mark.parametrize("at", [float("nan"), float("inf"), -1.0, 1e9])
def test_a_record_s_times_are_not_believed(tmp_path, at):
    path = tmp_path / "slow.hvdx"
    kept = exchanges.Record(path, msgpack.pack({}))
    kept._write({"at": at, "took": 0.1, "request": b"", "reply": b""})
    kept.close()
    with pytest.raises(UserError, match=r"exchange 0: .*at"):
        list(exchanges.read(path)[1])


def test_a_number_that_is_none_is_no_equal_answer(tmp_path, capsys):
    path = tmp_path / "nan.hvdx"
    kept = exchanges.Record(path, msgpack.pack({}))
    reply = msgpack.pack({"actions": np.full((4, 2), np.nan, np.float32), "seed": 1})
    kept.add(0.0, 0.1, msgpack.pack({"state": np.zeros(2, np.float32), "\x1b[2Jprompt": "go"}), reply)
    kept.close()
    with server() as url:
        assert replay.main([str(path), "--url", url]) == 1
    assert replay.main([str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_record_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a regular file"):
        exchanges.read(tmp_path / "pipe")
