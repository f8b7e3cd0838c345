"""Named processes that another process can find and end, and what /proc says about them."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.folders import ROOT

# The command is PID 1 of namespaces of its own; it is killed with `unshare`, and everything in them with it.
NAMESPACES = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "--")


class Daemons:
    """`pids` is all there is to know: any process can go on from it."""

    def __init__(self, pids: Mapping[str, tuple[int, int]]):
        # name -> pid and start time: a pid alone may be another process's by now
        self.pids = {name: (pid, started) for name, (pid, started) in pids.items()}
        self._children: dict[str, subprocess.Popen] = {}  # those that this process has started, and has to wait for

    def start(self, name: str, command: list[str], log: Path, env: dict[str, str], stdin: int = subprocess.DEVNULL):
        """In a session of its own: a Ctrl-C in the terminal is not for it. Its output goes to `log`."""
        with open(log, "a") as out:
            child = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=stdin, stdout=out, stderr=out, start_new_session=True
            )
        self._children[name] = child
        self.pids[name] = (child.pid, _started(child.pid))

    def alive(self, name: str) -> bool:
        pid, started = self.pids.get(name, (0, 0))
        return bool(pid) and _started(pid) == started

    def kill(self, name: str) -> None:
        """SIGKILL for its process group, or for the first process of its PID namespace; returns when all are gone."""
        if self.alive(name):
            wait_until(lambda: self._ended(name), 20, f"the end of {name}")
        child = self._children.pop(name, None)
        if child:
            child.wait(timeout=20)
            if child.stdin:
                child.stdin.close()
        self.pids.pop(name, None)

    def _ended(self, name: str) -> bool:
        """Kill it once more: its PID 1 may not have been there yet, or may have just gone."""
        init = self._init(name)
        # A PID namespace ends with its PID 1, and `unshare`, its parent, only when everything in it is gone.
        with contextlib.suppress(ProcessLookupError):
            os.kill(init, signal.SIGKILL) if init else os.killpg(self.pids[name][0], signal.SIGKILL)
        return not self.alive(name)

    def inside(self, name: str) -> list[tuple[int, str]]:
        """(pid on this machine, command line) of everything in the daemon's PID namespace; zombies are left out."""
        init = self._init(name)
        if not init:
            return []
        space = _pid_namespace(init)
        found = [(pid, command_line(pid)) for pid in all_pids() if _pid_namespace(pid) == space]
        return [(pid, command) for pid, command in found if command]

    def _init(self, name: str) -> int:
        """PID 1, as seen from here, of a daemon that was started with NAMESPACES; 0 where there is none."""
        pid = self.pids.get(name, (0, 0))[0]
        mine = _pid_namespace(os.getpid())
        children = [child for child in all_pids() if (stat := _stat(child)) and int(stat[1]) == pid] if pid else []
        return next((child for child in children if _pid_namespace(child) not in (mine, "")), 0)


def wait_until(ready: Callable[[], bool], timeout: float, what: str) -> None:
    end = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(0.03)


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def command_line(pid: int) -> str:
    """'' for a process that is gone, a zombie or the kernel's."""
    return read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()


def read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""  # the process is gone


def _pid_namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on: the command before it may hold spaces. [] for no such process."""
    return read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _started(pid: int) -> int:
    """When the process began; 0 for one that is gone or a zombie."""
    stat = _stat(pid)
    return int(stat[19]) if stat and stat[0] not in "ZX" else 0
