"""Steps of the tiny experiment in processes of their own, to be killed.

`Children` forks them from a server that has imported everything, so that a restart costs no import: dozens are killed.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import jax

from tests import compilation
from tests.train import factory

PRELOAD = ["tests.train.factory", "hvd.cli", "hvd.method.value", "hvd.method.policy", "tensorboardX"]


def _run(step: str, settings: factory.Settings, environment: dict[str, str], log: str) -> None:
    os.environ |= environment
    jax.config.update("jax_disable_most_optimizations", os.environ.get(compilation.QUICK) == "1")  # on in the server
    compilation.every_process_writes()
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        cfg = factory.experiment(Path(settings.folder), **settings.changes)
        code = factory.run_step(step, cfg, settings)
        sys.stdout.flush()
    sys.exit(code)


class Child:
    """One running step; `log` is what it prints."""

    def __init__(self, process: BaseProcess, log: Path):
        self.process, self.log = process, log

    def wait_until(self, condition: Callable[[], bool], timeout: float = 900.0) -> bool:
        """True when the condition came true, False when the process ended before."""
        end = time.monotonic() + timeout
        while not condition():
            if not self.process.is_alive():
                return False
            if time.monotonic() > end:
                raise TimeoutError(self.text())
            time.sleep(0.003)
        return True

    def send(self, number: signal.Signals) -> None:
        if self.process.is_alive() and self.process.pid:
            os.kill(self.process.pid, number)

    def end(self, timeout: float = 900.0) -> int:
        """The exit code; minus the signal's number when a signal killed it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(self.text())
        return self.process.exitcode

    def text(self) -> str:
        return self.log.read_text()


class Children:
    """Starts steps; `environment` is added to what the server was started with."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._count = 0

    def start(self, step: str, settings: factory.Settings, environment: dict[str, str] | None = None) -> Child:
        self._count += 1
        log = self._folder / f"{self._count:03d}-{step}.log"
        log.touch()
        process = self._context.Process(target=_run, args=(step, settings, environment or {}, str(log)))
        process.start()
        return Child(process, log)
