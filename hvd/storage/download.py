"""Objects of a store into a local folder: many ranges at once, checked, and taken up again where a download stopped.

A file has its full length from the start and is filled range by range. Each finished range is one line of a journal:
file, first byte, end, crc32c. Whoever takes up the folder trusts no line: it reads the range back and compares. Several
processes may fill one folder at the same time (two nodes on a network disk without locks): they write the same bytes
to the same places, and each has a journal of its own.
"""

import contextlib
import errno
import json
import os
import queue
import random
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hvd.errors import Failed, UserError
from hvd.storage import checksums
from hvd.storage.progress import Progress
from hvd.storage.remote import Busy, Object, Refused, Replaced, Store

THREADS = 16
PART = 16 << 20  # bytes of a range: what a kill can cost each thread
TRIES = 7  # in a row without a single byte
BACKOFF_S, LONGEST_S = 0.5, 20.0
BAD_SUMS = 3  # an object that has the wrong checksum so often is given up
JOURNAL = ".journal"


@dataclass(frozen=True)
class _Range:
    name: str
    start: int
    stop: int


@dataclass
class _File:
    item: Object
    missing: int  # ranges
    done: dict[int, tuple[int, int]] = field(default_factory=dict)  # start -> (crc32c, bytes)
    bad: int = 0


def retried[T](what: str, ask: Callable[[], T], tries: int = TRIES, wait: Callable[[float], object] = time.sleep) -> T:
    """`ask()`, again after a growing pause while the store is busy.

    Raises:
        Failed: still busy after so many tries.
    """
    for attempt in range(1, tries + 1):
        try:
            return ask()
        except Busy as error:
            if attempt == tries:
                raise _given_up(what, error) from error
            wait(_pause(attempt, error))
    raise AssertionError("unreachable")


def _given_up(what: str, error: Busy) -> Failed:
    return Failed(f"{what}: the store does not answer ({error}); the same command goes on where it stopped")


def _pause(attempt: int, error: Busy) -> float:
    grown = BACKOFF_S * 2 ** (attempt - 1) * random.uniform(0.7, 1.3)
    return min(max(grown, error.after_s), LONGEST_S)


def received(folder: Path) -> int:
    """Bytes that the journals of a folder speak of; for whoever waits for another process's download."""
    return sum({(r.name, r.start): r.stop - r.start for r, _ in _journalled(folder)}.values())


def download(
    store: Store, objects: Mapping[str, Object], folder: Path, what: str, poll: Callable[[], None] = lambda: None
) -> None:
    """All objects as files below `folder` (relative names, already known to be harmless), complete and synced.

    Args:
        what: the URL, as messages and the progress line name it.
        poll: called several times a second; what it raises ends the download, and the folder can be taken up later.

    Raises:
        UserError: no access, no room on the disk.
        Failed: the store does not answer, or keeps giving wrong bytes.
    """
    _Download(store, objects, folder, what, poll).run()


class _Download:
    """One run over a folder. Threads fetch and check ranges; everything else is done by the calling thread."""

    def __init__(self, store: Store, objects: Mapping[str, Object], folder: Path, what: str, poll: Callable[[], None]):
        self._store, self._folder, self._what, self._poll = store, folder, what, poll
        self._files = {name: _File(item, 0) for name, item in objects.items()}
        self._total = sum(item.size for item in objects.values())
        self._jobs: queue.SimpleQueue[Callable[[], Callable[[], None]] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Callable[[], None] | BaseException] = queue.SimpleQueue()
        self._open = 0
        self._stop = threading.Event()
        self._progress = Progress(what, self._total)

    def run(self) -> None:
        self._prepare()
        count = min(THREADS, max(1, self._open))
        threads = [threading.Thread(target=self._work, name="hvd-download", daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            with self._journal_file() as journal, self._progress:
                self._journal = journal
                while self._open:
                    self._poll()
                    try:
                        result = self._results.get(timeout=0.2)
                    except queue.Empty:
                        continue
                    if isinstance(result, BaseException):
                        raise result
                    result()
                    self._open -= 1
        finally:
            self._stop.set()
            for _ in threads:
                self._jobs.put(None)
        for thread in threads:  # after an error they end by themselves, at the latest when a silent server is given up
            thread.join()

    # --- the calling thread

    def _prepare(self) -> None:
        known: dict[tuple[str, int, int], int] = {}
        for part, crc in _journalled(self._folder):
            known[part.name, part.start, part.stop] = crc
        needed = self._total
        for name, file in self._files.items():
            path = self._folder / name
            with _disk(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "ab"):
                    os.truncate(path, file.item.size)
            ranges = list(_ranges(name, file.item.size))
            file.missing = len(ranges)
            for part in ranges:
                crc = known.get((name, part.start, part.stop))
                if crc is None:
                    self._give(lambda part=part: self._fetch(part))
                else:
                    needed -= part.stop - part.start
                    self._give(lambda part=part, crc=crc: self._check(part, crc))
            if not ranges:
                self._give(lambda name=name: self._finish(name))
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise UserError(
                f"{self._what}: no space left on the disk of {self._folder}: {needed / 1e9:.3g} GB are still needed, "
                f"{free / 1e9:.3g} GB are free; free some or set HVD_CACHE; the same command then goes on"
            )

    def _give(self, job: Callable[[], Callable[[], None]]) -> None:
        self._open += 1
        self._jobs.put(job)

    def _have(self, part: _Range, crc: int, *, new: bool) -> None:
        file = self._files[part.name]
        if new:
            with _disk(self._folder / JOURNAL):
                self._journal.write(json.dumps([part.name, part.start, part.stop, crc]).encode() + b"\n")
        file.done[part.start] = crc, part.stop - part.start
        file.missing -= 1
        if not file.missing:
            self._give(lambda: self._finish(part.name))

    def _again(self, name: str) -> None:
        """The whole object once more: which of its ranges is wrong is not known."""
        file = self._files[name]
        file.bad += 1
        if file.bad == BAD_SUMS:
            raise Failed(
                f"{self._what}: {name} has a wrong checksum, {BAD_SUMS} times in a row: the object in the store is "
                "damaged, or something on the way changes it"
            )
        self._progress.add(-file.item.size)
        file.done.clear()
        ranges = list(_ranges(name, file.item.size))
        file.missing = len(ranges)
        for part in ranges:
            self._give(lambda part=part: self._fetch(part))

    @contextlib.contextmanager
    def _journal_file(self) -> Iterator:
        path = self._folder / JOURNAL / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        with _disk(path):
            path.parent.mkdir(exist_ok=True)
            with open(path, "ab", buffering=0) as file:
                yield file

    # --- the threads: a job returns what the calling thread has to do with its result

    def _work(self) -> None:
        while not self._stop.is_set() and (job := self._jobs.get()) is not None:
            try:
                self._results.put(job())
            except BaseException as error:
                self._results.put(error)

    def _check(self, part: _Range, crc: int) -> Callable[[], None]:
        if checksums.crc32c_of(self._folder / part.name, part.start, part.stop) != crc:
            return self._fetch(part)
        self._progress.add(part.stop - part.start, fetched=False)
        return lambda: self._have(part, crc, new=False)

    def _fetch(self, part: _Range) -> Callable[[], None]:
        path, item = self._folder / part.name, self._files[part.name].item
        at, crc, failures = part.start, 0, 0
        with _disk(path), open(path, "r+b", buffering=0) as file:
            while at < part.stop and not self._stop.is_set():
                try:
                    with self._store.read(item, at, part.stop) as chunks:
                        for chunk in chunks:
                            chunk = chunk[: part.stop - at]
                            _write(file.fileno(), chunk, at, path)
                            at, crc, failures = at + len(chunk), checksums.crc32c(chunk, crc), 0
                            self._progress.add(len(chunk))
                            if at == part.stop or self._stop.is_set():
                                break
                        else:
                            raise Busy("the connection was cut")
                except Busy as error:
                    failures += 1
                    if failures == TRIES:
                        raise _given_up(f"{self._what}: {part.name}", error) from error
                    self._stop.wait(_pause(failures, error))
                except Refused as error:
                    raise UserError(f"{self._what}: {part.name}: {error}") from error
                except Replaced as error:
                    raise self._replaced(part.name, error) from error
        return lambda: self._have(part, crc, new=True)

    def _finish(self, name: str) -> Callable[[], None]:
        """All ranges are there: the sum of the whole, and onto the disk."""
        file, path = self._files[name], self._folder / name
        whole = checksums.joined([file.done[start] for start in sorted(file.done)])
        try:
            sums = retried(f"{self._what}: {name}", lambda: self._store.sums(file.item), wait=self._stop.wait)
        except Refused as error:
            raise UserError(f"{self._what}: {name}: {error}") from error
        except Replaced as error:
            raise self._replaced(name, error) from error
        if not checksums.matches(path, sums, whole):
            return lambda: self._again(name)
        with _disk(path), open(path, "r+b") as written:
            os.fsync(written.fileno())
        return lambda: None

    def _replaced(self, name: str, error: Replaced) -> Failed:
        return Failed(
            f"{self._what}: {name} was replaced in the store while it was fetched ({error}); the same command fetches "
            "the new one"
        )


def _ranges(name: str, size: int) -> Iterator[_Range]:
    for start in range(0, size, PART):
        yield _Range(name, start, min(size, start + PART))


def _journalled(folder: Path) -> Iterator[tuple[_Range, int]]:
    """What the journals say; a line that was being written when its process died is left out."""
    for path in sorted((folder / JOURNAL).glob("*")):
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError):
                name, start, stop, crc = json.loads(line)
                yield _Range(str(name), int(start), int(stop)), int(crc)


def _write(descriptor: int, data: bytes, at: int, path: Path) -> None:
    view = memoryview(data)
    while view:
        try:
            written = os.pwrite(descriptor, view, at)
        except OSError as error:  # with the file's name it is not taken for an error of the network
            raise OSError(error.errno, error.strerror, str(path)) from error
        view, at = view[written:], at + written


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Errors of the local disk with the cache's own advice."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from error


def disk_error(error: OSError, path: Path) -> Exception:
    """The user's line for a full disk or one that cannot be written; any other error as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"no space left on the disk of {path}; free some or set HVD_CACHE to a folder with room; the same command "
            "then goes on"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return UserError(f"{path}: cannot write ({error.strerror}); set HVD_CACHE to a folder that can be written")
    return error
