"""Processes that end with the process which started them."""

import ctypes
import faulthandler
import multiprocessing.context
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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


def _begin(parent: int, begin: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
    faulthandler.enable()  # a stack for every crash
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    die_with(parent, signal.SIGKILL)
    if begin is not None:
        begin(*arguments)
