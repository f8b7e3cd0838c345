"""Processes that end with the process which started them."""

import contextlib
import ctypes
import faulthandler
import multiprocessing.context
import os
import signal
import sys
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def die_with(parent: int, number: signal.Signals) -> None:
    """This process gets a signal when its parent, process `parent`, ends: even when that one was killed. Linux only."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(number))
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), number)


class _Worker(multiprocessing.context.SpawnProcess):
    def start(self) -> None:
        """Without the module that is run as a program: it is not needed, and a script without a guard would run again
        in each worker."""
        program = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = program

    def terminate(self) -> None:
        """The executor ends the workers of a broken pool so; they ignore SIGTERM, and it would wait for ever."""
        self.kill()


class _Spawn(multiprocessing.context.SpawnContext):
    Process = _Worker  # pyright: ignore[reportAssignmentType]


def spawn_pool(
    workers: int, begin: Callable[..., object] | None = None, arguments: tuple[Any, ...] = ()
) -> ProcessPoolExecutor:
    """A pool of spawned processes (a fork of a process with threads may hang). `begin(*arguments)` runs first in each.

    The workers ignore stop signals, which reach a whole process group: the parent decides, and they end with it.
    """
    return ProcessPoolExecutor(workers, _Spawn(), _begin, (os.getpid(), begin, arguments))


HANG_S = 600.0  # seconds without a sign of work after which a process of ours is held for hung


def kill(pool: ProcessPoolExecutor) -> None:
    """End a pool's processes, which ignore other signals: what they had to do raises BrokenProcessPool."""
    for process in (pool._processes or {}).values():
        process.kill()


class Isolated(contextlib.AbstractContextManager["Isolated"]):
    """Calls in a process of their own, started by the first one: a call that kills it costs nothing but itself.

    A call that takes longer than `limit` seconds is killed.
    """

    limit = HANG_S

    def __init__(self):
        self._pool: ProcessPoolExecutor | None = None

    def __call__[**P, T](self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `function`, of a module, returns or raises. BrokenProcessPool: the process died, or was killed."""
        self._pool = self._pool or spawn_pool(1, faulthandler.disable)
        future = self._pool.submit(function, *args, **kwargs)
        if not wait([future], self.limit).done:
            kill(self._pool)
        try:
            return future.result()
        except BrokenProcessPool:
            self.close()
            raise

    def close(self) -> None:
        if self._pool is not None:
            kill(self._pool)
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def __exit__(self, *_: object) -> None:
        self.close()


def _begin(parent: int, begin: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
    faulthandler.enable()  # a stack for every crash
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    die_with(parent, signal.SIGKILL)
    if begin is not None:
        begin(*arguments)
