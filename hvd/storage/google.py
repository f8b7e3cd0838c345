"""Objects of a Google Cloud Storage bucket, by google-cloud-storage."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hvd.errors import UserError
from hvd.storage import remote
from hvd.storage.remote import (
    Busy,
    Damaged,
    Object,
    Refused,
    Replaced,
    error_line,
    listing_errors,
    network_errors,
    retried,
    status_error,
)


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
            session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=4 * remote.THREADS))
        self._client = storage.Client(project="<none>", credentials=credentials, _http=session)
        self._bucket: Any = self._client.bucket(bucket)
        self._requests = threading.Semaphore(remote.THREADS)

    def find(self, path: str) -> Object | None:
        with _google_errors(), listing_errors():
            blob = self._bucket.get_blob(path, timeout=remote.timeouts(), retry=None)
            return None if blob is None else _google_object(blob)

    def below(self, prefix: str, limit: int | None = None) -> list[Object]:
        with _google_errors(), listing_errors():
            fields = "items(name,size,generation,crc32c),nextPageToken"
            blobs = self._bucket.list_blobs(
                prefix=prefix,
                max_results=limit,
                fields=fields,
                timeout=remote.timeouts(),
                retry=None,
            )
            return [_google_object(blob) for blob in blobs]

    def download(self, item: Object, path: Path, what: str, check_stop: Callable[[], None]) -> None:
        from google.cloud.storage import transfer_manager

        def patient(request: Callable[[], Any]) -> Callable[[], Any]:
            def once() -> Any:
                with self._requests, _google_errors():
                    check_stop()
                    return request()

            return lambda: retried(what, once)

        options = {
            "raw_download": True,  # the bytes as they are stored, which is what the checksum is of
            "single_shot_download": True,  # a part in one read: the package else reads 8 kB at a time, with the GIL
            "timeout": remote.timeouts(),
            "retry": patient,
        }
        blob = self._bucket.blob(item.key)
        # What is listed, and nothing else: the package would take an emulator's link, which leads past its proxy
        blob._set_properties({"size": str(item.size), "generation": item.version, "crc32c": item.crc32c})
        with _google_errors():
            transfer_manager.download_chunks_concurrently(
                blob,
                str(path),
                chunk_size=remote.PART,
                download_kwargs=options,
                worker_type=transfer_manager.THREAD,
                max_workers=remote.THREADS,
                crc32c_checksum=item.crc32c is not None,
            )

    def close(self) -> None:
        self._client.close()


def _google_object(blob: Any) -> Object:
    blob.name.encode()  # an error for what is no text
    return Object(blob.name, int(blob.size or 0), str(int(blob.generation)), blob.crc32c)


@contextlib.contextmanager
def _google_errors() -> Iterator[None]:
    import google.auth.exceptions
    from google.api_core.exceptions import GoogleAPICallError
    from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

    with network_errors():
        try:
            yield
        except DataCorruption as error:
            raise Damaged(error_line(error)) from error
        except InvalidResponse as error:
            status = int(error.response.status_code)
            error.response.close()
            raise (
                Replaced(error_line(error)) if status == 404 else status_error(status, error.response.reason)
            ) from error
        except GoogleAPICallError as error:
            raise status_error(int(error.code or 0), error.message) from error
        except google.auth.exceptions.TransportError as error:
            raise Busy(error_line(error)) from error
        except google.auth.exceptions.InvalidOperation as error:  # asked for credentials, and there are none
            raise Refused("no access without credentials (`gcloud auth application-default login`)") from error
        except google.auth.exceptions.GoogleAuthError as error:
            raise Refused(
                f"the Google credentials do not work ({error_line(error)}); `gcloud auth application-default login` "
                "renews them, public buckets need none"
            ) from error
