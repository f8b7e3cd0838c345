"""Checksums of objects that arrive in parts and out of order."""

import hashlib
import zlib
from pathlib import Path

import google_crc32c

_POLYNOMIAL = 0x82F63B78  # of crc32c; the lowest bit is the highest power
_READ = 4 << 20


def crc32c(data: bytes, before: int = 0) -> int:
    """crc32c of what `before` is the checksum of, followed by `data`."""
    return google_crc32c.extend(before, data)


def joined(parts: list[tuple[int, int]]) -> int:
    """The crc32c of the whole from (crc, bytes) of its consecutive parts, without their bytes.

    As in zlib's crc32_combine: a CRC is linear over GF(2), so n zero bytes after a part multiply its CRC by x^(8n)
    modulo the polynomial.
    """
    total = 0
    for crc, size in parts:
        total = _times(_power_of_x(8 * size), total) ^ crc
    return total


def _times(a: int, b: int) -> int:
    """a * b modulo the polynomial; the highest bit is x^0."""
    product = 0
    for i in range(32):
        if a >> (31 - i) & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _power_of_x(n: int) -> int:
    result, square = 1 << 31, 1 << 30  # x^0, x^1
    while n:
        if n & 1:
            result = _times(square, result)
        square = _times(square, square)
        n >>= 1
    return result


def crc32c_of(path: Path, start: int, stop: int) -> int:
    """crc32c of bytes [start, stop) of a file; of fewer where it is shorter."""
    found = 0
    with path.open("rb") as file:
        file.seek(start)
        while start < stop and (data := file.read(min(_READ, stop - start))):
            found, start = crc32c(data, found), start + len(data)
    return found


def matches(path: Path, sums: dict[str, str], parts_crc32c: int) -> bool:
    """Does the file have the strongest of these checksums (`Store.sums`)? True where there is none to compare.

    Args:
        parts_crc32c: crc32c of the whole, known from its parts; saves reading the file where the store has one too.
    """
    if "crc32c" in sums:
        return int(sums["crc32c"]) == parts_crc32c
    if "etag" in sums:
        size, _, etag = sums["etag"].partition(":")
        return _etag(path, int(size)) == etag
    for name in ("sha256", "md5"):
        if name in sums:
            with path.open("rb") as file:
                return hashlib.file_digest(file, name).hexdigest() == sums[name]
    if "crc32" in sums:
        found = 0
        with path.open("rb") as file:
            while data := file.read(_READ):
                found = zlib.crc32(data, found)
        return found == int(sums["crc32"])
    return True


def _etag(path: Path, part_size: int) -> str:
    """S3's ETag of a multipart upload: the MD5 of the parts' MD5s, a dash, their number."""
    digests = []
    with path.open("rb") as file:
        while data := file.read(part_size):
            digests.append(hashlib.md5(data, usedforsecurity=False).digest())
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"
