"""Being asked to stop: SIGTERM, SIGUSR1 and SIGUSR2 set a flag, and all processes of a run act on it at the same step.

A signal may reach one process only, while a save needs all of them. Each process's flag goes into the step as one tiny
sharded input and its maximum comes out with the metrics, so that everybody reads "stop" at the same step without an
extra message (hvd.train.mesh.Devices.flag). Outside the step loop, Devices.poll has a computation of its own.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator

from hvd.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

_received: list[str] = []  # signals belong to the process, so this does too


def _on_signal(number: int, frame: object) -> None:
    _received.append(signal.Signals(number).name)


@contextlib.contextmanager
def catch() -> Iterator[None]:
    """While this is open the signals only set the flag. May be nested; outside the main thread it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outermost = signal.getsignal(signal.SIGTERM) is not _on_signal
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: a handler that was not installed from Python and cannot be put back from here
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if outermost:
            _received.clear()


def requested() -> str | None:
    """Name of the first signal that this process got, or None."""
    return _received[0] if _received else None


def raise_stopped(where: str) -> None:
    """End the step: the CLI prints the line and exits with 143."""
    raise Stopped(f"by {requested() or 'a signal to another process'} {where}")
