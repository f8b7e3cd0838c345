"""Commands in processes of their own: signals at random moments, the undisturbed end, and what is left behind."""

import contextlib
import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from tests.kills import commands
from tests.kills.commands import COMMANDS, Command

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CODES = {signal.SIGTERM: (143,), signal.SIGUSR1: (143,), signal.SIGINT: (130,), signal.SIGKILL: ()}
LONGEST_S = 600.0  # for one command


@dataclasses.dataclass(frozen=True)
class Round:
    """So many signals to one command, before its end is compared."""

    command: str
    number: int
    signals: int


@dataclasses.dataclass
class Found:
    """What a round found; `moments` are the seconds after its start at which a signal reached the command."""

    command: str
    number: int
    signals: int = 0
    ends: int = 0
    seconds: float = 0.0
    moments: list[float] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


class Strikes:
    """Rounds below a folder, which several threads may play."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed, self.whole = folder, seed, folder / "world-0000"
        self.usual: dict[str, float] = {}  # seconds of an undisturbed command
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(commands.PRELOAD)

    def prepare(self, until: str) -> None:
        """Make the undisturbed world, up to a command."""
        commands.make_world(self.whole)
        for name, command in COMMANDS.items():
            begin, log = time.monotonic(), self.folder / f"{name}.log"
            code = self._end(self._start(command, self.whole, log))
            if code:
                raise RuntimeError(f"{name} ends with {code}:\n{log.read_text()[-3000:]}")
            self.usual[name] = time.monotonic() - begin
            if name == until:
                return

    def play(self, ticket: Round) -> Found:
        """The command in a copy of the world, struck again and again, then left alone. The world is removed."""
        command, begin = COMMANDS[ticket.command], time.monotonic()
        found = Found(ticket.command, ticket.number)
        rng = random.Random(f"{self.seed} {ticket.command} {ticket.number}")
        name = f"world-{1 + list(COMMANDS).index(ticket.command)}{ticket.number:03d}"
        world, log = self.folder / name, self.folder / f"{name}.log"
        shutil.copytree(self.whole, world, symlinks=True)
        _reset(command, world)
        fresh = True
        for _ in range(10 * ticket.signals):
            if found.signals == ticket.signals:
                break
            started = time.monotonic()
            if self._strike(command, world, log, rng, found):
                fresh = False
                continue
            if fresh:
                self.usual[command.name] = time.monotonic() - started
            self._compare(command, world, True, "after the signals", found)
            _reset(command, world)
            fresh = True
        else:
            found.problems.append("it ends before the signals reach it")
        code = self._end(self._start(command, world, log))
        if code:
            found.problems.append(f"exit code {code} of the last one: {_last_line(log)}")
        self._compare(command, world, True, "at the end", found)
        found.problems += [f"{each} is left" for each in commands.litter(world)]
        if "Traceback (most recent call last)" in (text := log.read_text()):
            found.problems.append(f"traceback: {text[text.index('Traceback (') :][:1500]}")
        if not found.problems:
            shutil.rmtree(world)
            log.unlink()
        found.seconds = time.monotonic() - begin
        return found

    def _strike(self, command: Command, world: Path, log: Path, rng: random.Random, found: Found) -> bool:
        """Start the command and send it a signal at a random moment; False when it ended as if there were none."""
        number, group = rng.choice(SIGNALS), rng.random() < 0.3
        moment = rng.random() ** 0.5  # later ones are likelier: that is where files are written
        begin, process = time.monotonic(), self._start(command, world, log)
        process.join(moment * self.usual[command.name])
        running = process.exitcode is None
        if running:
            found.signals += 1
            found.moments.append(round(time.monotonic() - begin, 2))
            with contextlib.suppress(ProcessLookupError):
                _send(process, number, group)
        who = f"{number.name}{' to all' if group else ''} after {time.monotonic() - begin:.2f} s"
        code = self._end(process)
        if code not in (0, -number, *CODES[number]) or (code and not running):
            found.problems.append(f"exit code {code}, {who}: {_last_line(log)}")
        if left := _left(process):
            found.problems.append(f"processes left, {who}: {left[:2]}")
        if running:
            self._compare(command, world, False, who, found)
        return running and code != 0

    def _compare(self, command: Command, world: Path, ended: bool, when: str, found: Found) -> None:
        """In a process of its own, since reading checkpoints would hold up the other threads."""
        found.ends += ended
        reading, writing = self._context.Pipe(duplex=False)
        process = self._process(_tell, writing, command.name, world, self.whole, ended)
        writing.close()
        try:
            difference = reading.recv()
        except EOFError:
            difference = "it cannot be compared"
        process.join()
        if difference:
            found.problems.append(f"{when}: {difference}")

    def _start(self, command: Command, world: Path, log: Path) -> BaseProcess:
        return self._process(commands.run, command.argv, world, log)

    def _process(self, target: Callable[..., object], *args: object) -> BaseProcess:
        process = self._context.Process(target=target, args=args)
        process.start()
        # Else each start asks all children for their exit codes; these can be read once, by the thread that waits
        multiprocessing.process._children.discard(process)  # pyright: ignore[reportAttributeAccessIssue]
        return process

    @staticmethod
    def _end(process: BaseProcess) -> int:
        process.join(LONGEST_S)
        if process.exitcode is None:
            process.kill()
            process.join()
            return -999
        return process.exitcode or 0


def _tell(pipe: Connection, name: str, world: Path, whole: Path, ended: bool) -> None:
    command = COMMANDS[name]
    pipe.send(command.differs(world / command.made, whole / command.made, ended))


def _reset(command: Command, world: Path) -> None:
    made = world / command.made
    if made.is_dir():
        shutil.rmtree(made)
    else:
        made.unlink(missing_ok=True)


def _send(process: BaseProcess, number: signal.Signals, group: bool) -> None:
    assert process.pid is not None
    if group:
        with contextlib.suppress(ProcessLookupError):  # it has no group of its own yet
            return os.killpg(process.pid, number)
    os.kill(process.pid, number)


def _left(process: BaseProcess, seconds: float = 10.0) -> list[str]:
    """Processes of a command that are there so long after its end; they are killed."""
    end, found = time.monotonic() + seconds, []
    while time.monotonic() < end:
        found = [p for p in psutil.process_iter() if _session(p) == process.pid and p.pid != process.pid]
        if not found:
            return []
        time.sleep(0.05)
    said = [f"{p.name()} {p.cmdline()!r:.80}" for p in found]
    for p in found:
        p.kill()
    return said


def _session(process: psutil.Process) -> int:
    with contextlib.suppress(OSError, psutil.Error):
        if process.status() != psutil.STATUS_ZOMBIE:
            return os.getsid(process.pid)
    return -1


def _last_line(log: Path) -> str:
    return log.read_text().strip().rpartition("\n")[2][-300:]
