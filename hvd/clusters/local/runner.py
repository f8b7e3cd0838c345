"""Runs a plan on this machine: each step as processes, signals handed on, logs kept, the failing exit code returned.

Steps of one group run side by side, each on its own share of the cores: small models gain little from many threads, so
two trainings on one core each are faster than one after the other on two.
"""

import contextlib
import glob
import itertools
import os
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TextIO

from hvd import files
from hvd.clusters.local.output import Stream, short
from hvd.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_STOPPED, EXIT_USER, UserError
from hvd.stages import Group, Step

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STATUS_SECONDS = 10.0
PATIENCE_SECONDS = 60.0  # for another launch of the same experiment to end
GRACE_SECONDS = 60.0  # from SIGTERM to SIGKILL for the companions of a process that failed
AT_A_TIME = 4  # steps of a group, at most
COMMAND = (sys.executable, "-m", "hvd.cli")


@dataclass
class Running:
    """One process of one step."""

    step: Step
    process: subprocess.Popen
    streams: list[Stream]
    log: TextIO
    pipes: list[IO[bytes]]
    ended: float = 0.0  # when it was first seen to have ended


@dataclass
class Runner:
    """Runs groups of steps. `nodes` processes for each step that is spread; logs below `log_dir`.

    Attributes:
        options: tell each step the config.
    """

    log_dir: Path
    nodes: int = 1
    options: tuple[str, ...] = ()
    command: tuple[str, ...] = COMMAND
    _running: list[Running] = field(default_factory=list)
    _signal: int = 0
    _lock: int = -1
    _shown: str = ""

    def run(self, groups: Sequence[Group]) -> int:
        """Run every group in order; the exit code of the first step that fails, 143 when a signal stopped the run."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        with _only_one(self.log_dir) as self._lock, self._signals():
            for group in groups:
                code = self._run_group(group)
                if code != EXIT_COMPLETE:
                    return code
        return EXIT_COMPLETE

    def _run_group(self, group: Group) -> int:
        waiting = list(group)
        shares = core_shares(len(group))
        codes: list[int] = []
        free = list(range(len(shares)))
        used: dict[str, int] = {}
        next_status = time.monotonic() + STATUS_SECONDS
        with selectors.DefaultSelector() as selector:
            while True:
                while waiting and free and not self._signal and not any(codes):
                    step = waiting.pop(0)
                    used[step.name] = free.pop(0)
                    self._start(step, shares[used[step.name]], selector, alone=len(group) == 1)
                if not self._running:
                    break
                self._pump(selector)
                for done in self._reap(selector):
                    codes.append(self._code(done))
                    last = not any(other.step is done.step for other in self._running)
                    if last and done.step.name in used:  # several processes of one step may end at once
                        free.append(used.pop(done.step.name))
                    if codes[-1] and not self._signal:
                        self._stop_companions(done)
                if time.monotonic() >= next_status:
                    self._status()
                    next_status = time.monotonic() + STATUS_SECONDS
        if self._signal and not any(codes):
            codes.append(EXIT_STOPPED)  # between two steps, or a step that was done by then; not complete in any case
        return worst(codes)

    def _start(self, step: Step, cores: set[int], selector: selectors.BaseSelector, alone: bool) -> None:
        count = self.nodes if step.spread else 1
        cores_of = [cores] * count if len(cores) < count else _split(sorted(cores), count)
        coordinator = f"127.0.0.1:{_free_port()}"
        print(f"[{time.strftime('%H:%M:%S')}] {step.name}", flush=True)
        for index in range(count):
            name = step.name if index == 0 else f"{step.name}.{index}"
            log = open(self.log_dir / f"{name}.log", "a", encoding="utf-8")
            env = {**os.environ, **environment(cores_of[index] if len(cores) < _cpu_count() or count > 1 else set())}
            if count > 1:
                env |= node_environment(coordinator, count, index)
            argv = [*self.command, *step.words(self.options)]
            print(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(argv)}", file=log, flush=True)
            with affinity(cores_of[index]):
                process = subprocess.Popen(
                    argv,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # the terminal's Ctrl-C reaches it once, through us
                    pass_fds=(self._lock,),
                )
            prefix = "" if alone and index == 0 else f"{name} | "
            screen_out = sys.stdout if index == 0 else None  # the other processes print the same
            streams = [
                Stream(screen_out, log, prefix, raw=alone and count == 1 and sys.stdout.isatty()),
                Stream(sys.stderr, log, prefix, raw=alone and count == 1 and sys.stderr.isatty()),
            ]
            pipes = [pipe for pipe in (process.stdout, process.stderr) if pipe is not None]
            running = Running(step, process, streams, log, pipes)
            self._running.append(running)
            for pipe, stream in zip(pipes, streams, strict=True):
                selector.register(pipe, selectors.EVENT_READ, (running, pipe, stream))
            if self._signal:  # it came while the process was being started
                self._send(running, self._signal)

    def _pump(self, selector: selectors.BaseSelector) -> None:
        for key, _ in selector.select(timeout=0.2):
            running, pipe, stream = key.data
            chunk = os.read(pipe.fileno(), 1 << 16)
            stream.feed(chunk)
            if not chunk:
                selector.unregister(pipe)
                pipe.close()
                running.pipes.remove(pipe)

    def _reap(self, selector: selectors.BaseSelector) -> list[Running]:
        """Processes that have ended and said their last lines."""
        done = [running for running in self._running if running.process.poll() is not None and self._silent(running)]
        for running in done:
            for pipe in running.pipes:  # still open in a grandchild
                selector.unregister(pipe)
                pipe.close()
            self._running.remove(running)
            running.log.close()
        return done

    @staticmethod
    def _silent(running: Running) -> bool:
        running.ended = running.ended or time.monotonic()
        return not running.pipes or time.monotonic() - running.ended > 1.0

    def _code(self, done: Running) -> int:
        """The exit code as a shell has it; a death by the signal that we handed on is a stop."""
        code = done.process.returncode
        log = self.log_dir / f"{done.step.name}.log"
        if code < 0:
            number = -code
            if self._signal and number in FORWARDED:
                return EXIT_STOPPED
            hint = " (out of memory?)" if number == signal.SIGKILL else ""
            print(f"{done.step.name}: killed by {signal.Signals(number).name}{hint}; log: {log}", file=sys.stderr)
            return 128 + number
        if code not in (EXIT_COMPLETE, EXIT_USER, EXIT_STOPPED):
            print(f"{done.step.name}: failed with exit code {code}; log: {log}", file=sys.stderr)
        return code

    def _stop_companions(self, failed: Running) -> None:
        if not self._running:
            return
        print(f"{failed.step.name} has failed; stopping {', '.join(r.step.name for r in self._running)}", flush=True)
        for running in self._running:
            self._send(running, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for running in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.process.wait(max(0.0, deadline - time.monotonic()))
            if running.process.poll() is None:
                running.process.kill()

    def _status(self) -> None:
        """The state of the bars, when it has changed; a terminal draws a single bar itself."""
        bars = [(r.step.name, short(s.bar)) for r in self._running for s in r.streams if s.bar]
        if not bars or (len(self._running) == 1 and sys.stderr.isatty()):
            return
        seen = dict(reversed(bars))  # one of each task: process 0's
        if len(seen) == 1:
            line = next(iter(seen.values()))
        else:
            line = "   ".join(f"{name}: {seen[name].partition(': ')[2]}" for name in reversed(seen))
        if line != self._shown:
            print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)
            self._shown = line

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def forward(number, frame):
            self._signal = number
            for running in self._running:
                self._send(running, number)

        before = {number: signal.signal(number, forward) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @staticmethod
    def _send(running: Running, number: int) -> None:
        if running.process.poll() is None:
            running.process.send_signal(number)


def worst(codes: Sequence[int]) -> int:
    """One exit code for several: the user's mistake first, then a failure, then a stop, else complete."""
    failures = [code for code in codes if code not in (EXIT_COMPLETE, EXIT_STOPPED)]
    if EXIT_USER in failures:
        return EXIT_USER
    if failures:
        return next((code for code in failures if code != EXIT_FAILED), EXIT_FAILED)
    return EXIT_STOPPED if EXIT_STOPPED in codes else EXIT_COMPLETE


def environment(cores: set[int]) -> dict[str, str]:
    """Variables of a step; with `cores` also as many threads as it has cores (libraries count the machine's)."""
    env = {"HVD_LAUNCHER_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    if cores:
        env |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(len(cores)))
    return env


def node_environment(coordinator: str, count: int, index: int) -> dict[str, str]:
    """Variables by which a step finds its companions (hvd/runtime/processes.py); GPUs are divided among them."""
    env = {"HVD_COORDINATOR": coordinator, "HVD_NUM_PROCESSES": str(count), "HVD_PROCESS_ID": str(index)}
    if visible := gpus():
        env["CUDA_VISIBLE_DEVICES"] = ",".join(_split(visible, count)[index])
    return env


def gpus() -> list[str]:
    """Names of the GPUs that a step would see; asks no driver and no jax."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return sorted(path.removeprefix("/dev/nvidia") for path in glob.glob("/dev/nvidia[0-9]*"))


def devices(nodes: int) -> int:
    """How many devices a run on this machine has, over all its processes."""
    if visible := gpus():
        return len(visible)
    for flag in os.environ.get("XLA_FLAGS", "").split():
        if flag.startswith("--xla_force_host_platform_device_count="):
            return nodes * int(flag.partition("=")[2])
    return nodes


def core_shares(steps: int) -> list[set[int]]:
    """The cores for each of the steps that run at a time; one share with all cores where a GPU does the work."""
    return shares(1 if gpus() else max(1, min(steps, _cpu_count(), AT_A_TIME)))


def shares(parts: int) -> list[set[int]]:
    """This process's cores in `parts` shares; each has all of them where there are fewer cores than parts."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(_cpu_count()))
    return _split(cores, parts) if parts <= len(cores) else [set(cores) for _ in range(parts)]


def _split(items: list, parts: int) -> list:
    """`items` in `parts` consecutive shares whose sizes differ by one at most (sets of ints, lists of names)."""
    if len(items) < parts:
        raise UserError(f"--nodes {parts}: this machine has only {len(items)} GPU(s) to divide among them")
    edges = [round(i * len(items) / parts) for i in range(parts + 1)]
    shares = [items[a:b] for a, b in itertools.pairwise(edges)]
    return [set(share) for share in shares] if isinstance(items[0], int) else shares


def _cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextlib.contextmanager
def affinity(cores: set[int]) -> Iterator[None]:
    """A process that is started inside has these cores; it inherits them from the thread that starts it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _only_one(folder: Path) -> contextlib.AbstractContextManager[int]:
    """One launcher an experiment. Steps inherit the lock: a launcher that was killed leaves steps that still save."""
    until, told = time.monotonic() + PATIENCE_SECONDS, False

    def waiting() -> None:
        nonlocal told
        if time.monotonic() > until:
            raise UserError(f"another launch is at work on {folder.parent}; wait for it or stop it")
        if not told:
            print(f"another launch is at work on {folder.parent}; waiting for it to end", flush=True)
            told = True
        time.sleep(0.5)

    return files.locked(folder / "lock", waiting, keep=True)
