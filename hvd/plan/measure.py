"""Measurements of the planner: made by a process of its own (hvd.plan.compile) and kept on disk, so that asking again
costs nothing. Imports no jax.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from hvd import overrides
from hvd.errors import EXIT_USER, Failed, UserError
from hvd.fields import Mark, marks, to_plain
from hvd.files import write_atomic
from hvd.plan.request import Measurement, Request

COMMAND = (sys.executable, "-m", "hvd.plan.compile")
SECONDS = 1800.0  # for one compilation; real sizes take one or two minutes on a quiet core
_TELL_EVERY = 15.0
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "jax-cuda12-plugin", "jax-cuda13-plugin")
_SOURCES = ("models", "train", "method", "plan/compile.py", "plan/buffers.py", "plan/devices.py")

type Say = Callable[[str], None]


class Measurer:
    """Asks for measurements; remembers them in `folder`.

    Args:
        folder: default `cache_folder()`; None keeps nothing.
        seconds: after which a compilation is given up.
        say: gets lines of progress.
    """

    def __init__(self, folder: Path | None, seconds: float = SECONDS, say: Say = lambda line: None):
        self.folder, self.seconds, self.say = folder, seconds, say

    def __call__(self, request: Request) -> Measurement:
        """The measurement of a request.

        Raises:
            UserError: the compiling process found a mistake of the user.
            Failed: it could not compile, or took longer than `seconds`.
        """
        names = [f"{identity(request)}.json", f"{identity(request)}.arguments.json"]
        for name in names:
            kept = self._read(name)
            if kept and (kept.compiled or not request.needs_compiler(kept.least)):
                return kept
        found = Measurement.from_json(self._run(request))
        self._write(names[0] if found.compiled else names[1], found)
        return found

    def _run(self, request: Request) -> str:
        process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        told: list[str] = []
        reader = threading.Thread(target=self._listen, args=(process.stderr, told), daemon=True)
        reader.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once; why is told on stderr
                process.stdin.write(json.dumps(dataclasses.asdict(request)))
                process.stdin.close()
            self._wait(process, request.stage)
            answer = process.stdout.read()
        finally:
            process.kill()
            process.wait()
            reader.join(timeout=5)
            process.stdout.close()
            process.stderr.close()
        if process.returncode == EXIT_USER:
            raise UserError(told[-1].removeprefix("error: ") if told else "the step cannot be built")
        if process.returncode:
            raise Failed(f"the {request.stage} step could not be compiled: {told[-1] if told else 'no reason given'}")
        return answer.splitlines()[-1]

    def _wait(self, process: subprocess.Popen, stage: str) -> None:
        began = time.monotonic()
        while True:
            try:
                process.wait(timeout=_TELL_EVERY)
                return
            except subprocess.TimeoutExpired:
                passed = time.monotonic() - began
            if passed > self.seconds:
                raise Failed(
                    f"compiling the {stage} step took longer than {self.seconds:.0f} s; give hvd plan more (--timeout)"
                )
            self.say(f"  {passed:.0f} s")

    def _listen(self, stream: Iterable[str], told: list[str]) -> None:
        for line in stream:
            line = line.rstrip()
            if line and not (line[0] in "WIE" and line[1:5].isdigit()):  # XLA's own log
                told.append(line)
                if line.startswith("lowered"):
                    self.say(f"  {line}")

    def _read(self, name: str) -> Measurement | None:
        if self.folder is None:
            return None
        try:
            return Measurement.from_json((self.folder / name).read_text(errors="replace"))
        except (OSError, UserError):
            return None

    def _write(self, name: str, found: Measurement) -> None:
        if self.folder is None:
            return
        try:
            write_atomic(self.folder / name, json.dumps(dataclasses.asdict(found)))
        except OSError as error:  # it is measured again the next time
            self.say(f"the plan is not kept: {error}")


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/hvd/plans, or ~/.cache/hvd/plans."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home) / "hvd" / "plans"


def has_cuda_compiler() -> bool:
    """Is XLA's GPU compiler installed (jax's CUDA plugin)? It needs no GPU."""
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13))


def identity(request: Request) -> str:
    """Of all that a measurement depends on: config, devices, code, versions of the compiler, its flags."""
    config = overrides.experiment(request.argv)
    content = {
        "config": to_plain(config, lambda field, value: Mark.NO_MEMORY not in marks(field)),
        "request": {
            k: v
            for k, v in dataclasses.asdict(request).items()
            if k not in ("argv", "limit", "enough", "arguments_only")
        },
        "code": _code_digest(),
        "versions": [_version(name) for name in _PACKAGES],
        "flags": os.environ.get("XLA_FLAGS", ""),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _code_digest() -> str:
    root = Path(__file__).parents[1]
    files = [
        path for name in _SOURCES for path in ((root / name).rglob("*.py") if (root / name).is_dir() else [root / name])
    ]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
