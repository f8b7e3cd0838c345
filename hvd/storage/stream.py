"""A file or a folder as a stream of bytes, for a pipe to another machine. It arrives whole, or nothing of it is kept.

Each entry is a line of JSON, a file's bytes behind it. The last line has the number of entries and a digest of all
before it: a pipe that is cut, even between two files, is noticed. Names are checked on the side that writes; links are
neither followed nor made.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec

from hvd import documents, files
from hvd.errors import Failed, UserError

_LINE = 1 << 16  # bytes of an entry's line
_PART = 1 << 20


@runtime_checkable
class Reader(Protocol):
    """The end of a pipe that is read."""

    def read(self, n: int, /) -> bytes: ...

    def readline(self, limit: int, /) -> bytes: ...


@runtime_checkable
class Writer(Protocol):
    """The end of a pipe that is written; a write takes all."""

    def write(self, data: bytes, /) -> int: ...

    def flush(self) -> None: ...


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A file of `size` bytes, or a folder (no size); `path` is below what is sent, "" for that itself."""

    path: str
    size: documents.Count | None = None


class _End(msgspec.Struct, forbid_unknown_fields=True):
    entries: documents.Count
    sha256: str


class _Line(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Either of them."""

    entry: _Entry | None = None
    end: _End | None = None


def send(source: Path, out: Writer) -> int:
    """Write a file or a folder to `out`; returns how many files and folders it has.

    Raises:
        UserError: there is nothing, or a link or a special file in it; nothing has been written then.
        Failed: a file has become shorter meanwhile.
    """
    found, digest = list(entries(source)), hashlib.sha256()

    def write(data: bytes) -> None:
        digest.update(data)
        out.write(data)

    for entry in found:
        if entry.size is None:
            write(_encoded(_Line(entry=entry)))
            continue
        path = source / entry.path
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            left = entry.size = os.fstat(file.fileno()).st_size
            write(_encoded(_Line(entry=entry)))
            while left:
                part = file.read(min(left, _PART))
                if not part:
                    raise Failed(f"{path} has become shorter while it was sent: try again when nobody writes there")
                write(part)
                left -= len(part)
    out.write(_encoded(_Line(end=_End(len(found), digest.hexdigest()))))
    out.flush()
    return len(found)


def receive(stream: Reader, target: Path, *, overwrite: bool = False) -> int:
    """Read what `send` has written into `target`, which is not there before; returns the number of entries.

    Args:
        overwrite: what is at `target` goes once all has come.

    Raises:
        UserError: there is something at `target`, or the disk is full.
        Failed: the stream ends early, is damaged, or names a place outside of `target`; nothing is kept then.
    """
    check_free(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    made, before = files.temporary_path(target), files.temporary_path(target)
    try:
        with files.disk_errors(target, "nothing has been kept"):
            number = _fill(stream, made)
            replaces = overwrite and os.path.lexists(target)
            if replaces:
                os.rename(target, before)
            try:
                os.rename(made, target)
            except OSError as error:
                if replaces:
                    os.rename(before, target)
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EISDIR):
                    raise
                raise UserError(f"{target} has come into being meanwhile; it is left as it is") from error
        return number
    finally:
        for path in (made, before):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def check_free(target: Path, *, overwrite: bool) -> None:
    """UserError where something is at `target` that may not be replaced."""
    if os.path.lexists(target) and not overwrite:
        raise UserError(f"{target} is there already: give another name, or --overwrite to replace it")


def entries(source: Path) -> Iterator[_Entry]:
    """What `send` would send, sizes aside; UserError where there is nothing, or a link or a special file in it."""
    kind = _kind(source)
    if stat.S_ISREG(kind):
        yield _Entry("", 0)
        return
    yield _Entry("")
    for root, folders, names in os.walk(source, onerror=_raise):
        folders.sort()
        for name in [*folders, *sorted(names)]:
            path = Path(root, name)
            below = path.relative_to(source).as_posix()
            try:
                below.encode()
            except UnicodeEncodeError:
                raise UserError(f"{below!r} is not a name in UTF-8: rename it") from None
            yield _Entry(below, None if stat.S_ISDIR(_kind(path)) else 0)


def _raise(error: OSError) -> None:
    raise error


def _kind(path: Path) -> int:
    """UserError for what is neither a file nor a folder."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if stat.S_ISLNK(mode):
        raise UserError(f"{path} is a link, and links are not followed: put what it points to there (cp -rL)")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path} is neither a file nor a folder: leave it out")
    return mode


def _encoded(line: _Line) -> bytes:
    return msgspec.json.encode(line) + b"\n"


def _fill(stream: Reader, made: Path) -> int:
    digest, number = hashlib.sha256(), 0
    while True:
        text = stream.readline(_LINE)
        if not text.endswith(b"\n"):
            raise Failed("the stream ended too early; nothing of it is kept")
        try:
            line = documents.decode(text, _Line, "the stream")
        except UserError as error:
            raise Failed(f"{error}; nothing of it is kept") from None
        if line.end is not None:
            if (line.end.entries, line.end.sha256) != (number, digest.hexdigest()):
                raise Failed("the stream is damaged; nothing of it is kept")
            return number
        if line.entry is None:
            raise Failed("the stream is damaged; nothing of it is kept")
        digest.update(text)
        _write(stream, _inside(made, line.entry.path, first=not number), line.entry, digest)
        number += 1


def _inside(made: Path, path: str, *, first: bool) -> Path:
    """The place of an entry. All folders on its way have been made by this stream, so none of them is a link."""
    parts = path.split("/")
    if first != (path == "") or (path and any(part in ("", ".", "..") or "\0" in part for part in parts)):
        raise Failed(f"the stream names {path!r}, which is no place in the target; nothing of it is kept")
    return made / path if path else made


def _write(stream: Reader, path: Path, entry: _Entry, digest: Any) -> None:
    try:
        if entry.size is None:
            path.mkdir()
            return
        with path.open("xb") as file:  # neither follows a link nor takes a file that is there
            left = entry.size
            while left:
                part = stream.read(min(left, _PART))
                if not part:
                    raise Failed("the stream ended too early; nothing of it is kept")
                digest.update(part)
                file.write(part)
                left -= len(part)
            file.flush()
            os.fsync(file.fileno())
    except (FileExistsError, FileNotFoundError, NotADirectoryError):
        raise Failed(f"the stream names {entry.path!r} twice or without its folder; nothing of it is kept") from None


def below(folder: Path, path: str) -> Path:
    """The place `path` of `folder`; UserError where it is not below it, by links on its way neither."""
    place = folder / path
    if Path(path).is_absolute() or not path or ".." in Path(path).parts or place == folder:
        raise UserError(f"{path!r}: give a path below {folder}, such as data/mine")
    with contextlib.suppress(OSError, RuntimeError):
        if place.parent.resolve().is_relative_to(folder.resolve()):
            return place
    raise UserError(f"{path!r} leads out of {folder} by a link")
