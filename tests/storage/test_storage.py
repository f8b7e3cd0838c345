"""hvd.storage against real storage servers on loopback: what comes, where it lies, when the network is asked."""

import fcntl
import gc
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from hvd.errors import UserError
from hvd.storage import cache as storage
from hvd.storage import checksums, download
from hvd.storage import remote as storage_remote
from hvd.storage.s3 import S3Store
from tests.storage.servers import (
    BUCKET,
    Fault,
    downloads_have_ended,
    files_below,
    google_put,
    google_server,
    noise,
    proxy_before,
    s3_client,
    s3_server,
)

FILES = {
    "params/_METADATA": b"{}",
    "params/d/large": noise(700_001),
    "params/d/empty": b"",
    "params/d/näme with %2F, spaces": b"name",
    "params-other": b"a neighbour whose name starts alike",
}
PARAMS = {name.removeprefix("params/"): data for name, data in FILES.items() if name.startswith("params/")}


PART = 100_000  # bytes that are downloaded at a time

# s3transfer leaves the sockets of a download that is stopped to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module", autouse=True)
def _its_sockets_end_here():
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def google_address():
    with google_server() as address:
        google_put(address, FILES)
        yield address


@pytest.fixture
def google(google_address, monkeypatch):
    with proxy_before(*google_address) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.address)
        yield proxy


@pytest.fixture(scope="module")
def s3_address():
    with s3_server() as address:
        client = s3_client(address)
        for name, data in FILES.items():
            client.put_object(Bucket=BUCKET, Key=name, Body=data, ACL="public-read")
        client.put_object(Bucket=BUCKET, Key="params/", Body=b"")  # a folder as consoles make one
        yield address


@pytest.fixture
def s3(s3_address, monkeypatch):
    with proxy_before(*s3_address) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        yield proxy


@pytest.fixture(params=["gs", "s3"])
def served(request):
    """(URL of the bucket, proxy before its server)."""
    return f"{request.param}://{BUCKET}", request.getfixturevalue({"gs": "google", "s3": "s3"}[request.param])


def test_a_folder(served, cache, capfd):
    bucket, proxy = served
    folder = storage.fetch(f"{bucket}/params/")
    assert folder.name == "params" and folder.is_relative_to(cache / bucket.replace("://", "/"))
    assert files_below(folder) == PARAMS
    assert len([r for r in proxy.reads if "large" in r.path]) == 8, "in ranges"
    assert proxy.bytes_read == sum(map(len, PARAMS.values()))
    said = capfd.readouterr().err
    assert f"{bucket}/params: 100%" in said and "700k/700k" in said
    assert {p.name for p in folder.parent.iterdir()} == {"params", ".manifest.json"}
    assert [p.name for p in folder.parent.parent.iterdir()] == [folder.parent.name], "no lock, no part is left"

    asked = len(proxy.requests)
    stale = folder.parent.parent / f".{folder.parent.name}.lock"
    stale.touch()  # of a process that was killed in the last moment
    assert storage.fetch(f"{bucket}/params") == folder == storage.cached(f"{bucket}/params")
    storage.check(f"{bucket}/params")
    assert not stale.exists()
    assert len(proxy.requests) == asked, "what is there is used without the network"


def test_a_file(served):
    bucket, _ = served
    assert storage.cached(f"{bucket}/params/d/large") is None
    assert storage.fetch(f"{bucket}/params/d/large").read_bytes() == FILES["params/d/large"]
    assert storage.fetch(f"{bucket}/params/d/empty").read_bytes() == b""
    assert files_below(storage.fetch(f"{bucket}/params")) == PARAMS, "a URL above one that is cached"


def test_nothing_there(served, cache):
    bucket, _ = served
    for url in (f"{bucket}/nowhere", f"{bucket}/param", f"{bucket.partition('://')[0]}://no-bucket/x"):
        for ask in (storage.check, storage.fetch):
            with pytest.raises(UserError, match=rf"^policy.weight_loader {url}: .+") as error:
                ask(url, "policy.weight_loader")
            assert len(str(error.value).splitlines()) == 1
    assert not list(cache.rglob("*")) or not [p for p in cache.rglob("*") if p.is_file()]
    storage.check(f"{bucket}/params")


def test_no_access(served):
    bucket, proxy = served
    proxy.fault = lambda request, n: Fault(status=403)
    with pytest.raises(UserError, match=r"params/.+: no access \(403"):
        storage.fetch(f"{bucket}/params")


def test_offline(served, monkeypatch):
    bucket, proxy = served
    folder = storage.fetch(f"{bucket}/params")
    monkeypatch.setenv("HVD_OFFLINE", "1")
    asked = len(proxy.requests)
    assert storage.fetch(f"{bucket}/params") == folder
    for ask in (storage.check, storage.fetch):
        with pytest.raises(UserError, match=r"params/_METADATA: HVD_OFFLINE is set and the cache .* does not hold it"):
            ask(f"{bucket}/params/_METADATA")
    assert len(proxy.requests) == asked


def test_an_entry_that_lost_a_file_is_fetched_again(served):
    bucket, _ = served
    folder = storage.fetch(f"{bucket}/params")
    (folder / "d" / "large").unlink()
    assert storage.cached(f"{bucket}/params") is None
    assert files_below(storage.fetch(f"{bucket}/params")) == PARAMS


def test_a_changed_object_is_never_mixed_with_its_past(s3_address, s3, cache):
    """Half of the first version is on disk when the second one comes."""
    client = s3_client(s3_address)
    client.put_object(Bucket=BUCKET, Key="changing", Body=noise(500_000, 1))
    s3.fault = lambda request, n: Fault(status=404) if n == 3 else None
    with pytest.raises(UserError, match="404"):
        storage.fetch(f"s3://{BUCKET}/changing")
    client.put_object(Bucket=BUCKET, Key="changing", Body=noise(500_000, 2))
    assert storage.fetch(f"s3://{BUCKET}/changing").read_bytes() == noise(500_000, 2)
    assert not list(cache.rglob("*.partial")), "the old half is deleted"


def four_at_once(url):
    with ThreadPoolExecutor(4) as pool:
        return {future.result() for future in [pool.submit(storage.fetch, url) for _ in range(4)]}


def test_threads_of_one_process_share_one_download(served):
    bucket, proxy = served
    assert len(four_at_once(f"{bucket}/params")) == 1
    assert proxy.bytes_read == sum(map(len, PARAMS.values()))


def test_two_nodes_without_a_common_lock(served, monkeypatch):
    """Both fill the same folder at the same time; the first rename wins, and both get the same whole folder."""
    bucket, _ = served

    def broken(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", broken)
    (folder,) = four_at_once(f"{bucket}/params")
    assert files_below(folder) == PARAMS


def test_all_objects_together_have_so_many_requests_at_once(served, monkeypatch):
    bucket, proxy = served
    monkeypatch.setattr(storage_remote, "THREADS", 3)
    open_now: list[int] = []
    proxy.fault = lambda _, n: open_now.append(sum(not r.ended for r in proxy.reads)) or Fault(slow_s=0.1)
    assert files_below(storage.fetch(f"{bucket}/params")) == PARAMS
    assert max(open_now) == 3


def test_another_nodes_temporary_file_gets_its_name_after_it_was_listed(served, monkeypatch):
    bucket, _ = served
    listed = download._files
    monkeypatch.setattr(download, "_files", lambda folder: [folder / "params" / "a.1.tmp", *listed(folder)])
    assert files_below(storage.fetch(f"{bucket}/params")) == PARAMS


def test_another_node_renames_the_folder_in_the_moment_it_is_made(served, monkeypatch):
    """pathlib's mkdir(exist_ok=True) raises FileExistsError then."""
    bucket, _ = served
    location = storage.parse(f"{bucket}/params", "")
    download, entry = storage.download, storage._entry(location)

    def first(store, objects, folder, *more):
        download(store, objects, folder, *more)
        storage._publish(folder, entry, location, objects)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(storage, "download", first)
    assert files_below(storage.fetch(f"{bucket}/params")) == PARAMS


def test_stopping_is_a_pause(served):
    bucket, proxy = served

    def poll():
        if proxy.bytes_read > 200_000:
            raise KeyboardInterrupt

    proxy.fault = lambda request, n: Fault(slow_s=0.4)
    with pytest.raises(KeyboardInterrupt):
        storage.fetch(f"{bucket}/params", poll=poll)
    downloads_have_ended()
    proxy.fault = lambda request, n: None
    assert files_below(storage.fetch(f"{bucket}/params")) == PARAMS
    assert proxy.bytes_read < 2 * sum(map(len, PARAMS.values()))


def test_credentials_are_asked_for(google):
    """A private bucket answers 401 to an anonymous request."""
    google.fault = lambda request, n: Fault(status=401)
    with pytest.raises(UserError, match=r"no access (\(401|without credentials)"):
        storage.fetch(f"gs://{BUCKET}/params")


@pytest.mark.parametrize("name", ["up/../../out", "up//etc/passwd", "up/a\\b"])
def test_an_object_that_would_lie_outside_is_refused(name, s3_address, s3, cache):
    client = s3_client(s3_address)
    client.put_object(Bucket=BUCKET, Key=name, Body=b"evil")
    try:
        with pytest.raises(UserError, match=r"which would lie outside of the folder"):
            storage.fetch(f"s3://{BUCKET}/up")
        assert not [p for p in cache.rglob("*") if p.is_file()]
    finally:
        client.delete_object(Bucket=BUCKET, Key=name)


def test_checksums_that_s3_has(s3_address, s3):
    """An upload in parts has an ETag of its own kind; with a checksum algorithm the object has that too."""
    client = s3_client(s3_address)
    data = noise(11 << 20, 3)
    upload = client.create_multipart_upload(Bucket=BUCKET, Key="in-parts")
    parts = []
    for i in range(3):
        piece = data[i * (5 << 20) : (i + 1) * (5 << 20)]
        where = {"Bucket": BUCKET, "Key": "in-parts", "UploadId": upload["UploadId"], "PartNumber": i + 1}
        parts.append({"PartNumber": i + 1, "ETag": client.upload_part(Body=piece, **where)["ETag"]})
    client.complete_multipart_upload(
        Bucket=BUCKET, Key="in-parts", UploadId=upload["UploadId"], MultipartUpload={"Parts": parts}
    )
    client.put_object(Bucket=BUCKET, Key="summed", Body=data, ChecksumAlgorithm="SHA256")
    store = S3Store(BUCKET)
    for key in ("in-parts", "summed"):
        item = store.find(key)
        assert item is not None
        sums = store.sums(item)
        path = storage.fetch(f"s3://{BUCKET}/{key}")
        assert path.read_bytes() == data
        assert checksums.matches(path, sums) and sums, key
        path.write_bytes(data[:-1] + b"x")
        assert not checksums.matches(path, sums), (key, sums)
    store.close()


def test_s3_without_credentials_is_anonymous(s3, monkeypatch, tmp_path):
    import botocore

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = S3Store(BUCKET)
    assert store._client.meta.config.signature_version is botocore.UNSIGNED
    store.close()
    assert files_below(storage.fetch(f"s3://{BUCKET}/params")) == PARAMS


def test_s3_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UserError, match=r"^value.weight_loader: s3:// needs the package boto3: install the `s3` extra"):
        storage.fetch(f"s3://{BUCKET}/params", "value.weight_loader")


def test_openpis_assets_moved_to_google():
    old, new = (
        storage_remote.parse(f"{scheme}://openpi-assets/checkpoints/pi0_base/params") for scheme in ("s3", "gs")
    )
    assert old == new and old.scheme == "gs"
    assert storage_remote.parse("s3://mine/openpi-assets/x").scheme == "s3"


@pytest.mark.parametrize(
    "url", ["http://a/b", "gs://bucket", "gs:///x", "s3://bucket/", "gs://b/a/../c", "gs://b/a//c"]
)
def test_urls_that_are_none(url):
    with pytest.raises(UserError, match=r"value.weight_loader \S+: (no|hvd fetches)"):
        storage.fetch(url, "value.weight_loader")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("HVD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert storage.cache_root() == tmp_path / "xdg" / "hvd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.cache_root() == tmp_path / ".cache" / "hvd"


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path, google):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HVD_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file.*set HVD_CACHE"):
        storage.fetch(f"gs://{BUCKET}/params")


@pytest.mark.parametrize(
    "sums",
    [
        {"crc32c": str(0xE3069283)},  # of RFC 3720
        {"crc32": str(0xCBF43926)},
        {"md5": "25f9e794323b453885f5181f1b624d0b"},
        {"sha256": "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225"},
    ],
)
def test_checksums(tmp_path, sums):
    path = tmp_path / "digits"
    path.write_bytes(b"123456789")
    assert checksums.matches(path, sums)
    path.write_bytes(b"123456788")
    assert not checksums.matches(path, sums)
