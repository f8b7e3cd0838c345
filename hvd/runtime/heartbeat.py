"""A sign of life on the run's storage, for owners whom no scheduler knows, or none that can be asked from a node.

A trainer's pod has no right to ask the cluster's API; a container sees no processes outside of it. So the owner counts
up in a small file, and a process that finds another owner watches whether the number moves: no clocks are compared, no
file times are read.
"""

import contextlib
import itertools
import os
import threading
import time

from etils import epath

from hvd.files import write_atomic
from hvd.runtime import preemption

OWNER = "owner.json"  # which job works on the run (hvd.runtime.owner)
FILE = f"{OWNER}.alive"
BEAT_SECONDS = 5.0
LOOK_SECONDS = 0.5
SILENT_SECONDS = 60.0  # twelve missed beats; a network file system may show a file half a minute late


class Heartbeat:
    """Shows that the owner `who` of the run lives, until `stop`."""

    def __init__(self, run_dir: os.PathLike | str, who: str):
        self._path, self._who, self._done = epath.Path(run_dir) / FILE, who, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
        with contextlib.suppress(Exception):
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        for number in itertools.count(1):
            with contextlib.suppress(Exception):  # a full disk is the training's to report
                write_atomic(self._path, f"{self._who} {number}\n".encode())
            if self._done.wait(BEAT_SECONDS):
                return


def lives(run_dir: os.PathLike | str, who: str) -> bool:
    """Does the owner `who` still show itself? Watches until it does, or has been silent for SILENT_SECONDS.

    Raises:
        Stopped: a signal came meanwhile.
    """
    path = epath.Path(run_dir) / FILE
    first, began = _read(path), time.monotonic()
    while time.monotonic() - began < SILENT_SECONDS:
        now = _read(path)
        if now != first:
            return now.startswith(f"{who} ")
        preemption.check("before the first step")
        time.sleep(LOOK_SECONDS)
    return False


def _read(path: epath.Path) -> str:
    with contextlib.suppress(OSError, ValueError):  # the latter: no text, which is no sign either
        return path.read_text()
    return ""
