"""Latency and rate of `hvd serve` for 1 and 4 of openpi's clients, beside Policy.act called directly.

    python -m tests.benchmarks.bench_serve [--run RUN_FOLDER] [--seconds 10] [--size 224] [--max-batch 8]
    python -m tests.benchmarks.bench_serve --run RUN_FOLDER --ways 500    # latency of the ways that one policy can act

Without --run a tiny policy with two cameras is trained first; with it, the run's own cameras are sent. Clients are
processes that ask again as soon as they are answered; images are `--size` pixels, as of a robot that resizes before it
sends. What a served request costs above Policy.act is the network, msgpack and two processes on the same cores.

`--ways N` needs a run with its value run beside it: a server for each of WAYS, and one client that asks them in turn,
N times each, so that whatever else the machine does falls on all of them alike.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests import served

_WARM = 20  # requests before the clock starts
WAYS = {
    "the policy alone": ("--extractor", "none"),
    "the policy alone, weights int8": ("--extractor", "none", "--weights", "int8"),
    "best_of_n, 8 chunks": ("--extractor", "best_of_n", "--extractor-params", "n", "8"),
    "q_guided": ("--extractor", "q_guided"),
}


def observation(about: dict[str, Any], size: int, rng: np.random.Generator) -> dict[str, Any]:
    """What a client sends to the server that described itself so."""
    images = {camera: rng.integers(0, 256, (size, size, 3), np.uint8) for camera in about["cameras"]}
    return {"state": rng.normal(size=about["state_dim"]).astype(np.float32), "images": images, "prompt": "go on"}


def timed(call: Callable[[], Any], seconds: float) -> tuple[list[float], float]:
    """Seconds of each call, and of all of them."""
    for _ in range(_WARM):
        call()
    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times, time.perf_counter() - begin


def direct(run: str, about: dict[str, Any], size: int, seconds: float) -> tuple[list[float], float]:
    """Policy.act in a process of its own, one row."""
    import jax

    from hvd.train.inference import load_policy

    policy = load_policy(run)
    given = observation(about, size, np.random.default_rng(0))
    images = {camera: image[None] for camera, image in given["images"].items()}
    key = jax.random.key(0)
    return timed(lambda: policy.act(given["state"][None], images, [given["prompt"]], key), seconds)


def client(port: int, number: int, size: int, seconds: float) -> tuple[list[float], float]:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    warnings.simplefilter("ignore", DeprecationWarning)  # of websockets 17.1, about openpi's client
    policy = WebsocketClientPolicy("127.0.0.1", port)
    given = observation(policy.get_server_metadata(), size, np.random.default_rng(number))
    return timed(lambda: policy.infer(given), seconds)


def child(*args: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.benchmarks.bench_serve", "--child", json.dumps(args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def gathered(children: list[subprocess.Popen[str]]) -> tuple[list[float], float]:
    """All latencies, and the requests per second of all together."""
    times: list[float] = []
    rate = 0.0
    for process in children:
        out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"a child of the benchmark ended with {process.returncode}")
        mine, wall = json.loads(out.splitlines()[-1])
        times += mine
        rate += len(mine) / wall
    return times, rate


def ways(run: str, size: int, count: int) -> None:
    """The table of WAYS: of servers that are asked in turn, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    with contextlib.ExitStack() as stack:
        clients = {}
        for name, options in WAYS.items():
            command = ("--run", run, "--port", "0", "--max-batch", "1", *options)
            server = stack.enter_context(served.Served(*command))
            clients[name] = server.client()
            stack.callback(clients[name]._ws.close)
        given = observation(clients[name].get_server_metadata(), size, np.random.default_rng(0))
        names = list(WAYS)
        for i in range(_WARM + count):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                begin = time.perf_counter()
                clients[name].infer(given)
                if i >= _WARM:
                    times[name].append(time.perf_counter() - begin)
    print(f"\n{run}: {count} requests each, in turn\n\n| | p50 ms | p95 ms | p50, times |\n|---|---|---|---|")
    base = np.median(times[names[0]])
    for name in names:
        p50, p95 = np.quantile(times[name], (0.5, 0.95))
        print(f"| {name} | {p50 * 1e3:.1f} | {p95 * 1e3:.1f} | {p50 / base:.2f} |")


def row(name: str, times: list[float], rate: float, batches: str) -> str:
    p50, p99 = np.quantile(times, (0.5, 0.99)) * 1e3
    return f"| {name} | {p50:.1f} | {p99:.1f} | {rate:.1f} | {len(times)} | {batches} |"


def batches_between(before: dict[str, float], after: dict[str, float]) -> str:
    gained = {name.split('"')[1]: n - before.get(name, 0) for name, n in after.items() if "batches_total" in name}
    return " ".join(f"{size}x{n:.0f}" for size, n in gained.items() if n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="", help="folder of a complete policy run")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--ways", type=int, default=0, help="requests to each way that the policy of --run can act")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, *rest = json.loads(args.child)
        print(json.dumps({"direct": direct, "client": client}[kind](*rest)))
        return
    if args.ways:
        return ways(args.run, args.size, args.ways)
    with tempfile.TemporaryDirectory() as folder:
        run = args.run or served.train(Path(folder)).policy_dir
        lines = []
        with served.Served("--run", run, "--port", "0", "--max-batch", str(args.max_batch)) as server:
            made = server.client()
            about = made.get_server_metadata()
            made._ws.close()
            for count in (1, 4):
                before = served.counts(server.get("/metrics")[1])
                children = [child("client", server.port, n, args.size, args.seconds) for n in range(count)]
                times, rate = gathered(children)
                batches = batches_between(before, served.counts(server.get("/metrics")[1]))
                lines.append(row(f"hvd serve, {count} client{'s' * (count > 1)}", times, rate, batches))
            server.end()
        # after the server has gone: the device's memory is one process's at a time
        lines.insert(0, row("Policy.act", *gathered([child("direct", run, about, args.size, args.seconds)]), "1"))
        print(
            f"\n{about['run']}: {len(about['cameras'])} cameras of {args.size} x {args.size}, {args.seconds:g} s each\n"
        )
        print("| | p50 ms | p99 ms | requests/s | requests | batches (rows x count) |\n|---|---|---|---|---|---|")
        print("\n".join(lines))


if __name__ == "__main__":
    main()
