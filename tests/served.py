"""A tiny trained policy with cameras, and `hvd serve` in a process of its own: for the tests and the benchmark."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

from hvd.configs import Experiment, NormConfig
from tests.data.factory import CAMERAS, make_dataset
from tests.train import factory

STATE = 21


def experiment(folder: Path, **model: Any) -> Experiment:
    """Imitation of one dataset with two cameras, delta actions; three training steps."""
    data = make_config(folder)
    return factory.experiment(
        folder,
        model=factory.model(cameras=CAMERAS, siglip_variant="tiny", image_size=28, **model),
        norm=NormConfig(std_floor=0.01, delta_actions=True),
        policy={"weighting": "none", "suboptimal_share": 0.0, "num_train_steps": 3, "batch_size": 4},
        optimal_data=data,
        suboptimal_data=dataclasses.replace(data, repo_id="", root=""),
    )


def make_config(folder: Path):
    from hvd.configs import DataConfig, KeyMap
    from tests.data.factory import KEYS

    keys = KeyMap(images={camera: KEYS[camera] for camera in CAMERAS})
    return DataConfig(repo_id="drawers", root=str(folder / "drawers"), keys=keys)


def train(folder: Path, **model: Any) -> Experiment:
    """The experiment below `folder`, its policy trained."""
    from hvd.data import normalize
    from hvd.method import policy

    make_dataset(folder / "drawers", lengths=(12, 9, 10), kind="image", state_dim=STATE)
    cfg = experiment(folder, **model)
    normalize.main(cfg)
    policy.main(cfg)
    return cfg


def observation(rng: np.random.Generator, size: tuple[int, int] = (32, 48)) -> dict[str, Any]:
    """What a client sends, openpi's keys."""
    return {
        "state": rng.normal(size=STATE).astype(np.float32),
        "images": {camera: rng.integers(0, 256, (*size, 3), np.uint8) for camera in CAMERAS},
        "prompt": "open the drawer",
    }


class Served:
    """`hvd serve` as a subprocess; a context manager that leaves no process behind."""

    def __init__(self, *args: str, env: dict[str, str] | None = None, wait: bool = True):
        command = [sys.executable, "-m", "hvd.cli", "serve", *args]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(env or {})}
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = 0
        if wait:
            try:
                self.wait_ready()
            except BaseException:
                self.__exit__()
                raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_ready(self, timeout: float = 240.0) -> None:
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            for line in self.lines:
                if found := re.search(r"^serving .* on wss?://\S+:(\d+)$", line):
                    self.port = int(found.group(1))
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise RuntimeError(f"the server did not come up:\n{self.text()}")

    def text(self) -> str:
        return "\n".join(self.lines)

    def client(self, **options: Any):
        from openpi_client.websocket_client_policy import WebsocketClientPolicy

        return WebsocketClientPolicy("127.0.0.1", self.port, **options)

    def get(self, path: str) -> tuple[int, str]:
        return get(self.port, path)

    def end(self, number: signal.Signals = signal.SIGTERM, timeout: float = 120.0) -> int:
        """The exit code after a signal."""
        self.process.send_signal(number)
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended {timeout:.0f} s after {number.name}:\n{self.text()}") from None
        self._reader.join(5)
        return code

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()


def get(port: int, path: str) -> tuple[int, str]:
    """Status and body of a plain HTTP request."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def counts(metrics: str) -> dict[str, float]:
    """The samples of Prometheus text: name with labels -> value."""
    rows = [row.rsplit(" ", 1) for row in metrics.splitlines() if not row.startswith("#")]
    return {name: float(value) for name, value in rows}
