"""A soak of `hvd serve`: four clients that misbehave at random, and one that does not, beside them.

    python -m tests.benchmarks.soak_serve [--requests 100000] [--trouble 0.2] [--size 224] [--run RUN_FOLDER]

Without --run a tiny policy with two cameras is trained first. The undisturbed client asks every 50 ms: first alone,
then beside four clients that behave (the first 5 % of the requests), then beside the same four while every fifth of
their requests is a trouble: random bytes, cut messages, wrong types, huge declared sizes, broken frames, deadlines that
are too short, connections that end within a message or before the reply. Each client has an address of its own.

Exit code 1 where a goal is missed: each request ends as its kind should; in no window p50 or p99 of the undisturbed
client is above 3 times its p50 beside four that behave; the server's RSS at the end is at most 5 % above that at 10 %
of the requests; no file stays open; SIGTERM ends the server with exit code 0.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from hvd import client
from hvd.serve import msgpack
from tests import served
from tests.benchmarks.bench_fair import frame
from tests.benchmarks.bench_serve import observation

CLIENTS, EVERY_S = 4, 0.05
QUIET, WARM = 0.05, 0.1  # shares of the requests until the trouble begins, until RSS counts
GROWTH, SLOWER = 0.05, 3.0
ALONE_S = 10.0

Good = dict[str, Any]
Kind = tuple[Callable[[np.random.Generator, Good], bytes | str], tuple[str, ...]]


def _cut(rng: np.random.Generator, whole: bytes) -> bytes:
    return whole[: rng.integers(1, len(whole))]


def _wrong(rng: np.random.Generator, good: Good) -> bytes:
    wrong = (
        {"state": "text"},
        {"state": good["state"][:-1]},
        {"state": np.full_like(good["state"], np.nan)},
        {"images": [1, {"a": None}]},
        {"images": {name: image[..., 0] for name, image in good["images"].items()}},
        {"prompt": 3.5},
        {"stat": 1},
        {"seed": -1},
        {"num_flow_steps": "ten"},
        {"noise": np.zeros((3, 2), "<f4")},
    )
    return msgpack.pack(good | wrong[rng.integers(len(wrong))])


def _huge(rng: np.random.Generator, good: Good) -> bytes:
    array = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2**40, 2**20]}
    lengths = (b"\xc6", b"\xdb", b"\xdd", b"\xdf")  # bytes, text, a list, a map
    told = [b"\x81\xa5state" + kind + struct.pack(">I", 2**32 - 1) + bytes(100) for kind in lengths]
    return [*told, msgpack.pack(good | {"state": array}), b"\x81" * 50_000][rng.integers(len(told) + 2)]


# Messages, and how they may end
MESSAGES: dict[str, Kind] = {
    "good": (lambda rng, good: msgpack.pack(good), ("answered",)),
    "too late": (lambda rng, good: msgpack.pack(good | {"deadline_ms": 1}), ("late", "answered")),
    "random bytes": (lambda rng, good: rng.bytes(rng.integers(1, 5_000)), ("refused",)),
    "text": (lambda rng, good: "x" * rng.integers(1, 5_000), ("refused",)),
    "cut msgpack": (lambda rng, good: _cut(rng, msgpack.pack(good)), ("refused",)),
    "wrong types": (_wrong, ("refused",)),
    "huge lengths": (_huge, ("refused",)),
}
# What is written to the socket, after which the client goes away, or the server drops it
WRITTEN: dict[str, Kind] = {
    "gone in a message": (lambda rng, good: _cut(rng, frame(2, msgpack.pack(good))), ("gone",)),
    "gone before the reply": (lambda rng, good: frame(2, msgpack.pack(good)), ("gone",)),
    "huge frame": (lambda rng, good: struct.pack(">BBQ", 0x82, 255, 2**40) + rng.bytes(1_000), ("dropped",)),
    "broken frame": (lambda rng, good: bytes([0xB0 | rng.integers(16)]) + rng.bytes(100), ("dropped",)),
}
KINDS = MESSAGES | WRITTEN


def reply_to(connection: ClientConnection, kind: str, data: bytes | str) -> str:
    """How the request ended."""
    if kind in MESSAGES:
        connection.send(data)
        reply = connection.recv(60)
        if isinstance(reply, str):
            return "failed" if "the server failed" in reply or not reply.startswith("error: ") else "refused"
        return "late" if "late" in msgpack.unpack(reply) else "answered"
    assert isinstance(data, bytes)
    connection.socket.sendall(data)
    if kind.startswith("gone"):
        return "gone"
    try:
        connection.recv(60)
    except ConnectionClosed:
        return "dropped"
    return "answered"


def troubled(port: int, number: int, count: int, size: int, trouble: float) -> dict[str, Any]:
    """One of the clients: its requests by kind and outcome; when it had done a share of them."""
    rng, found, ways = np.random.default_rng([16, number]), collections.Counter(), list(KINDS)[1:]
    marks = {int(share * count): share for share in (0.0, QUIET, WARM)}
    times, connection, good = {}, None, {}
    for i in range(count):
        if i in marks:
            times[marks[i]] = time.monotonic()
        if connection is None:
            connection = connect(
                f"ws://127.0.0.1:{port}",
                compression=None,
                max_size=None,
                legacy=True,
                source_address=(f"127.0.0.{number + 2}", 0),
            )
            about = msgpack.unpack(bytes(connection.recv(60)))  # pyright: ignore[reportArgumentType]
            good = good or observation(about, size, rng)
        calm = i < QUIET * count or rng.random() >= trouble
        kind = "good" if calm else ways[rng.integers(len(ways))]
        try:
            outcome = reply_to(connection, kind, KINDS[kind][0](rng, good))
        except (ConnectionClosed, TimeoutError, OSError) as error:
            outcome = type(error).__name__
        found[f"{kind}: {outcome}"] += 1
        if outcome not in ("answered", "late", "refused"):
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)
            connection.close()
            connection = None
    if connection:
        connection.close()
    return {"found": found, "times": times | {1.0: time.monotonic()}}


def undisturbed(port: int, size: int) -> list[tuple[float, float]]:
    """Seconds of the clock and of each answer, until SIGTERM."""
    stop, found = threading.Event(), []
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with client.connect(f"ws://127.0.0.1:{port}") as server:
        given = observation(dict(server.about), size, np.random.default_rng(0))
        while not stop.wait(EVERY_S):
            begin = time.monotonic()
            server.ask(given)
            found.append((begin, time.monotonic() - begin))
    return found


def child(*args: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.benchmarks.soak_serve", "--child", json.dumps(args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> Any:
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a client of the soak ended with {process.returncode}")
    return json.loads(out)


class Watch:
    """The server's RSS in MiB each second."""

    def __init__(self, pid: int):
        self.samples: list[tuple[float, float]] = []
        self._pid, self._stop = pid, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(1.0):
            pages = int(Path(f"/proc/{self._pid}/statm").read_text().split()[1])
            self.samples.append((time.monotonic(), pages * os.sysconf("SC_PAGE_SIZE") / 2**20))

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self._pid}/fd"))

    def near(self, when: float) -> float:
        """The median of the 10 samples nearest to that time."""
        nearest = sorted(self.samples, key=lambda sample: abs(sample[0] - when))[:10]
        return float(np.median([mib for _, mib in nearest]))

    def end(self) -> None:
        self._stop.set()
        self._thread.join()


def soak(server: served.Served, requests: int, size: int, trouble: float) -> dict[str, Any]:
    """What was measured."""
    watch = Watch(server.process.pid)
    try:
        calm = child("undisturbed", server.port, size)
        time.sleep(ALONE_S)
        files, began = watch.files(), time.monotonic()
        parts = [
            said(x)
            for x in [child("troubled", server.port, i, requests // CLIENTS, size, trouble) for i in range(CLIENTS)]
        ]
        calm.terminate()
        answers = said(calm)
        for _ in range(100):  # until the server has seen that its clients have gone
            if watch.files() < files:
                break
            time.sleep(0.1)
        # the undisturbed client held one of those that were open at the start
        gained = watch.files() - (files - 1)
    finally:
        watch.end()
    found = sum((collections.Counter(part["found"]) for part in parts), collections.Counter())
    times = {share: [part["times"][str(share)] for part in parts] for share in (0.0, QUIET, WARM, 1.0)}
    metrics = served.counts(server.get("/metrics")[1])
    return {
        "found": found,
        "answers": np.array(answers),
        "began": began,
        "quiet": (max(times[0.0]), min(times[QUIET])),
        "troubled": (max(times[QUIET]), min(times[1.0])),
        "rss": (watch.near(max(times[WARM])), watch.near(max(times[1.0]))),
        "files": (files - 1, gained),
        "counted": {name.split('"')[1]: int(n) for name, n in metrics.items() if "requests_total" in name},
        "code": server.end(),
    }


def windows(made: dict[str, Any], seconds: float) -> list[tuple[str, np.ndarray]]:
    """The undisturbed client's milliseconds by part of the soak: alone, beside four that behave, then by window."""
    when, took = made["answers"].T[0], made["answers"].T[1] * 1e3
    begin, end = made["troubled"]
    edges = np.append(np.arange(begin, max(end - seconds / 2, begin + 1e-3), seconds), end)
    spans = [("alone", made["began"] - ALONE_S / 2, made["began"] - 0.5), ("beside 4 that behave", *made["quiet"])]
    minutes = itertools.pairwise(edges)
    spans += [(f"disturbed, {a - begin:.0f} to {b - begin:.0f} s", a, b) for a, b in minutes]
    return [(name, took[(when >= a) & (when < b)]) for name, a, b in spans]


def report(made: dict[str, Any], seconds: float) -> list[str]:
    """Prints the tables; the goals that are missed."""
    missed = []
    print("\n| request | " + " | ".join(("ended as", "requests")) + " |\n|---|---|---|")
    for name, count in sorted(made["found"].items()):
        kind, outcome = name.split(": ")
        print(f"| {kind} | {outcome} | {count} |")
        if outcome not in KINDS[kind][1]:
            missed.append(f"{count} requests '{kind}' ended as {outcome}")
    print(f"\nThe server counted: {made['counted']}\n")
    if made["counted"]["failed"]:
        missed.append(f"the server counted {made['counted']['failed']} failures of its own")
    print("| the undisturbed client | answers | p50 ms | p99 ms | longest ms | p50, times | p99, times |")
    print("|---|---|---|---|---|---|---|")
    parts = windows(made, seconds)
    base = float(np.median(parts[1][1]))
    for name, took in parts:
        p50, p99 = np.quantile(took, (0.5, 0.99))
        cells = (p50, p99, took.max(), p50 / base, p99 / base)
        print(f"| {name} | {len(took)} | " + " | ".join(f"{x:.1f}" for x in cells) + " |")
        if name.startswith("disturbed") and max(p50, p99) > SLOWER * base:
            missed.append(f"{name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, beside 4 that behave p50 {base:.1f} ms")
    (before, after), (opened, gained) = made["rss"], made["files"]
    print(
        f"\nRSS: {before:.1f} MiB at 10 % of the requests, {after:.1f} at the end ({100 * (after / before - 1):+.1f} %)"
    )
    print(f"open files without clients: {opened} at the start, {opened + gained} at the end")
    print(f"exit code after SIGTERM: {made['code']}")
    if after > before * (1 + GROWTH):
        missed.append(f"RSS grew from {before:.1f} to {after:.1f} MiB")
    if gained > 0:
        missed.append(f"{gained} files stayed open")
    if made["code"]:
        missed.append(f"SIGTERM ended the server with {made['code']}")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000, help="of the four clients together")
    parser.add_argument("--size", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--trouble", type=float, default=0.2, help="share of troubles; 0 shows what the machine does")
    parser.add_argument("--window", type=float, default=60.0, help="seconds of a row of the undisturbed client")
    parser.add_argument("--run", default="", help="folder of a complete policy run; a tiny one is trained without it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, *rest = json.loads(args.child)
        print(json.dumps({"troubled": troubled, "undisturbed": undisturbed}[kind](*rest)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        run = args.run or served.train(Path(folder)).policy_dir
        with served.Served("--run", run, "--port", "0") as server:
            missed = report(soak(server, args.requests, args.size, args.trouble), args.window)
            if missed:
                print("\n".join(("", "What the server said:", *server.lines[-20:])))
    print("\n".join(("", *(f"MISSED: {line}" for line in missed))) if missed else "\nall goals met")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
