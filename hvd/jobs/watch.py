"""`hvd jobs logs` and `hvd jobs wait`: staying with one job until it has ended for good."""

import os
import sys
import time
from pathlib import Path

from hvd.clusters.slurm.queue import NEVER, NoSlurm, Status, Unreachable
from hvd.errors import EXIT_COMPLETE, EXIT_FAILED, UserError
from hvd.jobs import registry
from hvd.jobs.state import describe, exit_code, look

EXIT_TIMEOUT = 124  # as of timeout(1)
EXIT_INTERRUPTED = 130

_BLOCK = 1 << 16
_READ_EVERY_S = 0.5
_ASK_EVERY_S = 5.0
_SETTLE_S = 1.0  # what a node wrote last is on the other side of a network file system
_WAIT_S = (1.0, 5.0)  # first and longest pause between two questions about the same state


class Watch:
    """Asks about one job, again and again; an outage of Slurm's is said once and waited out.

    Args:
        alone: goes on without a Slurm on this machine, by what the job leaves in its folder.
    """

    def __init__(self, jobs: Path, job: str, alone: bool):
        self._jobs, self._job, self._alone = jobs, job, alone
        self._silent = False

    def ask(self) -> Status | None:
        """Its status; None while Slurm does not answer and the job has left no word of its end."""
        job = registry.read(self._jobs, self._job)
        found, error = look([job], tries=1)
        if error is None or job.end is not None:
            self._silent = False
            return found[self._job]
        if isinstance(error, NoSlurm) and not self._alone:
            raise error
        self._complain(error)
        return None

    def _complain(self, error: Unreachable) -> None:
        if not self._silent:
            print(f"{error}; going on until it answers", file=sys.stderr, flush=True)
        self._silent = True


# -------------------------------------------------------------------------------------------------------------- wait


def wait(jobs: Path, job: str, timeout: float | None) -> int:
    """Until the job has ended for good; a line for each change of its state. Returns the exit code of `hvd jobs wait`.

    Args:
        timeout: seconds; None = for ever.
    """
    watch = Watch(jobs, job, alone=False)
    began, pause = time.monotonic(), _WAIT_S[0]
    said, never = None, 0
    while True:
        status = watch.ask()
        if status is not None:
            if (status.state, status.restarts) != said:
                print(f"{time.strftime('%H:%M:%S')} job {job}: {describe(status)}{_why(jobs, status)}", flush=True)
                said, pause = (status.state, status.restarts), _WAIT_S[0]
            if status.ended:
                return exit_code(status)
            # Where the cluster does not cancel such a job it stays for ever. Twice: it may be about to.
            never = never + 1 if status.reason == NEVER else 0
            if never > 1:
                print(f"job {job} will never start{_why(jobs, status)}; `hvd jobs cancel {job}` removes it", flush=True)
                return EXIT_FAILED
        left = None if timeout is None else began + timeout - time.monotonic()
        if left is not None and left <= 0:
            state = "" if said is None else f", which is {said[0]}"
            print(f"job {job}{state}, has not ended within {timeout:g} s; it is left alone", file=sys.stderr)
            return EXIT_TIMEOUT
        time.sleep(pause if left is None else min(pause, left))
        pause = min(pause * 1.5, _WAIT_S[1])


def _why(jobs: Path, status: Status) -> str:
    if status.reason != NEVER:
        return ""
    after = " and ".join(registry.read(jobs, status.id).after)
    return f" (job {after}, which it waits for, did not complete)" if after else ""


# -------------------------------------------------------------------------------------------------------------- logs


def logs(jobs: Path, job: str, lines: int, follow: bool) -> int:
    """Print the last lines of the job's log (0: all), and with `follow` what is added until the job has ended."""
    path = registry.read(jobs, job).log
    if not follow:
        if not path.is_file():
            status = Watch(jobs, job, alone=True).ask()
            state = f": it is {describe(status)}" if status else ""
            hint = "; -f waits for it" if status is None or not status.ended else ""
            raise UserError(f"job {job} has no log ({path}){state}{hint}")
        Tail(path, lines).copy()
        return EXIT_COMPLETE
    try:
        return _follow(jobs, job, path, lines)
    except KeyboardInterrupt:  # the way to leave it
        print(f"no longer following job {job}; it goes on", file=sys.stderr)
        return EXIT_INTERRUPTED


def _follow(jobs: Path, job: str, path: Path, lines: int) -> int:
    watch, tail = Watch(jobs, job, alone=True), Tail(path, lines)
    missing_said, ask_at = False, 0.0
    while True:
        tail.copy()
        if time.monotonic() >= ask_at:
            status = watch.ask()
            if status is not None and status.ended:
                time.sleep(_SETTLE_S)
                tail.copy()
                break
            if not tail.found and not missing_said:
                state = f" is {describe(status)}" if status else ""
                print(f"job {job}{state}; its log {path} is not there yet", file=sys.stderr, flush=True)
                missing_said = True
            ask_at = time.monotonic() + _ASK_EVERY_S
        time.sleep(_READ_EVERY_S)
    if not tail.found:
        raise UserError(f"job {job} has no log ({path}): it is {describe(status)}")
    print(f"job {job}: {describe(status)}", file=sys.stderr, flush=True)
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
    left = lines if file.read(1) not in (b"\n", b"\r") else lines + 1  # the end of the last line is no beginning of one
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
