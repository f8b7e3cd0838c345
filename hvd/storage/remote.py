"""Objects of a bucket, read over the network: gs:// by google-cloud-storage, s3:// by boto3 (extra `s3`).

The packages transfer, in parts and in threads, and ask again. Both stores speak one small language: what lies below a
URL, an object into a file, and four ways to fail: `Refused` (no such thing, no access: asking again does not help),
`Busy` (429, 5xx, a cut connection, silence: ask again), `Replaced` (the object is not the one that was listed) and
`Damaged` (a wrong checksum).
"""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from hvd.errors import Failed, UserError

PART = 8 << 20  # bytes of one request: what a cut connection costs
THREADS = 16  # requests at once, of all objects together
TRIES = 7  # of one request
BACKOFF_S, LONGEST_S = 0.5, 20.0  # pauses between them
CONNECT_S, SILENCE_S = 15.0, 60.0  # a server that says nothing for so long is asked again

_SCHEMES = ("gs", "s3")


def timeouts() -> tuple[float, float]:
    """Seconds to connect, and of silence, as requests takes them."""
    return CONNECT_S, SILENCE_S


class Refused(Exception):
    """The store will not give it, however often it is asked."""


class Busy(Exception):
    """It may work at the next try."""


class Replaced(Exception):
    """The object was overwritten after it had been listed."""


class Damaged(Exception):
    """What came does not have the object's checksum."""


@dataclass(frozen=True)
class Location:
    """gs://bucket/path or s3://bucket/path; `path` has no slash at either end."""

    scheme: str
    bucket: str
    path: str

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.path}"

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Object:
    """One object: its whole key, bytes, what tells its versions apart, and its crc32c where the listing has it."""

    key: str
    size: int
    version: str
    crc32c: str | None = None  # in base64

    def __post_init__(self):
        if not 0 <= self.size <= 2**53 or (not self.size and self.crc32c not in (None, "AAAAAA==")):
            raise ValueError(f"{self.key!r} of {self.size} bytes with checksum {self.crc32c!r}")


@runtime_checkable
class Store(Protocol):
    """One bucket. Every method may raise Refused or Busy and may be called by many threads."""

    def find(self, path: str) -> Object | None:
        """The object of exactly this key; None where there is none."""
        ...

    def below(self, prefix: str, limit: int | None = None) -> list[Object]:
        """Objects whose keys start with `prefix`."""
        ...

    def download(self, item: Object, path: Path, what: str, check_stop: Callable[[], None]) -> None:
        """The listed version, which is not empty, into a file that is there, its checksum compared. Raises Replaced or
        Damaged, Failed (naming `what`) after many tries, and whatever `check_stop`, called before each part, raises."""
        ...

    def close(self) -> None:
        """Its connections."""
        ...


def is_url(path: str) -> bool:
    return "://" in path


def parse(url: str, field: str = "") -> Location:
    """The URL in parts; UserError (naming the config field) for one that hvd cannot fetch."""
    where = f"{field} {url}".strip()
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    path = path.strip("/")
    if scheme not in _SCHEMES:
        raise UserError(f"{where}: hvd fetches gs://BUCKET/PATH and s3://BUCKET/PATH, or takes a local path")
    if not bucket or not path or any(part in ("", ".", "..") for part in path.split("/")):
        raise UserError(f"{where}: no {scheme}://BUCKET/PATH")
    if (scheme, bucket) == ("s3", "openpi-assets"):
        # openpi's first configs, and the papers built on them, say s3://openpi-assets. openpi moved its public assets
        # to the Google bucket of that name in June 2025, with the same paths below it, and reads only that one since.
        scheme = "gs"
    return Location(scheme, bucket, path)


@contextlib.contextmanager
def network_errors() -> Iterator[None]:
    import requests
    import urllib3

    try:
        yield
    except requests.exceptions.InvalidURL:
        raise
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
        raise Busy(error_line(error)) from error


@contextlib.contextmanager
def listing_errors() -> Iterator[None]:
    """What a listing or an object's description raises in the packages when it is none: a proxy's page, for one."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise Busy(f"its answer is no listing of objects: {error_line(error)}") from error


def status_error(code: int, message: str | None) -> Exception:
    text = f"{code} {message or ''}".strip()
    if code in (401, 403):
        return Refused(f"no access ({text})")
    if code == 412:
        return Replaced(text)
    return Busy(text) if code in (408, 409, 425, 429) or code >= 500 else Refused(text)


def error_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def retried[T](what: str, ask: Callable[[], T]) -> T:
    """`ask()`, again after a growing pause while the store is busy.

    Raises:
        Failed: still busy after so many tries.
    """
    for attempt in range(TRIES):
        try:
            return ask()
        except Busy as error:
            if attempt + 1 == TRIES:
                raise given_up(what, error) from error
            time.sleep(min(BACKOFF_S * 2**attempt * random.uniform(0.7, 1.3), LONGEST_S))
    raise AssertionError("unreachable")


def given_up(what: str, error: Busy) -> Failed:
    return Failed(f"{what}: the store does not answer ({error}); the same command goes on where it stopped")
