"""gs:// and s3:// files and folders as local paths: fetched once into a cache that everybody on the node shares.

    <cache>/gs/BUCKET/NAME-<hash of the URL>/      one entry, there only when it is whole
        NAME or NAME/...                           the file, or the folder with its files
        .manifest.json                             what it is: URL, objects, sizes, versions
    <cache>/gs/BUCKET/.NAME-<hash>-<hash of the listing>.partial/     a download that goes on, or can be gone on with

<cache> is $HVD_CACHE, else $XDG_CACHE_HOME/hvd, else ~/.cache/hvd. An entry that is there is used without asking the
network; HVD_OFFLINE=1 never asks it. Imports no jax.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import msgspec

from hvd import documents
from hvd.errors import Failed, UserError
from hvd.files import disk_errors, locked, write_atomic
from hvd.storage.download import download, received
from hvd.storage.remote import Busy, Location, Object, Refused, Store, is_url, parse, retried

__all__ = ["cache_root", "cached", "check", "fetch", "is_url", "offline"]

PALIGEMMA_TOKENIZER = "gs://big_vision/paligemma_tokenizer.model"  # public, 4 MB
TOKENIZER_ADVICE = "or bring that file here yourself and name it: --model.tokenizer_path FILE"
MANIFEST = ".manifest.json"
_ADVICE = "free some or set HVD_CACHE to a folder with room that can be written; the same command then goes on"
_WAIT_S, _SAY_S = 0.1, 15.0  # how often a waiting process looks, and says so


def cache_root() -> Path:
    """$HVD_CACHE, else $XDG_CACHE_HOME/hvd, else ~/.cache/hvd."""
    if os.environ.get("HVD_CACHE"):
        return Path(os.environ["HVD_CACHE"]).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "hvd"


def offline() -> bool:
    """HVD_OFFLINE is set (to anything but 0, false, no or nothing)."""
    return os.environ.get("HVD_OFFLINE", "").lower() not in ("", "0", "false", "no")


def cached(url: str, field: str = "") -> Path | None:
    """The local path of a URL whose entry is whole; None where there is none. Asks no network."""
    location = parse(url, field)
    entry = _entry(location)
    return entry / location.name if _whole(entry) else None


def check(url: str, field: str = "") -> None:
    """Raise UserError where `fetch` is sure to: no such thing, no access, offline. One small request at most.

    A network that does not answer now is not the URL's fault and is no error here.
    """
    if cached(url, field) is not None:
        return
    location = parse(url, field)
    with _as_user(url, field):
        _refuse_offline(location)
        with contextlib.suppress(Busy), contextlib.closing(open_store(location)) as store:
            if store.find(location.path) is None and not store.below(location.path + "/", limit=1):
                raise Refused("there is nothing")


class _File(msgspec.Struct):
    bytes: int


class _Manifest(msgspec.Struct):
    files: dict[str, _File]


def fetch(url: str, field: str = "", poll: Callable[[], None] = lambda: None) -> Path:
    """The local path of a file, or of all that lies below a folder, of gs:// or s3://; fetched if it is not cached.

    Several processes may ask at once: of a node one downloads and the others wait; between nodes that share the cache
    without locks, the first to finish wins. A download that was killed is gone on with.

    Args:
        url: gs://BUCKET/PATH or s3://BUCKET/PATH.
        field: the config field that asks, for messages.
        poll: called several times a second; what it raises ends the download, which can be gone on with.

    Raises:
        UserError: nothing there, no access, offline, no room, an object's name that leads out of the folder.
        Failed: the network does not answer, or what comes has a wrong checksum, again and again.
    """
    location = parse(url, field)
    entry = _entry(location)
    if not _whole(entry):
        with _as_user(url, field):
            _refuse_offline(location)
            _fetch(location, entry, poll)
    with contextlib.suppress(OSError):  # of a process that was killed when the entry was there already
        _lock(entry).unlink(missing_ok=True)
    return entry / location.name


def _fetch(location: Location, entry: Path, poll: Callable[[], None]) -> None:
    lock = _lock(entry)
    # On a network file system other nodes may not see the lock, or there is none: `_publish` is right without it
    with disk_errors(entry.parent, _ADVICE), locked(lock, _waiting(entry, location.url, poll)):
        if _whole(entry):
            return
        with contextlib.closing(open_store(location)) as store:
            objects = retried(location.url, lambda: _objects(store, location))
            folder = _partial(entry, objects)
            try:
                folder.mkdir(exist_ok=True)
                download(store, objects, folder, location.url, poll)
                _publish(folder, entry, location, objects)
            except (FileNotFoundError, FileExistsError):  # the latter of mkdir, where a folder goes in the same moment
                if not _whole(entry):  # else another node, whose lock cannot be seen here, has finished it meanwhile
                    raise


def _lock(entry: Path) -> Path:
    return entry.parent / f".{entry.name}.lock"


def _publish(folder: Path, entry: Path, location: Location, objects: dict[str, Object]) -> None:
    """The finished folder becomes the entry, by one rename."""
    files = {name: {"bytes": item.size, "version": item.version} for name, item in objects.items()}
    manifest = {"url": location.url, "bytes": sum(item.size for item in objects.values()), "files": files}
    write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1))
    if entry.exists() and not _whole(entry):
        shutil.rmtree(entry)  # somebody has taken files out of it
    try:
        os.rename(folder, entry)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not _whole(entry):
            raise
        shutil.rmtree(folder, ignore_errors=True)  # another node was first
    for path in entry.rglob("*"):  # temporary files of killed processes, and of another node that does the same
        if path.is_file() and path.relative_to(entry).as_posix() not in (MANIFEST, *files):
            path.unlink(missing_ok=True)
    for old in entry.parent.glob(f".{entry.name}-*.partial"):  # of a listing that is no longer true
        shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):  # the rename itself onto the disk, where the file system can
        descriptor = os.open(entry.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _objects(store: Store, location: Location) -> dict[str, Object]:
    """File below the entry -> object: the one that the URL names, or those below it."""
    found = store.find(location.path)
    if found is not None:
        return {location.name: found}
    prefix = location.path + "/"
    objects: dict[str, Object] = {}
    for item in store.below(prefix):
        if item.key.endswith("/") and not item.size:
            continue  # how folders without files are written down
        name = item.key.removeprefix(prefix)
        if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name or "\\" in name:
            raise Refused(f"it holds an object named {item.key!r}, which would lie outside of the folder")
        objects[f"{location.name}/{name}"] = item
    if not objects:
        raise Refused("there is nothing")
    for name in objects:
        for parent in PurePosixPath(name).parents:
            if str(parent) in objects:
                raise Refused(f"it holds {parent} as a file and as a folder")
    return objects


def _entry(location: Location) -> Path:
    # a hash, because one URL may lie below another, and names may be as long as they like
    digest = hashlib.sha256(location.url.encode()).hexdigest()[:12]
    return cache_root() / location.scheme / location.bucket / f"{location.name[:64]}-{digest}"


def _partial(entry: Path, objects: dict[str, Object]) -> Path:
    """The download of exactly these versions: parts of others are never mixed in."""
    listing = "".join(f"{name} {item.size} {item.version}\n" for name, item in sorted(objects.items()))
    return entry.parent / f".{entry.name}-{hashlib.sha256(listing.encode()).hexdigest()[:12]}.partial"


def _whole(entry: Path) -> bool:
    try:
        files = documents.read(entry / MANIFEST, _Manifest).files
        return bool(files) and all((entry / name).stat().st_size == about.bytes for name, about in files.items())
    except (OSError, UserError, ValueError):
        return False


def _refuse_offline(location: Location) -> None:
    if offline():
        raise Refused(f"HVD_OFFLINE is set and the cache {cache_root()} does not hold it")


@contextlib.contextmanager
def _as_user(url: str, field: str) -> Iterator[None]:
    """What the store refuses as a line that names the config's field."""
    where = f"{field} {url}".strip()
    try:
        yield
    except Refused as error:
        raise UserError(f"{where}: {error}") from error
    except UserError as error:
        raise UserError(f"{field}: {error}" if field else str(error)) from error
    except Failed as error:
        raise Failed(f"{field}: {error}" if field else str(error)) from error


def _waiting(entry: Path, url: str, poll: Callable[[], None]) -> Callable[[], None]:
    """What a process does while another one of the node downloads: poll, and say now and then how far that one is."""
    said = time.monotonic()

    def wait() -> None:
        nonlocal said
        poll()
        if time.monotonic() - said > _SAY_S:
            said = time.monotonic()
            with contextlib.suppress(OSError):
                so_far = max((received(path) for path in entry.parent.glob(f".{entry.name}-*.partial")), default=0)
                print(f"{url}: another process fetches it, {so_far / 1e9:.3g} GB so far", flush=True)
        time.sleep(_WAIT_S)

    return wait


def open_store(location: Location) -> Store:
    """The location's bucket; UserError where a package is missing or the credentials are no credentials."""
    if location.scheme == "gs":
        from hvd.storage.google import GoogleStore

        return GoogleStore(location.bucket)
    from hvd.storage.s3 import S3Store

    return S3Store(location.bucket)
