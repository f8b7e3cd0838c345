"""JSON and YAML that somebody else or an earlier run wrote: read against a declared form (msgspec), refused in a line.

A form is a msgspec.Struct, a dataclass or a type such as `dict[str, int]`. Fields that it does not name are ignored.
"""

import json
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import msgspec
from msgspec import Meta

from hvd.errors import UserError
from hvd.files import is_local

LIMIT = 256 << 20  # bytes of one document: a million episodes take about 100 MB

if TYPE_CHECKING:
    Form = type
else:

    class Form:
        """type[T] for a checker of types at run time, which would refuse `dict[str, int]`."""

        def __class_getitem__(cls, item: Any) -> Any:
            return Any


Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[float, Meta(gt=0, lt=1e9)]


def read[T](path: os.PathLike | str, form: Form[T], limit: int = LIMIT) -> T:
    """The document in the file `path`, local or remote.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is no regular file, larger than `limit`, or not of that form.
    """
    return decode(read_bytes(path, limit), form, str(path))


def read_bytes(path: os.PathLike | str, limit: int = LIMIT) -> bytes:
    """At most `limit` bytes of a regular file; raises as `read` does."""
    if not is_local(path):
        from etils import epath

        data = epath.Path(path).read_bytes()
    else:
        with open_file(path) as file:
            data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path} has more than {limit} bytes, more than such a file can have")
    return data


def open_file(path: os.PathLike | str) -> BinaryIO:
    """A regular file, to be read; raises as `read` does."""
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise UserError(f"{path} is not a regular file")
    return Path(path).open("rb")


def decode[T](data: bytes | str, form: Form[T], where: str) -> T:
    """The document in `data`; `where` names it in the error.

    Raises:
        UserError: not JSON, or not of that form.
    """
    try:
        return msgspec.json.decode(data, type=form)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where}: {why}") from None


def read_with_nan[T](path: os.PathLike | str, form: Form[T], limit: int = LIMIT) -> T:
    """`read` of what Python's json wrote, which has NaN and infinities as numbers."""
    data = read_bytes(path, limit)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    return convert(found, form, str(path))


def read_yaml[T](path: os.PathLike | str, form: Form[T], limit: int = 1 << 20) -> T:
    """The YAML document in the file `path`; raises as `read` does."""
    import yaml

    data = read_bytes(path, limit)
    try:
        found = yaml.safe_load(data)
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{path}: not YAML ({error})") from None  # some values raise errors of Python's own
    return convert(found, form, str(path))


def convert[T](value: Any, form: Form[T], where: str) -> T:
    """`decode` for what another library has parsed already (YAML, parquet's rows); raises as it does."""
    try:
        return msgspec.convert(value, type=form)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where}: {why}") from None
