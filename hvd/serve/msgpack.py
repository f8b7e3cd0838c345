"""What openpi's client and servers send each other: msgpack, with numpy arrays as maps

    {b"__ndarray__": True, b"data": raw bytes in C order, b"dtype": "<f4", b"shape": [...]}
    {b"__npgeneric__": True, b"data": a number or text, b"dtype": "<f4"}

A server reads this from anybody who can reach its port, so it is decoded here and not by a library: nothing is
unpickled, a message never takes much more memory than its own length (nesting and the number of objects are limited,
arrays are views of the message), and every mistake is one line. Imports no jax.
"""

import math
import re
import struct
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

MAX_DEPTH = 8
MAX_OBJECTS = 20_000  # maps, lists and scalars of a message; an observation has some dozens
MAX_DIMS = 8

_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_DTYPE = re.compile(r"[<>|](b1|[iu][1248]|f[248]|[SU][1-9][0-9]{0,5})")
_LAST_CHARACTER = 0x10FFFF


class Malformed(ValueError):
    """A message that cannot be read; its text is one line for the client."""


def pack(value: Any) -> bytes:
    """dicts, lists, text, bytes, numbers and numpy arrays -> msgpack, as openpi_client.msgpack_numpy writes it."""
    return msgpack.Packer(default=_pack_numpy).pack(value)


def _pack_numpy(value: Any) -> dict[bytes, Any]:
    if isinstance(value, np.ndarray | np.generic):
        if not _DTYPE.fullmatch(value.dtype.str):
            raise TypeError(f"dtype {value.dtype} cannot be sent")
        if isinstance(value, np.generic):
            return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
        return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def unpack(message: bytes) -> Any:
    """The inverse of `pack`. Arrays are read-only views of `message`, of its byte order. Raises `Malformed`."""
    reader = _Reader(message)
    value = reader.value(0)
    if reader.at != len(message):
        raise Malformed(f"{len(message) - reader.at} bytes follow the end of the message")
    return _owned(value)


class _Reader:
    """Reads one value after another; bytes are views until it is known what they are."""

    def __init__(self, message: bytes):
        self._data, self.at, self._objects = memoryview(message), 0, 0

    def value(self, depth: int) -> Any:
        self._objects += 1
        if self._objects > MAX_OBJECTS:
            raise Malformed(f"more than {MAX_OBJECTS} values: send arrays as numpy arrays, not as lists")
        if depth > MAX_DEPTH:
            raise Malformed(f"nested deeper than {MAX_DEPTH}")
        code = self._take(1)[0]
        if code <= 0x7F:
            return code
        if code >= 0xE0:
            return code - 0x100
        if code <= 0x8F:
            return self._map(code & 0x0F, depth)
        if code <= 0x9F:
            return self._list(code & 0x0F, depth)
        if code <= 0xBF:
            return self._text(code & 0x1F)
        read = _CODES.get(code)
        if read is None:
            what = "an extension type" if 0xC7 <= code <= 0xD8 else "no msgpack"
            raise Malformed(f"byte {self.at - 1} is 0x{code:02x}, {what}")
        return read(self, depth)

    def _take(self, count: int) -> memoryview:
        end = self.at + count
        if end > len(self._data):
            raise Malformed(f"cut off: {end - len(self._data)} more bytes were announced")
        found = self._data[self.at : end]
        self.at = end
        return found

    def number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def binary(self, count: int) -> memoryview:
        return self._take(count)

    def _text(self, count: int) -> str:
        try:
            return str(self._take(count), "utf-8")
        except UnicodeDecodeError:
            raise Malformed(f"the text that ends at byte {self.at} is not UTF-8") from None

    def _list(self, count: int, depth: int) -> list[Any]:
        return [_owned(self.value(depth + 1)) for _ in range(self._possible(count))]

    def _map(self, count: int, depth: int) -> Any:
        found: dict[str | bytes, Any] = {}
        for _ in range(self._possible(count)):
            key = _owned(self.value(depth + 1))
            if not isinstance(key, str | bytes):
                raise Malformed(f"a map's key is a {type(key).__name__}; keys are text")
            if key in found:
                raise Malformed(f"key {key!r} is there twice")
            found[key] = self.value(depth + 1)
        if _ARRAY in found:
            return _array(found)
        if _SCALAR in found:
            return _scalar(found)
        return {key: _owned(value) for key, value in found.items()}

    def _possible(self, count: int) -> int:
        """`count` of a list or map, each of which takes a byte or more."""
        left = len(self._data) - self.at
        if count > left:
            raise Malformed(f"cut off: {count} values announced, {left} bytes left")
        return count


_CODES: dict[int, Callable[[_Reader, int], Any]] = {
    0xC0: lambda r, d: None,
    0xC2: lambda r, d: False,
    0xC3: lambda r, d: True,
    0xC4: lambda r, d: r.binary(r.number(">B")),
    0xC5: lambda r, d: r.binary(r.number(">H")),
    0xC6: lambda r, d: r.binary(r.number(">I")),
    0xCA: lambda r, d: r.number(">f"),
    0xCB: lambda r, d: r.number(">d"),
    0xCC: lambda r, d: r.number(">B"),
    0xCD: lambda r, d: r.number(">H"),
    0xCE: lambda r, d: r.number(">I"),
    0xCF: lambda r, d: r.number(">Q"),
    0xD0: lambda r, d: r.number(">b"),
    0xD1: lambda r, d: r.number(">h"),
    0xD2: lambda r, d: r.number(">i"),
    0xD3: lambda r, d: r.number(">q"),
    0xD9: lambda r, d: r._text(r.number(">B")),
    0xDA: lambda r, d: r._text(r.number(">H")),
    0xDB: lambda r, d: r._text(r.number(">I")),
    0xDC: lambda r, d: r._list(r.number(">H"), d),
    0xDD: lambda r, d: r._list(r.number(">I"), d),
    0xDE: lambda r, d: r._map(r.number(">H"), d),
    0xDF: lambda r, d: r._map(r.number(">I"), d),
}


def _owned(value: Any) -> Any:
    return bytes(value) if isinstance(value, memoryview) else value


def _array(found: dict[str | bytes, Any]) -> np.ndarray:
    dtype, data, shape = _dtype(found), found.get(b"data"), found.get(b"shape")
    if not isinstance(data, memoryview):
        raise Malformed("an array's data is not binary")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or any(type(n) is not int or n < 0 for n in shape):
        raise Malformed(f"an array's shape is not a list of at most {MAX_DIMS} lengths")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise Malformed(f"an array of shape {shape} and dtype {dtype} does not have {len(data)} bytes")
    if dtype.kind == "b":  # a bool of another byte than 0 and 1 has no defined value
        return (np.frombuffer(data, np.uint8) != 0).reshape(shape)
    if dtype.kind == "U" and len(data) and np.frombuffer(data, f"{dtype.str[0]}u4").max() > _LAST_CHARACTER:
        raise Malformed("an array of text holds a number that is no character")
    try:
        return np.ndarray(tuple(shape), dtype, data)
    except ValueError as error:  # an empty array with lengths that overflow
        raise Malformed(f"an array of shape {shape}: {error}") from None


def _scalar(found: dict[str | bytes, Any]) -> np.generic:
    dtype, data = _dtype(found), _owned(found.get(b"data"))
    kinds = {"b": bool, "i": int, "u": int, "f": float | int, "U": str, "S": bytes}
    if not isinstance(data, kinds[dtype.kind]) or (isinstance(data, bool) and dtype.kind != "b"):
        raise Malformed(f"a numpy scalar of dtype {dtype} holds a {type(data).__name__}")
    try:
        with np.errstate(over="ignore"):
            return dtype.type(data)
    except (OverflowError, ValueError, UnicodeError):
        raise Malformed(f"a numpy scalar of dtype {dtype} does not hold {str(data)[:40]}") from None


def _dtype(found: dict[str | bytes, Any]) -> np.dtype:
    name = found.get(b"dtype")
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise Malformed(f"dtype {str(name)[:40]!r} of an array: send bool, integers, floats or text")
    return np.dtype(name)
