"""What openpi's client and servers send each other: msgpack, with numpy arrays as maps

    {b"__ndarray__": True, b"data": raw bytes in C order, b"dtype": "<f4", b"shape": [...]}
    {b"__npgeneric__": True, b"data": a number or text, b"dtype": "<f4"}

A server reads this from anybody who can reach its port: nothing is unpickled, the unpacker's limits and the number of
objects keep a message from taking much more memory than its own length, and every mistake is one line. Imports no jax.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

MAX_OBJECTS = 20_000  # maps, lists and scalars of a message; an observation has some dozens
MAX_LENGTH = 4_096  # of one list or map
MAX_DIMS = 8

_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
_OTHERS = ({"__ndarray__"}, {"__npgeneric__"}, {b"nd", b"type"}, {"nd", "type"})  # keys of other packers' arrays
_DTYPE = re.compile(r"[<>|](b1|[iu][1248]|f[248]|[SU][1-9][0-9]{0,5})")
_SURROGATES, _LAST_CHARACTER = (0xD800, 0xE000), 0x10FFFF


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
    """The inverse of `pack`. Arrays are read-only, of the message's byte order. Raises `Malformed`."""
    left = MAX_OBJECTS

    def count(items: Sequence[Any]) -> Sequence[Any]:
        nonlocal left
        left -= len(items) + 1
        if left < 0:
            raise Malformed(f"more than {MAX_OBJECTS} values: send arrays as numpy arrays, not as lists")
        return items

    longest = min(len(message), MAX_LENGTH)
    try:
        return msgpack.unpackb(
            message,
            strict_map_key=False,
            object_pairs_hook=lambda pairs: _map(count(pairs)),
            list_hook=count,
            ext_hook=_extension,
            max_array_len=longest,
            max_map_len=longest,
            max_ext_len=0,
        )
    except Malformed:
        raise
    except msgpack.StackError:
        raise Malformed("nested too deeply") from None
    except msgpack.FormatError:
        raise Malformed("its bytes are no msgpack") from None
    except msgpack.ExtraData as error:
        raise Malformed(f"{len(error.extra)} bytes follow the end of the message") from None
    except UnicodeDecodeError:
        raise Malformed("a text in it is not UTF-8") from None
    except ValueError as error:
        raise Malformed(f"cut off, or a list that is too long, which an array is not ({error})") from None


def _extension(code: int, data: bytes) -> Any:
    raise Malformed("it has an extension type")


def _map(pairs: Sequence[tuple[Any, Any]]) -> Any:
    for key, _ in pairs:
        if not isinstance(key, str | bytes):
            raise Malformed(f"a map's key is a {type(key).__name__}; keys are text")
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Malformed("a key is there twice in a map")
    if _ARRAY in found:
        return _array(found)
    if _SCALAR in found:
        return _scalar(found)
    if any(keys <= found.keys() for keys in _OTHERS):
        raise Malformed("an array of another form than openpi's: pack with openpi_client.msgpack_numpy")
    return found


def _array(found: dict[str | bytes, Any]) -> np.ndarray:
    dtype, data, shape = _dtype(found), found.get(b"data"), found.get(b"shape")
    if not isinstance(data, bytes):
        raise Malformed("an array's data is not binary")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or any(type(n) is not int or n < 0 for n in shape):
        raise Malformed(f"an array's shape is not a list of at most {MAX_DIMS} lengths")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise Malformed(f"an array of shape {shape} and dtype {dtype} does not have {len(data)} bytes")
    if dtype.kind == "b":  # a bool of another byte than 0 and 1 has no defined value
        return (np.frombuffer(data, np.uint8) != 0).reshape(shape)
    if dtype.kind == "U":
        codes = np.frombuffer(data, f"{dtype.str[0]}u4")
        if ((codes > _LAST_CHARACTER) | ((codes >= _SURROGATES[0]) & (codes < _SURROGATES[1]))).any():
            raise Malformed("an array of text holds a number that is no character")
    try:
        return np.ndarray(tuple(shape), dtype, data)
    except ValueError as error:  # an empty array with lengths that overflow
        raise Malformed(f"an array of shape {shape}: {error}") from None


def _scalar(found: dict[str | bytes, Any]) -> np.generic:
    dtype, data = _dtype(found), found.get(b"data")
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
