"""`hvd site probe`: what the job of `hvd site check` runs on each node. It always ends with 0; findings are its output.

Each report is a line of the log, and where the job has a folder that the launcher sees, a file there.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvd import documents
from hvd.errors import UserError, one_line
from hvd.files import write_atomic
from hvd.runtime import processes, records
from hvd.site.findings import Devices, Peer, Report, Sum
from hvd.site.options import PATIENCE_S

MARK = "hvd-site "  # before a report in the log
_NEW = "made"  # a file that says that the folder of runs was not there before
_ROUNDS = 4  # the first one makes the files, the others replace them
_ROUND_S = 10.0
_REASON = re.compile(r"(?:^[\w.]*(?:Error|Exception)|\b[A-Z]+(?:_[A-Z]+)+|\bUNAVAILABLE|\bINTERNAL): .+")


@dataclasses.dataclass(frozen=True)
class _Word:
    """A file by which processes talk. `round`: -1 = the last one."""

    round: int
    time: float


class Probe:
    """One process of the job."""

    def __init__(self, folder: Path, patience: float):
        group = processes.group()
        index, count = (group.index, group.count) if group else (0, 1)
        self._patience, self._folder = patience, folder
        host = os.environ.get("HVD_NODE") or socket.gethostname()  # a pod's own name is no node's
        self._report = Report(index, count, host, -1, 0.0, folder=str(folder.parent.absolute()), user=os.getuid())

    def run(self) -> None:
        """All of it, a report after each part. Nothing of it stays on the storage, however it ends."""
        from hvd.train import run_dir

        try:
            self._tell(version=run_dir.running(), **self._storage(), **_nvidia())
            if self._report.count > 1 and not self._report.storage_error:
                self._tell(**self._meet())
            seconds = max(self._patience, PATIENCE_S)  # jax has to be imported, too
            self._tell(devices=_jax(Devices, "alone", seconds))
            if self._report.count > 1:
                self._tell(sum=_jax(Sum, "sum", seconds))
            self._tell(done=True)
        finally:
            self._clear()

    def _tell(self, **what: Any) -> None:
        number = self._report.number + 1
        self._report = dataclasses.replace(self._report, number=number, time=time.time(), **what)
        text = json.dumps(dataclasses.asdict(self._report))
        print(f"{MARK}{text}", flush=True)
        if job := records.folder():
            with contextlib.suppress(OSError):
                write_atomic(job / f"site-{self._report.process}.json", text)

    # ------------------------------------------------------------------------------------------------------ by files

    def _storage(self) -> dict[str, Any]:
        """Is the folder of runs writable, and how much is free there?"""
        try:
            new = not self._folder.parent.exists()
            self._folder.mkdir(parents=True, exist_ok=True)
            if new:
                (self._folder / _NEW).touch()
            self._write("hello", _Word(0, time.time()))
            return {"free": shutil.disk_usage(self._folder).free}
        except OSError as error:
            return {"storage_error": one_line(f"{error.filename or self._folder}: {error.strerror or error}", 300)}

    def _meet(self) -> dict[str, Any]:
        """How fast files that one process renames are seen by another, and how their clocks differ."""
        others = [number for number in range(self._report.count) if number != self._report.process]
        late = [n for n in others if self._read("hello", n, self._patience, lambda word: True) is None]
        if late:
            return {"peers_error": f"{self._report.host} does not see the files of process {late[0]}"}
        if self._report.process:
            return self._answer()
        peers: dict[str, Peer] = {}
        for round_ in range(_ROUNDS):
            began = time.time()
            self._write("call", _Word(round_, began))
            for number in others:
                word = self._read("answer", number, _ROUND_S, lambda word, now=round_: word.round == now)
                trip = time.time() - began
                if word is None:
                    return {"peers_error": f"a renamed file was not seen within {_ROUND_S:g} s by process {number}"}
                if round_:
                    before = peers.get(str(number))
                    seen = max(trip / 2, before.seen_s if before else 0.0)
                    peers[str(number)] = Peer(seen, word.time - (began + trip / 2))
        self._write("call", _Word(-1, time.time()))
        return {"peers": peers}

    def _answer(self) -> dict[str, Any]:
        last = -2
        while last != -1:
            word = self._read("call", 0, self._patience, lambda word, last=last: word.round != last)
            if word is None:
                break
            last = word.round
            self._write("answer", _Word(last, time.time()))
        return {}

    def _write(self, name: str, word: _Word) -> None:
        path = self._folder / f"{name}-{self._report.process}.json"
        write_atomic(path, json.dumps(dataclasses.asdict(word)))

    def _read(self, name: str, process: int, seconds: float, fits: Callable[[_Word], bool]) -> _Word | None:
        """The other process's file once it fits; None after so long."""
        path, end = self._folder / f"{name}-{process}.json", time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError, UserError):
                word = documents.read(path, _Word)
                if fits(word):
                    return word
            time.sleep(0.002)
        return None

    def _clear(self) -> None:
        """Our own files; the folder goes with the last process that leaves it."""
        with contextlib.suppress(OSError):
            for path in self._folder.glob(f"*-{self._report.process}.json*"):
                path.unlink(missing_ok=True)
            left = list(self._folder.iterdir())
            if {path.name for path in left} <= {_NEW}:
                for path in left:
                    path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    self._folder.rmdir()
                if left:
                    self._folder.parent.rmdir()


def reports(text: str) -> list[Report]:
    """Those of a log, oldest first."""
    found = []
    for line in text.splitlines():
        _, mark, document = line.partition(MARK)
        if mark and document.startswith("{"):
            with contextlib.suppress(UserError):  # a line that is half written
                found.append(documents.decode(document, Report, "a report"))
    return found


def _nvidia() -> dict[str, Any]:
    """GPUs that the job sees, and their driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = asked.stdout.split()
    return {"gpus": len(lines), "driver": lines[0] if lines else ""}


def _jax[T: (Devices, Sum)](form: type[T], what: str, seconds: float) -> T:
    """What hvd.site.devices finds; its error where it fails or hangs."""
    command = [sys.executable, "-m", "hvd.site.devices", what, str(int(seconds))]
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # several processes of a node share its GPUs
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=2 * seconds, check=False)
    except subprocess.TimeoutExpired:
        return form(error=f"no answer within {2 * seconds:g} s")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return documents.decode(lines[-1], form, "hvd.site.devices")
    return form(error=why(done.stderr, done.returncode))


def why(stderr: str, code: int) -> str:
    """The last line of a failed process that says what was wrong: an exception, or XLA's status before it aborts."""
    said = [line.strip() for line in stderr.splitlines() if line.strip()]
    told = [found[0] for line in said if (found := _REASON.search(line))]
    return one_line((told or said or [f"exit code {code}"])[-1], 300)
