"""A file of requests and replies, as a robot's client saw them: msgpack objects one after another.

    {"format": 1, "about": what the server said of itself, packed}
    {"at": seconds since the first request, "took": seconds, "request": the message, "reply": the message}

Messages are bytes, as they travelled. Each exchange is written at once: a client that is killed loses the last one at
most. Imports no jax.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgpack
from msgspec import Meta

from hvd import documents
from hvd.documents import Form
from hvd.errors import UserError

FORMAT = 1
LIMIT = 256 << 20  # bytes of one exchange
Seconds = Annotated[float, Meta(ge=0, lt=1e6)]


@dataclass(frozen=True)
class Exchange:
    """One request and its reply. `at`, `took`: seconds."""

    at: Seconds
    took: Seconds
    request: bytes
    reply: bytes


@dataclass(frozen=True)
class _Header:
    format: int
    about: bytes


class Record:
    """Writes a new file; UserError where `path` is there already, or cannot be written."""

    def __init__(self, path: os.PathLike | str, about: bytes):
        try:
            self._file = Path(path).open("xb")
        except FileExistsError:
            raise UserError(f"{path} is there already: record to a new file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot write ({error.strerror})") from None
        self._began: float | None = None
        self._write({"format": FORMAT, "about": about})

    def add(self, asked: float, came: float, request: bytes, reply: bytes) -> None:
        """An exchange; `asked` and `came` by the same clock."""
        began = self._began = asked if self._began is None else self._began
        self._write({"at": asked - began, "took": came - asked, "request": request, "reply": reply})

    def close(self) -> None:
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(msgpack.Packer().pack(record))
        self._file.flush()


def read(path: os.PathLike | str) -> tuple[bytes, Iterator[Exchange]]:
    """What the server said of itself, and the exchanges one by one; a last one that was cut off is left out.

    Raises:
        UserError: no such file, or not one of these; from the iterator too.
    """
    try:
        file = documents.open_file(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    objects = _objects(path, file)
    header = _form(next(objects, None), _Header, f"{path}")
    if header.format != FORMAT:
        raise UserError(f"{path}: format {header.format}, this version reads {FORMAT}")
    return header.about, (_form(found, Exchange, f"{path}: exchange {i}") for i, found in enumerate(objects))


def _objects(path: os.PathLike | str, file: Any) -> Iterator[Any]:
    with file:
        unpacker = msgpack.Unpacker(file, max_buffer_size=LIMIT, strict_map_key=True, max_ext_len=0, max_map_len=16)
        while True:
            try:
                yield unpacker.unpack()
            except msgpack.OutOfData:
                return
            except (msgpack.UnpackException, ValueError) as error:
                raise UserError(f"{path}: no record of exchanges ({error})") from None


def _form[T](found: Any, form: Form[T], where: str) -> T:
    return documents.convert(found, form, where)
