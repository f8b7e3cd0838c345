"""Objects of a bucket, read over the network: gs:// by google-cloud-storage, s3:// by boto3 (extra `s3`).

Both stores speak one small language: what lies below a URL, a range of an object as a stream of chunks, and three ways
to fail: `Refused` (no such thing, no access: asking again does not help), `Busy` (429, 5xx, a cut connection, silence:
ask again) and `Replaced` (the object is not the one that was listed).
"""

import base64
import contextlib
import os
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from hvd.errors import UserError

CHUNK = 1 << 20  # bytes handed on at a time
CONNECT_S, SILENCE_S = 15.0, 60.0  # a server that says nothing for so long is asked again

_SCHEMES = ("gs", "s3")


class Refused(Exception):
    """The store will not give it, however often it is asked."""


class Busy(Exception):
    """It may work at the next try. `after_s`: when the store wants to be asked again, 0 = not said."""

    def __init__(self, message: str, after_s: float = 0.0):
        super().__init__(message)
        self.after_s = after_s


class Replaced(Exception):
    """The object was overwritten after it had been listed."""


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
    """One object: its whole key, bytes, what tells its versions apart, and crc32c where the listing has it."""

    key: str
    size: int
    version: str
    crc32c: int | None = None


@runtime_checkable
class Store(Protocol):
    """One bucket. Every method may raise Refused or Busy and may be called by many threads."""

    def find(self, path: str) -> Object | None:
        """The object of exactly this key; None where there is none."""
        ...

    def below(self, prefix: str, limit: int | None = None) -> list[Object]:
        """Objects whose keys start with `prefix`."""
        ...

    def read(self, item: Object, start: int, stop: int) -> contextlib.AbstractContextManager[Iterator[bytes]]:
        """Bytes [start, stop) of the listed version, in chunks; fewer come when the connection is cut."""
        ...

    def sums(self, item: Object) -> dict[str, str]:
        """Checksums of the whole object that the store gives: crc32c, crc32 (decimal), sha256, md5 (hexadecimal), and
        "etag" as "<part bytes>:<md5 of the parts' md5>-<parts>" for an object that was uploaded in parts."""
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


def open_store(location: Location, connections: int) -> Store:
    """The location's bucket; UserError where a package is missing or the credentials are no credentials."""
    kind = GoogleStore if location.scheme == "gs" else S3Store
    return kind(location.bucket, connections)


# ------------------------------------------------------------------------------------------------------------- gs://


class GoogleStore:
    """A Google Cloud Storage bucket, with application-default credentials where there are any, else anonymous.
    STORAGE_EMULATOR_HOST is honoured (and gets no credentials)."""

    def __init__(self, bucket: str, connections: int):
        import google.auth
        import google.auth.exceptions
        from google.auth.credentials import AnonymousCredentials
        from google.cloud import storage

        self._credentials: Any = AnonymousCredentials()
        self._connections = connections
        if not os.environ.get("STORAGE_EMULATOR_HOST"):
            scope = "https://www.googleapis.com/auth/devstorage.read_only"
            try:
                self._credentials, _ = google.auth.default(scopes=[scope])
            except google.auth.exceptions.DefaultCredentialsError as error:
                if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
                    raise UserError(f"GOOGLE_APPLICATION_CREDENTIALS: {error}") from error
        self._client = storage.Client(project="<none>", credentials=self._credentials)
        self._bucket: Any = self._client.bucket(bucket)
        self._sessions, self._opened = threading.local(), []

    def find(self, path: str) -> Object | None:
        with _google_errors():
            found = self._bucket.get_blob(path, timeout=(CONNECT_S, SILENCE_S), retry=None)
            return None if found is None else _google_object(found)

    def below(self, prefix: str, limit: int | None = None) -> list[Object]:
        with _google_errors():
            fields = "items(name,size,generation,crc32c),nextPageToken"
            found = self._bucket.list_blobs(
                prefix=prefix, max_results=limit, fields=fields, timeout=(CONNECT_S, SILENCE_S), retry=None
            )
            return [_google_object(blob) for blob in found]

    @contextlib.contextmanager
    def read(self, item: Object, start: int, stop: int) -> Iterator[Iterator[bytes]]:
        # The package's own download reads 8 KB at a time in Python, with the interpreter's lock: too slow for threads
        path = f"/download/storage/v1/b/{self._bucket.name}/o/{urllib.parse.quote(item.key, safe='')}"
        query = f"?alt=media&generation={item.version}"
        # gzip: the bytes as they are stored, which is what the checksum is of
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "gzip"}
        url = self._client.api_endpoint.rstrip("/") + path + query
        with (
            _google_errors(),
            self._session().get(url, headers=headers, stream=True, timeout=(CONNECT_S, SILENCE_S)) as response,
        ):
            if response.status_code == 404:  # that generation is gone
                raise Replaced(response.reason)
            if response.status_code not in (200, 206):
                raise _status_error(response.status_code, response.reason, response.headers.get("Retry-After"))
            if start and response.status_code != 206:
                raise Refused("the server does not give parts of an object")
            yield _chunks(response.raw)

    def sums(self, item: Object) -> dict[str, str]:
        return {} if item.crc32c is None else {"crc32c": str(item.crc32c)}

    def _session(self) -> Any:
        """A session of this thread's own: requests does not promise that threads may share one."""
        if not hasattr(self._sessions, "session"):
            import requests
            from google.auth.credentials import AnonymousCredentials
            from google.auth.transport.requests import AuthorizedSession

            anonymous = isinstance(self._credentials, AnonymousCredentials)
            session = requests.Session() if anonymous else AuthorizedSession(self._credentials)
            self._sessions.session = session
            self._opened.append(session)
        return self._sessions.session

    def close(self) -> None:
        for session in (*self._opened, self._client):
            session.close()


def _google_object(blob: Any) -> Object:
    checksum = int.from_bytes(base64.b64decode(blob.crc32c), "big") if blob.crc32c else None
    return Object(blob.name, int(blob.size or 0), str(blob.generation), checksum)


@contextlib.contextmanager
def _google_errors() -> Iterator[None]:
    import google.auth.exceptions
    from google.api_core.exceptions import GoogleAPICallError

    with _network_errors():
        try:
            yield
        except GoogleAPICallError as error:
            raise _status_error(int(error.code or 0), error.message) from error
        except google.auth.exceptions.TransportError as error:
            raise Busy(_line(error)) from error
        except google.auth.exceptions.InvalidOperation as error:  # asked for credentials, and there are none
            raise Refused("no access without credentials (`gcloud auth application-default login`)") from error
        except google.auth.exceptions.GoogleAuthError as error:
            raise Refused(
                f"the Google credentials do not work ({_line(error)}); `gcloud auth application-default login` renews "
                "them, public buckets need none"
            ) from error


# ------------------------------------------------------------------------------------------------------------- s3://


class S3Store:
    """An S3 bucket, signed where there are credentials, else anonymous. AWS_ENDPOINT_URL is honoured by boto3."""

    def __init__(self, bucket: str, connections: int):
        try:
            import boto3
            import botocore
            import botocore.config
        except ImportError:
            raise UserError(
                "s3:// needs the package boto3: install the `s3` extra (uv sync --extra s3, or pip install hvd[s3])"
            ) from None
        session = boto3.Session()
        signed = session.get_credentials() is not None
        config = botocore.config.Config(
            signature_version=None if signed else botocore.UNSIGNED,
            max_pool_connections=connections,
            retries={"total_max_attempts": 1},  # retries are ours
            connect_timeout=CONNECT_S,
            read_timeout=SILENCE_S,
            response_checksum_validation="when_required",  # ours is of the whole object
        )
        region = session.region_name or "us-east-1"  # S3 itself says where a bucket is; without any, boto3 refuses
        self._client: Any = session.client("s3", region_name=region, config=config)
        self._bucket = bucket

    def find(self, path: str) -> Object | None:
        try:
            with _s3_errors():
                found = self._client.head_object(Bucket=self._bucket, Key=path)
        except Refused:  # without the right to list, S3 says "forbidden" of what is not there: the listing decides
            return None
        return Object(path, int(found["ContentLength"]), found["ETag"])

    def below(self, prefix: str, limit: int | None = None) -> list[Object]:
        found: list[Object] = []
        with _s3_errors():
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=prefix, PaginationConfig={"MaxItems": limit}):
                found += [Object(x["Key"], int(x["Size"]), x["ETag"]) for x in page.get("Contents", ())]
        return found

    @contextlib.contextmanager
    def read(self, item: Object, start: int, stop: int) -> Iterator[Iterator[bytes]]:
        with _s3_errors():
            wanted = {"Bucket": self._bucket, "Key": item.key, "IfMatch": item.version}
            response = self._client.get_object(**wanted, Range=f"bytes={start}-{stop - 1}")
            with contextlib.closing(response["Body"]) as body:
                yield _chunks(body)

    def sums(self, item: Object) -> dict[str, str]:
        with _s3_errors():
            wanted = {"Bucket": self._bucket, "Key": item.key, "IfMatch": item.version}
            head = self._client.head_object(**wanted, ChecksumMode="ENABLED")
            found = {}
            for name in ("crc32c", "crc32", "sha256"):
                value = head.get(f"Checksum{name.upper()}", "")
                if value and "-" not in value:  # with a dash it is a checksum of the parts' checksums
                    raw = base64.b64decode(value)
                    found[name] = raw.hex() if name == "sha256" else str(int.from_bytes(raw, "big"))
            etag = item.version.strip('"')
            if head.get("ServerSideEncryption", "").startswith("aws:kms") or head.get("SSECustomerAlgorithm"):
                return found  # the ETag is no MD5 then
            if "-" not in etag:
                found["md5"] = etag
            elif not found:
                first = self._client.head_object(Bucket=self._bucket, Key=item.key, PartNumber=1)
                size, parts = int(first["ContentLength"]), int(etag.rpartition("-")[2])
                if 0 < size and -(-item.size // size) == parts:  # parts of one size, as every uploader makes them
                    found["etag"] = f"{size}:{etag}"
        return found

    def close(self) -> None:
        self._client.close()


@contextlib.contextmanager
def _s3_errors() -> Iterator[None]:
    import botocore.exceptions as errors

    with _network_errors():
        try:
            yield
        except errors.ClientError as error:
            about = error.response.get("ResponseMetadata", {})
            message = error.response.get("Error", {}).get("Message") or str(error)
            raise _status_error(
                int(about.get("HTTPStatusCode", 0)), message, about.get("HTTPHeaders", {}).get("retry-after")
            ) from error
        except (errors.NoCredentialsError, errors.PartialCredentialsError, errors.TokenRetrievalError) as error:
            raise Refused(f"the AWS credentials do not work ({_line(error)})") from error
        except errors.BotoCoreError as error:
            raise Busy(_line(error)) from error


# -------------------------------------------------------------------------------------------------------------- both


@contextlib.contextmanager
def _network_errors() -> Iterator[None]:
    import requests
    import urllib3

    try:
        yield
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        if getattr(error, "filename", None) is not None or isinstance(error, requests.exceptions.InvalidURL):
            raise  # not the network: a local file that the block writes, a mistake in an address
        raise Busy(_line(error)) from error


def _chunks(stream: Any) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK):
        yield chunk


def _status_error(code: int, message: str | None, retry_after: str | None = None) -> Exception:
    text = f"{code} {message or ''}".strip()
    if code in (401, 403):
        return Refused(f"no access ({text})")
    if code == 412:
        return Replaced(text)
    if code in (408, 409, 425, 429) or code >= 500:
        return Busy(text, float(retry_after) if retry_after and retry_after.isdigit() else 0.0)
    return Refused(text)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
