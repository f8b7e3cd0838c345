"""Objects of a bucket, read over the network: gs:// by google-cloud-storage, s3:// by boto3 (extra `s3`).

The packages transfer, in parts and in threads, and ask again. Both stores speak one small language: what lies below a
URL, an object into a file, and four ways to fail: `Refused` (no such thing, no access: asking again does not help),
`Busy` (429, 5xx, a cut connection, silence: ask again), `Replaced` (the object is not the one that was listed) and
`Damaged` (a wrong checksum).
"""

import base64
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hvd.errors import UserError
from hvd.storage import checksums

PART = 8 << 20  # bytes of one request: what a cut connection costs
THREADS = 16  # requests at once for a large object
TRIES = 7  # of one request
BACKOFF_S, LONGEST_S = 0.5, 20.0  # pauses between them
CONNECT_S, SILENCE_S = 15.0, 60.0  # a server that says nothing for so long is asked again

_SCHEMES = ("gs", "s3")


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


def open_store(location: Location) -> Store:
    """The location's bucket; UserError where a package is missing or the credentials are no credentials."""
    kind = GoogleStore if location.scheme == "gs" else S3Store
    return kind(location.bucket)


# ------------------------------------------------------------------------------------------------------------- gs://


class GoogleStore:
    """A Google Cloud Storage bucket, with application-default credentials where there are any, else anonymous.
    STORAGE_EMULATOR_HOST is honoured (and gets no credentials)."""

    def __init__(self, bucket: str):
        import google.auth
        import google.auth.exceptions
        import requests.adapters
        from google.auth.credentials import AnonymousCredentials
        from google.auth.transport.requests import AuthorizedSession
        from google.cloud import storage

        credentials: Any = AnonymousCredentials()
        if not os.environ.get("STORAGE_EMULATOR_HOST"):
            scope = "https://www.googleapis.com/auth/devstorage.read_only"
            try:
                credentials, _ = google.auth.default(scopes=[scope])
            except google.auth.exceptions.DefaultCredentialsError as error:
                if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
                    raise UserError(f"GOOGLE_APPLICATION_CREDENTIALS: {error}") from error
        session = AuthorizedSession(credentials)
        for scheme in ("https://", "http://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=4 * THREADS))
        self._client = storage.Client(project="<none>", credentials=credentials, _http=session)
        self._bucket: Any = self._client.bucket(bucket)

    def find(self, path: str) -> Object | None:
        with _google_errors():
            blob = self._bucket.get_blob(path, timeout=(CONNECT_S, SILENCE_S), retry=None)
            return None if blob is None else _google_object(blob)

    def below(self, prefix: str, limit: int | None = None) -> list[Object]:
        with _google_errors():
            fields = "items(name,size,generation,crc32c),nextPageToken"
            blobs = self._bucket.list_blobs(
                prefix=prefix, max_results=limit, fields=fields, timeout=(CONNECT_S, SILENCE_S), retry=None
            )
            return [_google_object(blob) for blob in blobs]

    def download(self, item: Object, path: Path, what: str, check_stop: Callable[[], None]) -> None:
        from google.cloud.storage import transfer_manager

        from hvd.storage.download import retried

        def patient(request: Callable[[], Any]) -> Callable[[], Any]:
            def once() -> Any:
                check_stop()
                with _google_errors():
                    return request()

            return lambda: retried(what, once)

        options = {
            "raw_download": True,  # the bytes as they are stored, which is what the checksum is of
            "single_shot_download": True,  # a part in one read: the package else reads 8 kB at a time, with the GIL
            "timeout": (CONNECT_S, SILENCE_S),
            "retry": patient,
        }
        blob = self._bucket.blob(item.key)
        # What is listed, and nothing else: the package would take an emulator's link, which leads past its proxy
        blob._set_properties({"size": str(item.size), "generation": item.version, "crc32c": item.crc32c})
        with _google_errors():
            transfer_manager.download_chunks_concurrently(
                blob,
                str(path),
                chunk_size=PART,
                download_kwargs=options,
                worker_type=transfer_manager.THREAD,
                max_workers=THREADS,
                crc32c_checksum=item.crc32c is not None,
            )

    def close(self) -> None:
        self._client.close()


def _google_object(blob: Any) -> Object:
    return Object(blob.name, int(blob.size or 0), str(blob.generation), blob.crc32c)


@contextlib.contextmanager
def _google_errors() -> Iterator[None]:
    import google.auth.exceptions
    from google.api_core.exceptions import GoogleAPICallError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    with _network_errors():
        try:
            yield
        except DataCorruption as error:
            raise Damaged(_line(error)) from error
        except InvalidResponse as error:
            status = int(error.response.status_code)
            error.response.close()
            raise Replaced(_line(error)) if status == 404 else _status_error(status, error.response.reason) from error
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

    def __init__(self, bucket: str):
        try:
            import boto3
            import boto3.s3.transfer
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
            max_pool_connections=4 * THREADS,
            retries={"total_max_attempts": TRIES},
            connect_timeout=CONNECT_S,
            read_timeout=SILENCE_S,
            response_checksum_validation="when_required",  # ours is of the whole object
        )
        self._transfer = boto3.s3.transfer.TransferConfig(
            multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=THREADS, num_download_attempts=TRIES
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

    def download(self, item: Object, path: Path, what: str, check_stop: Callable[[], None]) -> None:
        check_stop()
        with _s3_errors():
            self._client.download_file(
                self._bucket, item.key, str(path), Callback=lambda count: check_stop(), Config=self._transfer
            )
        if not checksums.matches(path, self.sums(item)):
            raise Damaged(item.key)

    def sums(self, item: Object) -> dict[str, str]:
        """Checksums of the whole object that the store gives: crc32c, crc32 (decimal), sha256, md5 (hexadecimal), and
        "etag" as "<part bytes>:<md5 of the parts' md5>-<parts>" for an object that was uploaded in parts."""
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
    import boto3.exceptions
    import botocore.exceptions as errors

    with _network_errors():
        try:
            yield
        except errors.ClientError as error:
            about = error.response.get("ResponseMetadata", {})
            message = error.response.get("Error", {}).get("Message") or str(error)
            raise _status_error(int(about.get("HTTPStatusCode", 0)), message) from error
        except (errors.NoCredentialsError, errors.PartialCredentialsError, errors.TokenRetrievalError) as error:
            raise Refused(f"the AWS credentials do not work ({_line(error)})") from error
        except (errors.BotoCoreError, boto3.exceptions.RetriesExceededError) as error:
            raise Busy(_line(error)) from error


# -------------------------------------------------------------------------------------------------------------- both


@contextlib.contextmanager
def _network_errors() -> Iterator[None]:
    import requests
    import urllib3

    try:
        yield
    except requests.exceptions.InvalidURL:
        raise
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, ConnectionError, TimeoutError) as error:
        raise Busy(_line(error)) from error


def _status_error(code: int, message: str | None) -> Exception:
    text = f"{code} {message or ''}".strip()
    if code in (401, 403):
        return Refused(f"no access ({text})")
    if code == 412:
        return Replaced(text)
    return Busy(text) if code in (408, 409, 425, 429) or code >= 500 else Refused(text)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
