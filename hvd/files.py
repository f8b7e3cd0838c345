"""Files that are written whole, locked, read line by line; what a full disk is called. Local paths, and gs:// by etils.

Imports nothing heavy: etils comes in with the first remote path.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hvd.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def is_local(path: os.PathLike | str) -> bool:
    """False for gs://, s3:// and the like."""
    return "://" not in os.fspath(path)


# ------------------------------------------------------------------------------------------------------ written whole


def write_atomic(path: os.PathLike | str, data: bytes | str) -> None:
    """Write a file, local or remote, so that a reader, or a crash, sees the old content or the new, never a part."""
    data = data.encode() if isinstance(data, str) else data
    if not is_local(path):
        from etils import epath

        return _write_remote(epath.Path(path), data)
    with replacing(Path(path)) as temporary:
        # "x" neither follows a link nor takes a file that somebody has put there
        with temporary.open("xb") as file:
            file.write(data)


def write_shared(path: os.PathLike | str, data: bytes | str) -> None:
    """`write_atomic` for a file that several commands may write at a time: one does, and what killed ones left goes."""
    if not is_local(path):
        return write_atomic(path, data)
    target = Path(path)
    with locked(target.with_name(f".{target.name}.lock")):
        remove_left_over(target.parent, target.name)
        write_atomic(target, data)


def _write_remote(target: Any, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / _temporary_name(target.name)
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` for a local file or folder. It becomes `target` when the block succeeds.

    After an error nothing stays. A file is synced first. A folder that another process has put at `target` meanwhile
    stays: it holds the same. A block that makes nothing leaves `target` as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    try:
        yield temporary
        if temporary.is_file():
            _sync(temporary)
        with contextlib.suppress(FileNotFoundError):
            try:
                os.replace(temporary, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
    finally:
        _remove(temporary)


def temporary_path(target: Path) -> Path:
    """A name beside `target` that nobody can guess; make what is there with "x", which follows no link."""
    return target.with_name(_temporary_name(target.name))


def _temporary_name(name: str) -> str:
    return f".{name}.{secrets.token_hex(8)}.tmp"


def remove_left_over(folder: os.PathLike | str, name: str = "") -> None:
    """Remove what killed processes have left of files or folders that were to be written into a local folder.

    Only where nobody else writes now: under a lock, or by the owner of a run.

    Args:
        name: what was to be written; "" = anything.
    """
    if not is_local(folder) or not Path(folder).is_dir():
        return
    for path in Path(folder).iterdir():
        if re.fullmatch(rf"\.{re.escape(name) if name else '.+'}\.[0-9a-f]{{16}}\.tmp", path.name):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------- locked


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], object] | None = None, *, keep: bool = False) -> Iterator[int]:
    """One process at a time in the block. Yields the descriptor of the lock file, which children may inherit.

    The lock goes with its process, so a killed one leaves nothing that must be cleaned up. On a file system without
    locks the block runs at once.

    Args:
        waiting: called again and again while another process holds the lock; it sleeps, or raises to give up.
        keep: leave the lock file behind; it is removed else.
    """
    descriptor = _lock(path, waiting)
    try:
        yield descriptor
    finally:
        if not keep and _is_file(path, descriptor):
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path, waiting: Callable[[], object] | None) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            while not _try_lock(descriptor, wait=waiting is None):
                if waiting is not None:
                    waiting()
        except BaseException:
            os.close(descriptor)
            raise
        if _is_file(path, descriptor):
            return descriptor
        os.close(descriptor)  # the process that held it has removed the file: queue for the new one


def _try_lock(descriptor: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


# --------------------------------------------------------------------------------------------------------- JSON lines


def read_lines(path: os.PathLike | str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, local or remote; [] when there is no file.

    A line that is no object is left out: the last one may be half written.
    """
    found = (_parse(line) for line in _text(path).splitlines())
    return [line for line in found if line is not None]


class JsonLines:
    """A file of JSON lines that is appended to. Lines that `keep` refuses, and a torn last one, are dropped at opening.

    On a remote path, where nothing can be appended, the whole file is written at each `flush`.
    """

    def __init__(self, path: os.PathLike | str, keep: Callable[[dict[str, Any]], bool] = lambda line: True):
        before = _text(path)
        self._path = path
        self._lines = [line for line in before.splitlines() if (entry := _parse(line)) is not None and keep(entry)]
        kept = "".join(f"{line}\n" for line in self._lines)
        if kept != before:
            write_atomic(path, kept)
        self._file = None
        if is_local(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._lines)

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._lines]

    def write(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record)
        self._lines.append(line)
        if self._file is not None:
            self._file.write(line + "\n")
            self._file.flush()  # a killed process loses nothing that was flushed; only a lost machine does

    def flush(self) -> None:
        """Make sure that the lines outlive the machine."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        else:
            write_atomic(self._path, "".join(f"{line}\n" for line in self._lines))

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


def _text(path: os.PathLike | str) -> str:
    if is_local(path):
        file = Path(path)
    else:
        from etils import epath

        file = epath.Path(path)
    return file.read_bytes().decode(errors="replace") if file.exists() else ""


def _parse(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


# -------------------------------------------------------------------------------------------------------- disk errors


@contextlib.contextmanager
def disk_errors(where: os.PathLike | str, advice: str) -> Iterator[None]:
    """A full disk, or one that may not be written, as a UserError; any other error as it is."""
    try:
        yield
    except OSError as error:
        line = disk_error(error, where, advice)
        if line is None:
            raise
        raise line from error


def disk_error(error: BaseException, where: os.PathLike | str, advice: str) -> UserError | None:
    """The user's line for an error of the local disk; None when the error is of another kind.

    Args:
        where: the file or folder that is named when the error names none.
        advice: what to do, the end of the line.
    """
    full = full_disk(error)
    if full is not None:
        return UserError(f"no space left on the disk of {full or os.fspath(where)}; {advice}")
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return UserError(f"{error.filename or os.fspath(where)}: cannot write ({error.strerror}); {advice}")
    return None


def full_disk(error: BaseException | None) -> str | None:
    """The file for which an error, or one that caused it, found no space; "" when it names none.

    None when the error is not about a full disk or quota.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = str(error)
        number = error.errno if isinstance(error, OSError) else None
        # C++ libraries (tensorstore, HDF5) carry only strerror's text; numpy says that it wrote less than requested
        by_text = re.search(r"no space left on device|disk quota exceeded|\d requested and \d+ written", text, re.I)
        if number in FULL or by_text:
            return str(getattr(error, "filename", None) or _path_in(text))
        error = error.__cause__ or error.__context__
    return None


def _path_in(text: str) -> str:
    match = re.search(r"(?:file://|['\"\s:])(/[^'\"\s:\]]+)", text)
    return match.group(1) if match else ""
