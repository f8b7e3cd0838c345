"""The log of a Slurm job, shown or followed until the job has ended for good.

Without a Slurm on this machine it goes on by what the job leaves in its folder.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hvd.clusters.base import Asking, JobState
from hvd.errors import EXIT_COMPLETE, Stopped, UserError

EXIT_INTERRUPTED = 130

_BLOCK = 1 << 16
_READ_EVERY_S = 0.5
_ASK_EVERY_S = 5.0
_SETTLE_S = 1.0  # what a node wrote last is on the other side of a network file system


def complain(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def show(look: Callable[[], JobState], job: str, path: Path, lines: int) -> int:
    """Print the last lines of the job's log (0: all)."""
    if not path.is_file():
        state = Asking(look)()
        about = f": it is {state.describe()}" if state else ""
        hint = "; -f waits for it" if state is None or not state.ended else ""
        raise UserError(f"job {job} has no log ({path}){about}{hint}")
    Tail(path, lines).copy()
    return EXIT_COMPLETE


def follow(look: Callable[[], JobState], job: str, path: Path, lines: int) -> int:
    """The last lines, and what is added until the job has ended."""
    try:
        return _follow(Asking(look), job, Tail(path, lines), path)
    except Stopped:
        raise
    except KeyboardInterrupt:  # the way to leave it
        complain(f"no longer following job {job}; it goes on")
        return EXIT_INTERRUPTED


def _follow(ask: Asking[JobState], job: str, tail: "Tail", path: Path) -> int:
    missing_said, ask_at = False, 0.0
    while True:
        tail.copy()
        if time.monotonic() >= ask_at:
            state = ask()
            if state is not None and state.ended:
                time.sleep(_SETTLE_S)
                tail.copy()
                break
            if not tail.found and not missing_said:
                about = f" is {state.describe()}" if state else ""
                complain(f"job {job}{about}; its log {path} is not there yet")
                missing_said = True
            ask_at = time.monotonic() + _ASK_EVERY_S
        time.sleep(_READ_EVERY_S)
    if not tail.found:
        raise UserError(f"job {job} has no log ({path}): it is {state.describe()}")
    complain(f"job {job}: {state.describe()}")
    return EXIT_COMPLETE


class Tail:
    """A file that grows, from its last `lines` lines on (0: from its beginning), copied to stdout as it is.

    It is opened anew each time: only so does a network file system show what another machine wrote, and a log that a
    restart of the job has cut or replaced is begun again.
    """

    def __init__(self, path: Path, lines: int):
        self.found = False
        self._path, self._lines = path, lines
        self._file, self._at = 0, 0

    def copy(self) -> None:
        """Print what is new; nothing where there is no file (yet, or again)."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self._path} cannot be read ({error.strerror})") from None
        with file:
            about = os.fstat(file.fileno())
            if not self.found:
                self._at = start_of_last(file, self._lines)
            elif about.st_ino != self._file or about.st_size < self._at:
                self._at = 0
            self.found, self._file = True, about.st_ino
            file.seek(self._at)
            sys.stdout.flush()
            while block := file.read(_BLOCK):
                sys.stdout.buffer.write(block)
                self._at += len(block)
            sys.stdout.buffer.flush()


def start_of_last(file, lines: int) -> int:
    """Where in the binary file its last `lines` lines begin; 0 lines means all of it.

    Each state of a progress bar counts as a line: a run of a day leaves thousands of them without a newline.
    """
    at = file.seek(0, os.SEEK_END)
    if lines == 0 or at == 0:
        return 0
    file.seek(at - 1)
    left = lines if file.read(1) not in (b"\n", b"\r") else lines + 1  # its end begins no line
    while at > 0:
        begin = max(0, at - _BLOCK)
        file.seek(begin)
        block = file.read(at - begin)
        place = len(block)
        while (place := max(block.rfind(end, 0, place) for end in (b"\n", b"\r"))) >= 0:
            left -= 1
            if left == 0:
                return begin + place + 1
        at = begin
    return 0
