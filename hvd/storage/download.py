"""Objects of a store into a local folder: several at once, checked, and taken up again where a download stopped.

A file gets its name only when it is whole, has the right checksum and is on the disk, so one that has its name is not
fetched again. Two nodes may fill one folder at the same time (a network disk without locks): each file has a temporary
name until then.
"""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from hvd.errors import Failed, UserError
from hvd.files import replacing
from hvd.storage import remote
from hvd.storage.remote import Busy, Damaged, Object, Refused, Replaced, Store, given_up

FILES = 8  # fetched at once, each in parts
LARGE, LARGE_FILES = 4, 3  # of those with more parts than this so many at once: a kill costs what is not whole yet
BAD_SUMS = 3  # an object that has the wrong checksum so often is given up
STALE_S = 600.0  # a temporary file that nobody has written for so long is a killed process's


def received(folder: Path) -> int:
    """Bytes of a download that are on the disk; a file in parts has its whole length from the start, with holes."""
    total = 0
    for path in _files(folder):
        with contextlib.suppress(FileNotFoundError):  # it has just got its name
            stat = path.stat()
            total += min(stat.st_size, stat.st_blocks * 512)
    return total


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
    for path in _files(folder):
        if path.name.endswith(".tmp") and path.relative_to(folder).as_posix() not in objects:
            with contextlib.suppress(FileNotFoundError):  # another node's, which has just got its name
                if time.time() - path.stat().st_mtime > STALE_S:
                    path.unlink()
    missing = {name: item for name, item in objects.items() if not _is_there(folder / name, item)}
    needed, total = (sum(item.size for item in some.values()) for some in (missing, objects))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{what}: no space left on the disk of {folder}: {needed / 1e9:.3g} GB are still needed, "
            f"{free / 1e9:.3g} GB are free; free some or set HVD_CACHE; the same command then goes on"
        )
    stop, large = threading.Event(), threading.Semaphore(LARGE_FILES)

    def check_stop() -> None:
        if stop.is_set():
            raise InterruptedError("the download was stopped")

    def fetch(name: str, item: Object) -> None:
        if item.size <= LARGE * remote.PART:
            return _fetch(store, item, folder / name, f"{what}: {name}", check_stop)
        with large:
            return _fetch(store, item, folder / name, f"{what}: {name}", check_stop)

    from tqdm import tqdm  # 60 ms, which `launch/submit.py` need not wait for

    pool = ThreadPoolExecutor(FILES, "hvd-download")
    try:
        with tqdm(
            total=total,
            initial=total - needed,
            desc=what,
            unit="B",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
        ) as bar:
            running = {pool.submit(fetch, *entry) for entry in sorted(missing.items(), key=lambda e: -e[1].size)}
            while running:
                poll()
                finished, running = wait(running, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                bar.update((received(folder) if running else total) - bar.n)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)  # else a part in flight meets a closed session


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _is_there(path: Path, item: Object) -> bool:
    return path.is_file() and path.stat().st_size == item.size


def _fetch(store: Store, item: Object, path: Path, what: str, check_stop: Callable[[], None]) -> None:
    """One object, in a thread of the pool."""
    for _ in range(BAD_SUMS):
        check_stop()
        try:
            with replacing(path) as temporary:
                temporary.touch()
                if item.size:
                    store.download(item, temporary, what, check_stop)
            return
        except Damaged:
            continue
        except Busy as error:
            raise given_up(what, error) from error
        except Refused as error:
            raise UserError(f"{what}: {error}") from error
        except Replaced as error:
            raise Failed(
                f"{what} was replaced in the store while it was fetched ({error}); the same command fetches the new one"
            ) from error
    raise Failed(
        f"{what} has a wrong checksum, {BAD_SUMS} times in a row: the object in the store is damaged, or something on "
        "the way changes it"
    )
