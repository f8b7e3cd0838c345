"""Where derived data of a dataset are kept (memory-mapped columns, packet lists, resized frames), and how they come
there: whole or not at all, made by one process while the others wait.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from hvd.errors import UserError


def cache_folder(root: Path) -> Path:
    """<dataset>/.hvd_cache, or a folder of the user's cache when the dataset is read-only."""
    beside = root / ".hvd_cache"
    if os.access(beside if beside.exists() else root, os.W_OK):
        return beside
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(home) / "hvd" / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]


def cached(target: Path, make: Callable[[Path], None]) -> Path:
    """`target`, a file or folder of a cache; if it is not there, `make(temporary path)` makes it first."""
    if not target.exists():
        with _alone(target), replacing(target) as temporary:
            if not target.exists():  # another process may have made it while this one waited
                make(temporary)
    return target


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` for a file or folder; it becomes `target` when the block succeeds.

    Nothing partial stays behind. A full disk or a folder that cannot be written is a UserError.
    """
    with _disk_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            temporary = work / target.name
            yield temporary
            if temporary.exists():
                try:
                    os.replace(temporary, target)
                except OSError as error:
                    # A folder is there already: another process was first, and what it made is the same
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
            _drop_if_empty(target.parent)


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process at a time. The lock goes with its process, so a killed one leaves nothing that must be cleaned up."""
    path = target.parent / f".{target.name}.lock"
    while True:
        with _disk_errors(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            break  # a file system without locks: work is done twice at worst, each result is moved into place whole
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                break
        lock.close()  # the one who held it has removed it: queue for the new one
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()
        _drop_if_empty(target.parent)


def _drop_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is not empty, or gone
        folder.rmdir()


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # numpy says only that fewer bytes were written than were to be
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and "written" in str(error)):
            raise UserError(f"{folder}: the disk is full; the dataset's cache needs room here") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{folder}: cannot write the dataset's cache here ({error.strerror})") from error
        raise
