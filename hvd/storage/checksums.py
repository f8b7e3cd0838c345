"""The checksums that S3 keeps of an object, compared with a file."""

import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path

import google_crc32c

_READ = 4 << 20


def matches(path: Path, sums: dict[str, str]) -> bool:
    """Does the file have the strongest of these checksums (`S3Store.sums`)? True where there is none to compare."""
    if "crc32c" in sums:
        return _crc(path, lambda data, before: google_crc32c.extend(before, data)) == int(sums["crc32c"])
    if "etag" in sums:
        size, _, etag = sums["etag"].partition(":")
        return _etag(path, int(size)) == etag
    for name in ("sha256", "md5"):
        if name in sums:
            with path.open("rb") as file:
                return hashlib.file_digest(file, name).hexdigest() == sums[name]
    return "crc32" not in sums or _crc(path, zlib.crc32) == int(sums["crc32"])


def _crc(path: Path, extend: Callable[[bytes, int], int]) -> int:
    value = 0
    with path.open("rb") as file:
        while data := file.read(_READ):
            value = extend(data, value)
    return value


def _etag(path: Path, part_size: int) -> str:
    """S3's ETag of a multipart upload: the MD5 of the parts' MD5s, a dash, their number."""
    digests = []
    with path.open("rb") as file:
        while data := file.read(part_size):
            digests.append(hashlib.md5(data, usedforsecurity=False).digest())
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"
