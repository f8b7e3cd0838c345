"""Being asked to stop: by SIGTERM, SIGUSR1 or SIGUSR2.

While a run warms up there is nothing to save: a signal ends it at once. While it steps the signal sets a flag, and all
processes of the run act on it at the same step: a signal may reach one process only, while a save needs all of them.
Each process's flag goes into the step as one tiny sharded input and its maximum comes out with the metrics, so that
everybody reads "stop" at the same step without an extra message (hvd.train.mesh.Devices.flag). A group of processes
does not end at once in the warm-up either, since the others would wait for it; Devices.poll lets them agree there.
"""

import _thread
import contextlib
import gc
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from hvd.errors import Stopped
from hvd.runtime import processes

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

# signals belong to the process, so these do too
_received: list[str] = []
_deferring: list[None] = []
_ever: list[str] = []  # of this step, also after `forget`


def _on_signal(number: int, frame: FrameType | None) -> None:
    if later(number, frame):
        return
    received(number)
    if not _deferring and not processes.several():
        raise_stopped("before the first step")


@contextlib.contextmanager
def catch() -> Iterator[None]:
    """While this is open a signal raises `Stopped`, or sets the flag. Outside the main thread it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outermost = signal.getsignal(signal.SIGTERM) is not _on_signal
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield
    except Exception:
        outermost = False  # a library may make it of a signal: the CLI asks whether there was one
        raise
    finally:
        for number, handler in before.items():
            # None: a handler that was not installed from Python and cannot be put back from here
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if outermost:
            forget()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While this is open a signal only sets the flag, and whoever opened it looks at it and saves."""
    _deferring.append(None)
    try:
        yield
    finally:
        _deferring.pop()


@contextlib.contextmanager
def quiet_once_stopped() -> Iterator[None]:
    """What a signal has interrupted is taken apart half made, asyncio's loops for example. Python would print that, and
    the line that says how the step ended would be lost in it."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda told: None if _ever else before(told)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        try:
            yield
        finally:
            sys.unraisablehook = before
            _ever.clear()


def requested() -> str | None:
    """Name of the first signal that this process got, or None."""
    return _received[0] if _received else None


def later(number: int, frame: FrameType | None) -> bool:
    """True where a handler must not raise: Python prints and drops an error in what a library (JAX is one) has it call
    in a garbage collection. The signal comes again a moment later."""
    callbacks = [getattr(each, "__code__", None) for each in gc.callbacks]
    if not any(each.f_code in callbacks for each, _ in traceback.walk_stack(frame)):
        return False
    _thread.start_new_thread(_again, (number,))  # what this thread sent itself would come before it leaves here
    return True


def _again(number: int) -> None:
    time.sleep(0.01)
    signal.pthread_kill(threading.main_thread().ident or 0, number)  # it may be waiting in a call of the system


def received(number: int) -> None:
    """A handler that is not of this module got this signal."""
    _received.append(signal.Signals(number).name)
    _ever.append(_received[-1])


def forget() -> None:
    """The step that was asked to stop has ended."""
    _received.clear()


def check(where: str) -> None:
    """Raise Stopped if a signal came: what its handler raised may have met an `except Exception` of a library."""
    if requested():
        raise_stopped(where)


def raise_stopped(where: str) -> NoReturn:
    """End the step: the CLI prints the line and exits with 143, or with 130 after SIGINT."""
    if requested() == "SIGINT":
        raise KeyboardInterrupt
    raise Stopped(f"by {requested() or 'a signal to another process'} {where}")
