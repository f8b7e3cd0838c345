"""Length and sha256 of every file of a checkpoint: written when it is saved, compared when it is read.

complete.json has them for a complete run, <checkpoint>/manifest.json for each single checkpoint. Imports no jax.
"""

import concurrent.futures
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Annotated

import msgspec
from etils import epath

from hvd import documents
from hvd.errors import UserError
from hvd.files import is_local, write_atomic

NAME = "manifest.json"
_CHUNK = 4 << 20
_WRITTEN_LATER = "_CHECKPOINT_METADATA"  # Orbax puts the time of the commit into it

type Files = Mapping[str, tuple[int, str]]  # path below a folder -> (bytes, sha256)


class File(msgspec.Struct):
    """One file, as a document has it."""

    bytes: documents.Count
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Manifest(msgspec.Struct):
    files: dict[str, File]


def write(folder: epath.Path) -> None:
    """The manifest of a checkpoint that has just been written, into its folder."""
    files = hashed(folder, sorted(names(folder) - {_WRITTEN_LATER}))
    write_atomic(folder / NAME, json.dumps({"files": to_plain(files)}, indent=1))


def read(folder: epath.Path) -> Files | None:
    """The manifest of a checkpoint; None where an older version saved it. UserError for one that is damaged."""
    try:
        return from_plain(documents.read(folder / NAME, _Manifest).files, str(folder / NAME))
    except FileNotFoundError:
        return None


def to_plain(files: Files) -> dict[str, dict[str, int | str]]:
    return {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}


def from_plain(files: Mapping[str, File], where: str) -> dict[str, tuple[int, str]]:
    """The files of a document. UserError for a name that leads out of the folder."""
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
            raise UserError(f"{where}: {name!r} is not the name of a file below its folder")
    return {name: (file.bytes, file.sha256) for name, file in files.items()}


def hashed(root: epath.Path, names: Iterable[str]) -> dict[str, tuple[int, str]]:
    names = list(names)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(lambda name: _hash(root / name), names), strict=True))


def check_present(root: epath.Path, files: Files) -> tuple[tuple[int, float], ...]:
    """Length and time of the last change of each file; UserError that names one which is not there as it was."""
    return tuple(_present(root / name, size) for name, (size, _) in files.items())


def check_digests(root: epath.Path, files: Files, source: str) -> None:
    """Read every byte of the files. UserError that names one whose sha256 is not that of `source`."""
    for name, found in hashed(root, files).items():
        if found != files[name]:
            raise UserError(f"{root / name} is corrupted: its sha256 is not the one in {source}")


def digest(files: Files) -> str:
    """sha256 over the list of files."""
    lines = "".join(f"{name} {size} {sha256}\n" for name, (size, sha256) in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def names(folder: epath.Path) -> set[str]:
    """The files below a folder, by their path below it."""
    return {os.path.relpath(os.fspath(path), os.fspath(folder)) for path in _walk(folder)}


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry


def _present(path: epath.Path, size: int) -> tuple[int, float]:
    if not path.exists():
        raise UserError(f"{path} is missing")
    if is_local(path):
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{path} is not a regular file")
        length, changed = about.st_size, about.st_mtime_ns
    else:
        remote = path.stat()
        length, changed = remote.length, remote.mtime
    if length != size:
        raise UserError(f"{path} has {length} bytes instead of {size}: it is damaged")
    return length, changed


def _hash(path: epath.Path) -> tuple[int, str]:
    found, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
            size += len(chunk)
    return size, found.hexdigest()
