"""hvd serve --config NAME | --run PATH: a trained policy behind openpi's websocket protocol.

With --config NAME --checkpoint PATH the parameters are those of a checkpoint in openpi's form instead of a run's.

    from openpi_client import websocket_client_policy
    policy = websocket_client_policy.WebsocketClientPolicy("127.0.0.1", 8000)
    actions = policy.infer({"state": state, "images": {"base_0_rgb": image}, "prompt": "carry the tote"})["actions"]

Actions are raw and absolute, [action_horizon, robot's dims], as in the dataset. How many of a chunk are executed is the
client's business (openpi_client.action_chunk_broker). A server is no run: SIGTERM and Ctrl-C end it with exit code 0,
after it has answered what it was asked.
"""

import asyncio
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hvd import overrides
from hvd.checks import check_config
from hvd.configs import Experiment
from hvd.errors import EXIT_COMPLETE, Stopped, UserError
from hvd.fields import between, option
from hvd.robots import get_robot
from hvd.runtime import preemption

if TYPE_CHECKING:
    from hvd.serve.connections import PolicyServer
    from hvd.serve.metrics import Metrics
    from hvd.serve.observation import RequestReader
    from hvd.train.inference import Policy

API_KEY = "HVD_API_KEY"
_LOOPBACK = ("127.", "::1")
_MAX_BATCH = 256
_KEY_LENGTH = 16  # the least
_DRAIN_S = 20.0
_SWITCH_S = 0.0005  # until a thread that reads images lets the event loop run; Python's own 5 ms add up


@dataclass(frozen=True)
class ServeOptions:
    """What the server itself is told; other options say which experiment, or are fields of its config."""

    run: str = option("", "serve this run folder, instead of the policy run of a config")
    checkpoint: str = option(
        "", "with --config: serve this checkpoint of openpi's form (folder or gs://, s3:// URL), not a run"
    )
    value_run: str = option(
        "", "value run of a policy that acts by one, if not the one that it was trained beside (best_of_n, q_guided)"
    )
    extractor: Literal["trained", "none", "best_of_n", "q_guided"] = option(
        "trained", "how the policy asks its value run, if not as it was trained to; none: not at all"
    )
    extractor_params: dict[str, float] = option({}, "numbers that --extractor declares, as in `n 4`")
    weights: Literal["full", "int8"] = option(
        "full", "int8: the policy's large matrices in 8 bits: less memory, and actions that differ a little"
    )
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = option(8000, between(0, 65_535), "0 takes a free one and prints it")
    default_prompt: str = option("", "for requests without one; else the datasets' if they have exactly one")
    num_flow_steps: int = option(0, between(0, 100), "Euler steps of requests that name none; 0 = the run's")
    real_time_chunking: bool = option(False, "take requests that carry the actions still to be executed")
    noise_seed: int = option(0, between(0, 2**31 - 1), "of the noise of requests without a seed")
    max_batch: int = option(8, between(1, _MAX_BATCH), "requests that wait are computed together, up to so many")
    max_wait_ms: float = option(0.0, between(0, 10_000), "how long a request may wait for others to join it")
    max_connections: int = option(32, between(1, 10_000), "clients at the same time")
    max_message_mb: float = option(32.0, between(0.01, 1024), "MiB of one request")
    aliases: dict[str, str] = option({}, "keys of requests, pair by pair: the client's and ours")
    other_keys: bool = option(False, "leave out keys of requests that nobody knows; else they are refused")
    single_action: bool = option(False, "replies have `action` too, the first one of the chunk")
    tls_cert: str = option("", "PEM file of the server's certificate and its chain: clients connect to wss://")
    tls_key: str = option("", "PEM file of its key, without a passphrase; default: it is in --tls-cert too")
    log_every_s: float = option(60.0, between(0, 1e6), "seconds between log lines; 0 = none but the last")


_ABOUT = f"""A trained policy behind openpi's websocket protocol: the policy run of a config (its fields, --exp-name and
--policy.run-name among them, say which), or --run PATH. All fields of the config are options too.

With {API_KEY} set, clients must send that key (openpi_client: api_key=...).
GET /healthz and /metrics on the same port. SIGTERM: requests in flight are answered, then exit code 0."""


def main(argv: Sequence[str]) -> int:
    """`hvd serve ...`; returns the exit code when the server was told to stop."""
    if overrides.asks_help(argv):
        overrides.print_help("hvd serve --config NAME | --run PATH", _ABOUT, overrides.Choice(), ServeOptions())
        return EXIT_COMPLETE
    options, rest = overrides.take(ServeOptions(), argv)
    target = chosen(options, rest)
    api_key, tls = api_key_of(os.environ.get(API_KEY)), tls_of(options.tls_cert, options.tls_key)
    from hvd.serve.limits import allow_files

    allow_files(options.max_connections)
    with bound(options.host, options.port) as sock:
        if not sock.getsockname()[0].startswith(_LOOPBACK):
            who = "" if api_key else f"whoever reaches it may use the policy; {API_KEY} can ask for a key. "
            clear = "" if tls else "Observations, actions and the key travel in clear; --tls-cert encrypts them"
            if who or clear:
                print(f"--host {options.host}: {who}{clear}", flush=True)
        try:
            (server, batcher), metrics, line = build(target, options, api_key, tls)
            address = sock.getsockname()
            host = f"[{address[0]}]" if ":" in address[0] else address[0]
            line = f"serving {line} on {'wss' if tls else 'ws'}://{host}:{address[1]}"
            asyncio.run(_serve(server, metrics, sock, line, options.log_every_s))
        except Stopped:  # the loop, once it runs, takes signals itself
            print("stopped before the server was ready", flush=True)
            return EXIT_COMPLETE
        batcher.stop(_DRAIN_S)
    print(f"stopped; {metrics.line(whole=True)}", flush=True)
    return EXIT_COMPLETE


def chosen(options: ServeOptions, rest: Sequence[str]) -> Experiment | str:
    """The experiment or the run folder to serve."""
    for name in ("value_run", "extractor", "extractor_params"):
        if options.checkpoint and getattr(options, name) != getattr(ServeOptions(), name):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag}: a --checkpoint of openpi's form holds a policy that acts alone; leave one out")
    if options.extractor_params and options.extractor == "trained":
        raise UserError("--extractor-params needs --extractor, which says whose numbers they are")
    if options.extractor == "none" and options.value_run:
        raise UserError("--value-run: a policy that acts by no critic asks none; leave it or --extractor none out")
    named = any(arg.startswith("--config") for arg in rest)
    if named == bool(options.run):
        raise UserError("hvd serve needs one of --config NAME (`hvd configs` lists them) and --run PATH")
    if options.run:
        if options.checkpoint:
            raise UserError("--checkpoint needs --config NAME, which says what the checkpoint is of; leave --run out")
        if rest:
            raise UserError(f"{rest[0]}: a run folder knows its own config; --run takes no fields of one")
        return options.run
    cfg = overrides.experiment(rest)
    check_config(cfg)
    return cfg


def api_key_of(value: str | None) -> str:
    """The key that clients must send, "" for none; UserError for one that no header can carry."""
    if value is None:
        return ""
    if not value or not value.isascii() or not value.isprintable() or value != value.strip():
        raise UserError(f"{API_KEY} is empty or has other than plain printable characters: unset it, or set a key")
    if len(value) < _KEY_LENGTH:
        raise UserError(
            f"{API_KEY} has {len(value)} characters, at least {_KEY_LENGTH} are needed: openssl rand -hex 16 makes one"
        )
    return value


def tls_of(certificate: str, key: str) -> ssl.SSLContext | None:
    """How the server speaks TLS, None for in clear; UserError for files that do not fit."""
    if not certificate:
        if key:
            raise UserError("--tls-key needs --tls-cert")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(os.path.expanduser(certificate), os.path.expanduser(key) or None, password=_no_password)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--tls-cert {certificate} --tls-key {key}: no certificate with its key there ({error})"
        ) from None
    return context


def _no_password() -> str:
    raise ValueError("the key has a passphrase")


def bound(host: str, port: int) -> socket.socket:
    """A socket that owns the port but does not listen: until the policy is ready, clients are refused and try again."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host}: no such address ({error})") from None
    sock = socket.socket(family, kind, number)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror}): choose another --port") from None
    return sock


def build(
    target: Experiment | str, options: ServeOptions, api_key: str, tls: ssl.SSLContext | None
) -> tuple[tuple["PolicyServer", Any], "Metrics", str]:
    """Load, compile, warm up. Returns (server, its batcher), its metrics, and a line about what it serves."""
    from hvd.serve.batching import Batcher
    from hvd.serve.connections import Limits, PolicyServer
    from hvd.serve.metrics import Metrics
    from hvd.serve.observation import RequestReader, default_prompt
    from hvd.serve.sampler import Sampler, sizes_up_to
    from hvd.serve.translation import Translation

    begin = time.monotonic()
    policy = _load(target, options)
    cfg = policy.cfg
    reader = RequestReader(
        cfg,
        policy.transform,
        default_prompt=options.default_prompt or default_prompt(cfg),
        num_flow_steps=options.num_flow_steps,
        max_rows=options.max_batch,
        chunking=options.real_time_chunking,
    )
    sampler = Sampler(policy, sizes_up_to(options.max_batch), options.real_time_chunking)
    loaded = time.monotonic()
    size = f"{policy.weight_bytes / 1e6:,.1f} MB ({policy.kept})"
    print(
        f"loaded in {loaded - begin:.1f} s: weights of {size}; compiling for batches of {_listed(sampler.sizes)}",
        flush=True,
    )
    sampler.warm(reader.read(example(policy, reader), seed=0))
    print(f"compiled in {time.monotonic() - loaded:.1f} s", flush=True)
    metrics = Metrics(policy.kept, policy.weight_bytes)
    batcher = Batcher(sampler, metrics, max_wait=options.max_wait_ms / 1e3, usual=reader.num_flow_steps)
    about = describe(options.checkpoint or target, policy, reader)
    server = PolicyServer(
        reader,
        batcher,
        metrics,
        metadata=about,
        limits=Limits(message=int(options.max_message_mb * 2**20), connections=options.max_connections, drain=_DRAIN_S),
        api_key=api_key,
        tls=tls,
        noise_seed=options.noise_seed,
        translation=Translation(options.aliases, options.other_keys, options.single_action),
    )
    line = (
        f"{about['run']} ({about['config']}, {about['robot']}): state of {reader.state_dim} dims, "
        f"{'cameras ' + ', '.join(reader.cameras) if reader.cameras else 'no camera'}, chunks of "
        f"{about['action_horizon']} x {len(about['action_names'])} actions, "
        f"{'prompt ' + repr(reader.default_prompt) if reader.default_prompt else 'no default prompt'}"
    )
    return (server, batcher), metrics, line


def _load(target: Experiment | str, options: ServeOptions) -> "Policy":
    int8 = options.weights == "int8"
    if options.checkpoint:
        from hvd.serve.checkpoint import load_checkpoint

        assert isinstance(target, Experiment)
        return load_checkpoint(target, options.checkpoint, int8=int8)
    from hvd.train.inference import load_policy

    how = {"extractor": options.extractor, "extractor_params": options.extractor_params}
    return load_policy(target, value_run=options.value_run, int8=int8, **how)


def example(policy: "Policy", reader: "RequestReader") -> dict[str, Any]:
    """An observation such as a client sends: the mean state, black images."""
    import numpy as np

    size = policy.cfg.model.image_size
    images = {camera: np.zeros((size, size, 3), np.uint8) for camera in reader.cameras}
    return {"state": policy.transform.stats["state"].mean, "images": images, "prompt": reader.default_prompt or "warm"}


def describe(target: Experiment | str, policy: "Policy", reader: "RequestReader") -> dict[str, Any]:
    """The metadata that each client is sent."""
    from hvd.train import run_dir as runs

    cfg = policy.cfg
    return {
        "server": f"hvd {runs.code_version()}",
        "config": cfg.name,
        "run": target.policy_dir if isinstance(target, Experiment) else os.fspath(target),
        "robot": cfg.robot,
        "action_names": list(get_robot(cfg.robot).action_names),
        "action_horizon": cfg.model.action_horizon,
        "action_dim": cfg.model.action_dim,
        "state_dim": reader.state_dim,
        "state_keys": list(reader.state_keys),
        "cameras": dict(reader.cameras),
        "image_size": cfg.model.image_size,
        "default_prompt": reader.default_prompt,
        "num_flow_steps": reader.num_flow_steps,
        "real_time_chunking": reader.chunking,
        "prefix_max": cfg.policy.prefix_max,
        "acts_by": policy.acts_by,
        "weights": policy.kept,
        "deadlines": True,
    }


async def _serve(
    server: "PolicyServer", metrics: "Metrics", sock: socket.socket, line: str, log_every_s: float
) -> None:
    """Until a signal: the first one lets requests in flight be answered, the second one ends it."""
    sys.setswitchinterval(_SWITCH_S)
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def signalled(number: signal.Signals) -> None:
        (hurry if stop.is_set() else stop).set()
        print(f"{number.name}: stopping", file=sys.stderr, flush=True)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        loop.add_signal_handler(number, signalled, number)
    if preemption.requested():  # a signal before these handlers, whose exception a library swallowed
        stop.set()
    log = asyncio.ensure_future(_log(metrics, log_every_s)) if log_every_s else None
    await server.run(sock, stop, hurry, lambda: print(line, flush=True))
    if log is not None:
        log.cancel()


async def _log(metrics: "Metrics", every_s: float) -> None:
    seen = 0
    while True:
        await asyncio.sleep(every_s)
        if metrics.requests != seen:
            seen = metrics.requests
            print(metrics.line(), flush=True)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
