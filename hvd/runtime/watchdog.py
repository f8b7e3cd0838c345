"""Nothing hangs silently: a run that makes no progress for a while prints every thread's stack and ends.

A process that waits for a lost or stopped companion would wait for ever. Each process watches itself; since a run's
processes go in step, all that still live print their stacks within moments of each other, and the scheduler starts the
job again (exit code 76).
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

from hvd.errors import EXIT_HUNG
from hvd.runtime import processes, records

_PRINTING_SECONDS = 5.0  # the first process that ends takes the others with it: they print before that
_WITHOUT_PYTHON_SECONDS = 60.0

_WARM_UP = 10  # times longer: reading weights and compiling are no steps

_last = time.monotonic()
_stepping = False


def progress() -> None:
    """Tell that something was done: a step, a batch of an evaluation."""
    global _last, _stepping
    _last, _stepping = time.monotonic(), True


@contextlib.contextmanager
def watch(seconds: float) -> Iterator[None]:
    """While this is open, `seconds` without `progress` end the process with EXIT_HUNG. 0 = no watch.

    Until the first `progress` it waits ten times as long.
    """
    global _last, _stepping
    if seconds <= 0:
        yield
        return
    done = threading.Event()
    _last, _stepping = time.monotonic(), False
    thread = threading.Thread(target=_watch, args=(seconds, done), name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()


def _watch(seconds: float, done: threading.Event) -> None:
    while not done.wait(min(5.0, seconds / 8)):
        # For the case that a call into C keeps Python's lock for good: this one needs no Python to fire
        limit = seconds if _stepping else _WARM_UP * seconds
        faulthandler.dump_traceback_later(limit + _WITHOUT_PYTHON_SECONDS, exit=True, file=2)
        idle = time.monotonic() - _last
        if idle > limit and not done.is_set():
            _end(idle)


def _end(idle: float) -> None:
    rank, host = processes.rank(), socket.gethostname()
    print(
        f"hang: no progress for {idle:.0f} s in process {rank} on {host}; stacks of all its threads:",
        file=sys.__stderr__,
        flush=True,
    )
    faulthandler.dump_traceback(file=2, all_threads=True)
    print(f"hang: process {rank} on {host} ends; the last checkpoint is whole", file=sys.__stderr__, flush=True)
    records.tell_exit(EXIT_HUNG)
    time.sleep(_PRINTING_SECONDS)
    os._exit(EXIT_HUNG)
