"""Objects of an S3 bucket, by boto3 (extra `s3`)."""

import base64
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hvd.errors import UserError
from hvd.storage import checksums, remote
from hvd.storage.remote import Busy, Damaged, Object, Refused, error_line, listing_errors, network_errors, status_error


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
            max_pool_connections=4 * remote.THREADS,
            retries={"total_max_attempts": remote.TRIES},
            connect_timeout=remote.CONNECT_S,
            read_timeout=remote.SILENCE_S,
            response_checksum_validation="when_required",  # ours is of the whole object
        )
        parts = boto3.s3.transfer.TransferConfig(
            multipart_threshold=remote.PART,
            multipart_chunksize=remote.PART,
            max_concurrency=remote.THREADS,
            num_download_attempts=remote.TRIES,
        )
        region = session.region_name or "us-east-1"  # S3 itself says where a bucket is; without any, boto3 refuses
        self._client: Any = session.client("s3", region_name=region, config=config)
        self._transfer = boto3.s3.transfer.S3Transfer(self._client, parts)  # its threads serve all objects
        self._bucket = bucket

    def find(self, path: str) -> Object | None:
        try:
            with _s3_errors(), listing_errors():
                found = self._client.head_object(Bucket=self._bucket, Key=path)
                return Object(path, int(found["ContentLength"]), found["ETag"])
        except Refused:  # without the right to list, S3 says "forbidden" of what is not there: the listing decides
            return None

    def below(self, prefix: str, limit: int | None = None) -> list[Object]:
        found: list[Object] = []
        with _s3_errors(), listing_errors():
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=prefix, PaginationConfig={"MaxItems": limit}):
                found += [Object(x["Key"], int(x["Size"]), x["ETag"]) for x in page.get("Contents", ())]
        return found

    def download(self, item: Object, path: Path, what: str, check_stop: Callable[[], None]) -> None:
        check_stop()
        with _s3_errors():
            self._transfer.download_file(self._bucket, item.key, str(path), callback=lambda count: check_stop())
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
        self._transfer.__exit__(None, None, None)  # ends its threads
        self._client.close()


@contextlib.contextmanager
def _s3_errors() -> Iterator[None]:
    import boto3.exceptions
    import botocore.exceptions as errors

    with network_errors():
        try:
            yield
        except errors.ClientError as error:
            about = error.response.get("ResponseMetadata", {})
            message = error.response.get("Error", {}).get("Message") or str(error)
            raise status_error(int(about.get("HTTPStatusCode", 0)), message) from error
        except (errors.NoCredentialsError, errors.PartialCredentialsError, errors.TokenRetrievalError) as error:
            raise Refused(f"the AWS credentials do not work ({error_line(error)})") from error
        except (errors.BotoCoreError, boto3.exceptions.RetriesExceededError) as error:
            raise Busy(error_line(error)) from error
