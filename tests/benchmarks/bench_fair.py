"""What a polite client of `hvd serve` waits while others do what they should not.

    python -m tests.benchmarks.bench_fair [--kinds NAME...] [--rounds 4] [--seconds 5] [--attackers 31] [--size 32 48]

A client asks every 50 ms, alone and beside attackers, by turns in one run, so that both see the same machine. Attackers
stand for another machine: they live in a process of their own, with an address of their own, which gets only the CPU
time that the server and the client leave (nice 19). p50 and p95 are medians over the rounds. For the TLS kinds the
server has a certificate.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from hvd.client import connect
from hvd.serve import msgpack
from tests import served

_EVERY_S = 0.05  # between two questions of the polite client
_SETTLE_S = 1.0  # until attackers are at work, and until they are forgotten
ELSEWHERE: dict[str, Any] = {"local_addr": ("127.0.0.2", 0)}  # where attackers come from


def frame(opcode: int, data: bytes) -> bytes:
    """A websocket frame of a client, masked with zeros."""
    size = struct.pack(">BQ", 255, len(data)) if len(data) >= 1 << 16 else struct.pack(">BH", 254, len(data))
    return bytes([0x80 | opcode]) + size + bytes(4) + data


async def joined(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A websocket after its handshake and the server's first message."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20, **ELSEWHERE)
    key = base64.b64encode(os.urandom(16)).decode()
    head = "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    writer.write(f"{head}Sec-WebSocket-Key: {key}\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    await answer(reader)
    return reader, writer


async def answer(reader: asyncio.StreamReader) -> bytes:
    """The next message of the server."""
    while True:
        first, length = await reader.readexactly(2)
        if length > 125:
            length = int.from_bytes(await reader.readexactly(2 if length == 126 else 8))
        data = await reader.readexactly(length)
        if first & 15 < 8:
            return data


async def asks(port: int, message: bytes) -> None:
    """Sends one message after another, each after the answer to the one before."""
    reader, writer = await joined(port)
    with contextlib.closing(writer):
        while True:
            writer.write(message)
            await writer.drain()
            await answer(reader)


async def pings(port: int) -> None:
    reader, writer = await joined(port)
    with contextlib.closing(writer):
        while True:
            writer.write(frame(9, b"x" * 100) * 50)
            await writer.drain()
            await reader.read(1 << 16)


async def half_open(port: int) -> None:
    """Begins a request and never ends it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **ELSEWHERE)
    with contextlib.closing(writer):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX: ")
        while not reader.at_eof():
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(0.1)


async def connects(port: int) -> None:
    """Websockets that are opened and left at once."""
    _, writer = await joined(port)
    writer.close()


async def shakes_hands(port: int) -> None:
    """TLS handshakes, one after another."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, **ELSEWHERE)
    writer.close()


async def never_shakes(port: int) -> None:
    """A TLS handshake that is begun and never ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **ELSEWHERE)
    with contextlib.closing(writer):
        writer.write(b"\x16\x03\x01\x02\x00\x01")
        await reader.read(1)


def _images(size: int) -> bytes:
    observation = served.observation(np.random.default_rng(1))
    images = {name: np.zeros((size, size, 3), np.uint8) for name in list(observation["images"])}
    return frame(2, msgpack.pack(observation | {"images": images}))


def _junk(size: int) -> bytes:
    return frame(2, b"\x81\xa5state\xc6" + struct.pack(">I", size) + bytes(size))


def _steps(number: int) -> bytes:
    return frame(2, msgpack.pack(served.observation(np.random.default_rng(1)) | {"num_flow_steps": number}))


# What each attacker does again and again; whatever ends it, it begins anew
KINDS: dict[str, Callable[[int, int], Awaitable[None]]] = {
    "messages of 31 MiB": lambda port, i: asks(port, _junk(31 << 20)),
    "messages of 1 MiB": lambda port, i: asks(port, _junk(1 << 20)),
    "images of 3 MiB": lambda port, i: asks(port, _images(724)),
    "images of 1 MiB": lambda port, i: asks(port, _images(417)),
    "images of 256 KiB": lambda port, i: asks(port, _images(208)),
    "requests": lambda port, i: asks(port, _images(32)),
    "100 flow steps": lambda port, i: asks(port, _steps(100 - i)),
    "pings": lambda port, i: pings(port),
    "half-open connections": lambda port, i: half_open(port),
    "connections": lambda port, i: connects(port),
    "TLS: handshakes": lambda port, i: shakes_hands(port),
    "TLS: handshakes never ended": lambda port, i: never_shakes(port),
}


def attack(kind: str, port: int, attackers: int) -> None:
    """Until this process is killed."""
    os.nice(19)

    async def again(i: int) -> None:
        while True:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                await KINDS[kind](port, i)
            await asyncio.sleep(0.01)

    async def everybody() -> None:
        await asyncio.gather(*map(again, range(attackers)))

    asyncio.run(everybody())


def polite(url: str, seconds: float, size: tuple[int, int]) -> list[float]:
    """Milliseconds of each answer."""
    observation = served.observation(np.random.default_rng(0), size)
    found, end = [], time.monotonic() + seconds
    with connect(url) as server:
        while time.monotonic() < end:
            begin = time.perf_counter()
            server.ask(observation)
            found.append(1e3 * (time.perf_counter() - begin))
            time.sleep(_EVERY_S)
    return found


def rounds(kind: str, server: served.Served, url: str, args: argparse.Namespace) -> str:
    """The row of a kind: alone, attacked, alone, attacked, ..."""
    quantiles: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for attacked in (False, True) * args.rounds:
        with contextlib.ExitStack() as stack:
            if attacked:
                child = json.dumps([kind, server.port, args.attackers])
                process = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.bench_fair", "--child", child])
                stack.callback(process.wait)
                stack.callback(process.kill)
                time.sleep(2 * _SETTLE_S)
            else:
                time.sleep(_SETTLE_S)
            quantiles[attacked].append(np.quantile(polite(url, args.seconds, tuple(args.size)), (0.5, 0.95)))
    alone, beside = (np.median(quantiles[attacked], axis=0) for attacked in (False, True))
    each = " ".join(f"{b[0] / a[0]:.1f}" for a, b in zip(quantiles[False], quantiles[True], strict=True))
    cells = (kind, *(f"{x:.1f}" for x in (alone[0], beside[0], beside[0] / alone[0])), each)
    return f"| {' | '.join(cells)} | {alone[1]:.1f} | {beside[1]:.1f} | {beside[1] / alone[1]:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--attackers", type=int, default=31)
    parser.add_argument(
        "--size", nargs=2, type=int, default=(32, 48), help="height and width of the client's two images"
    )
    parser.add_argument("--run", default="", help="folder of a complete policy run; a tiny one is trained without it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return attack(*json.loads(args.child))
    print("| beside | p50 alone, ms | p50 | times | each round | p95 alone | p95 | times |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder, run = Path(name), args.run or served.train(Path(name)).policy_dir
        pem = folder / "pem"
        words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
        subprocess.run(
            ["openssl", *words.split(), "-keyout", pem, "-out", folder / "c.pem"], check=True, stderr=subprocess.DEVNULL
        )
        pem.write_bytes(pem.read_bytes() + (folder / "c.pem").read_bytes())
        os.environ["SSL_CERT_FILE"] = str(pem)
        for tls in (False, True):
            kinds = [kind for kind in args.kinds if kind.startswith("TLS") == tls]
            if kinds:
                flags = ("--tls-cert", str(pem)) if tls else ()
                with served.Served("--run", run, "--port", "0", *flags) as server:
                    url = f"{'wss' if tls else 'ws'}://127.0.0.1:{server.port}"
                    polite(url, 1.0, tuple(args.size))
                    for kind in kinds:
                        print(rounds(kind, server, url, args), flush=True)
                    server.end()


if __name__ == "__main__":
    main()
