"""Downloads through bad networks, full disks and kills: right in the end or one clear line; nothing comes twice."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvd.errors import Failed
from hvd.storage import cache as storage
from hvd.storage import checksums as storage_checksums
from hvd.storage import download as storage_download
from hvd.storage import progress as storage_progress
from tests.folders import ROOT
from tests.small_disk import IN_NAMESPACE, need_small_disk
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

MB = 1 << 20
FILES = {"params/a": noise(3 * MB, 1), "params/b": noise(2 * MB + 5, 2), "params/c/small": b"small"}
TOTAL = sum(map(len, FILES.values()))
PARAMS = {name.removeprefix("params/"): data for name, data in FILES.items()}

# `hvd` would do the same: errors as a line and an exit code
_FETCH = """
import sys
from hvd import cli
from hvd.storage import cache as storage
from hvd.storage import download as storage_download
storage_download.PART = 1 << 17
cli.STEPS = {"fetch": cli.Step("fetching", "", own_flags=True)}
class Fetching:
    @staticmethod
    def main(argv):
        print("at", storage.fetch(argv[0], "policy.weight_loader"), flush=True)
sys.modules["fetching"] = Fetching
cli.command()
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    for name in ("HVD_OFFLINE", "GOOGLE_APPLICATION_CREDENTIALS", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("HVD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage_download, "PART", 1 << 18)
    monkeypatch.setattr(storage_download, "BACKOFF_S", 0.01)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def servers():
    with google_server() as google, s3_server() as s3:
        google_put(google, FILES)
        for name, data in FILES.items():
            s3_client(s3).put_object(Bucket=BUCKET, Key=name, Body=data)
        yield {"gs": google, "s3": s3}


@pytest.fixture(params=["gs", "s3"])
def served(request, servers, monkeypatch):
    """(URL of the folder, proxy before its server)."""
    with proxy_before(*servers[request.param]) as proxy:
        monkeypatch.setenv({"gs": "STORAGE_EMULATOR_HOST", "s3": "AWS_ENDPOINT_URL"}[request.param], proxy.address)
        yield f"{request.param}://{BUCKET}/params", proxy


@pytest.fixture
def google(servers, monkeypatch):
    with proxy_before(*servers["gs"]) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.address)
        yield f"gs://{BUCKET}/params", proxy


def start(url: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", _FETCH, "fetch", url]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def entries(cache: Path) -> list[Path]:
    return [p.parent for p in cache.rglob(storage.MANIFEST)]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_store(served, status):
    url, proxy = served
    proxy.fault = lambda request, n: Fault(status=status) if n % 3 == 1 else None
    assert files_below(storage.fetch(url)) == PARAMS
    assert proxy.bytes_read == TOTAL and any(not r.sent for r in proxy.reads)


def test_cut_connections_cost_no_byte_twice(served):
    url, proxy = served
    proxy.fault = lambda request, n: Fault(cut_after=100_000) if n % 2 else None
    assert files_below(storage.fetch(url)) == PARAMS
    assert TOTAL <= proxy.bytes_read < 1.3 * TOTAL, "a cut part goes on at the byte where it was cut"
    assert len(proxy.reads) > 30


def test_a_wrong_byte_is_fetched_again(served):
    url, proxy = served
    proxy.fault = lambda request, n: Fault(flip=True) if n == 2 else None
    assert files_below(storage.fetch(url)) == PARAMS
    assert TOTAL < proxy.bytes_read <= TOTAL + 3 * MB, "one object once more, and no other"


def test_bytes_that_stay_wrong(served, cache):
    url, proxy = served
    proxy.fault = lambda request, n: Fault(flip=True) if request.path.split("?")[0].endswith("b") else None
    with pytest.raises(Failed, match=r"params: params/b has a wrong checksum, 3 times in a row") as error:
        storage.fetch(url)
    assert len(str(error.value).splitlines()) == 1 and not entries(cache)
    proxy.fault = lambda request, n: None
    before = proxy.bytes_read
    assert files_below(storage.fetch(url)) == PARAMS
    assert proxy.bytes_read - before < TOTAL, "the other objects are not fetched again"


def test_a_store_that_never_answers(served, cache, monkeypatch):
    url, proxy = served
    monkeypatch.setattr(storage_download, "TRIES", 3)
    proxy.fault = lambda request, n: Fault(status=503)
    with pytest.raises(Failed, match=r"the store does not answer .*; the same command goes on where it stopped"):
        storage.fetch(url)
    assert not entries(cache)


def test_nobody_listens(monkeypatch, cache):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    storage.check("gs://bucket/x")  # a network that is down is not the URL's mistake
    with pytest.raises(Failed, match=r"gs://bucket/x: the store does not answer"):
        storage.fetch("gs://bucket/x", "value.weight_loader")


def test_a_silent_server_is_asked_again(google, monkeypatch):
    from hvd.storage import remote as storage_remote

    url, proxy = google
    monkeypatch.setattr(storage_remote, "SILENCE_S", 0.3)
    proxy.fault = lambda request, n: Fault(slow_s=5.0) if n in (0, 4) else None
    begin = time.monotonic()
    assert files_below(storage.fetch(url)) == PARAMS
    assert time.monotonic() - begin < 15.0, "an answer of 20 s was not waited for"


def test_a_killed_download_goes_on(served, cache):
    """kill -9 in the middle: the second process fetches what is missing, and not more than the parts in flight."""
    url, proxy = served
    proxy.fault = lambda request, n: Fault(slow_s=0.2 if n > 10 else 0.0)
    killed = start(url)
    while sum(map(storage_download.received, cache.rglob("*.partial"))) < TOTAL // 3:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not entries(cache) and storage.cached(url) is None
    (partial,) = cache.rglob("*.partial")
    kept = storage_download.received(partial)
    assert TOTAL // 3 <= kept < TOTAL
    proxy.fault = lambda request, n: None
    time.sleep(1.0)  # answers to the dead process run out
    proxy.requests.clear()
    again = start(url)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert proxy.bytes_read == TOTAL - kept
    assert f"{storage_progress.size(kept)} of it were here already" in err
    assert files_below(Path(out.split()[1])) == PARAMS


def test_parts_on_disk_are_not_believed(google, cache):
    """What lies on disk is read and compared: a part that was damaged, and a torn line, are fetched again."""
    url, proxy = google

    def poll():
        if proxy.bytes_read > TOTAL // 2:
            raise KeyboardInterrupt

    proxy.fault = lambda request, n: Fault(slow_s=0.02)
    with pytest.raises(KeyboardInterrupt):
        storage.fetch(url, poll=poll)
    downloads_have_ended()
    (partial,) = cache.rglob("*.partial")
    known = list(storage_download._journalled(partial))
    damaged, crc = known[0]
    with (partial / damaged.name).open("r+b") as file:
        file.seek(damaged.start)
        file.write(b"\0" * 10)
    assert storage_checksums.crc32c_of(partial / damaged.name, damaged.start, damaged.stop) != crc
    (journal,) = (partial / storage_download.JOURNAL).iterdir()
    with journal.open("ab") as file:
        file.write(b'["params/a", 0, 2621')
    proxy.fault = lambda request, n: None
    proxy.requests.clear()
    assert files_below(storage.fetch(url)) == PARAMS
    assert proxy.bytes_read == TOTAL - sum(r.stop - r.start for r, _ in known) + (damaged.stop - damaged.start)


def test_two_processes_download_once(served):
    url, proxy = served
    proxy.fault = lambda request, n: Fault(slow_s=0.02)
    both = [start(url) for _ in range(2)]
    found = {process: process.communicate(timeout=120) for process in both}
    assert [process.returncode for process in both] == [0, 0], found
    assert len({out for out, _ in found.values()}) == 1
    assert proxy.bytes_read == TOTAL
    assert files_below(Path(next(iter(found.values()))[0].split()[1])) == PARAMS


def test_the_one_who_waits_takes_over(google):
    """The owner of the lock is killed while another process waits for it."""
    url, proxy = google
    proxy.fault = lambda request, n: Fault(slow_s=0.3)
    owner = start(url)
    while proxy.bytes_read < TOTAL // 4:
        assert owner.poll() is None, owner.communicate()
        time.sleep(0.01)
    waiting = start(url)
    time.sleep(1.0)
    proxy.fault = lambda request, n: None
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    out, err = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, err
    assert files_below(Path(out.split()[1])) == PARAMS


@pytest.mark.parametrize("announced", [True, False])
def test_no_space(google, tmp_path, announced):
    """A disk of 4 MB for 5 MB: one line, exit code 2, no entry; with more room the same command goes on.

    Without `announced` the free space is asked before somebody else takes it: writing itself fails.
    """
    need_small_disk()
    url, _ = google
    disk = tmp_path / "disk"
    disk.mkdir()
    code = _FETCH
    if not announced:
        code = code.replace(
            "cli.command()",
            "import shutil\nclass Free:\n    free = 1 << 40\nshutil.disk_usage = lambda path: Free\ncli.command()",
        )
    line = shlex.join([sys.executable, "-c", code, "fetch", url])
    script = f"""
        ip link set lo up 2>/dev/null
        mount -t tmpfs -o size=4096k tmpfs {disk}
        {line}; code=$?
        find {disk} -name {storage.MANIFEST} | grep -q . && touch {tmp_path}/believed
        mount -o remount,size=100m {disk}
        {line} >{tmp_path}/second.out 2>{tmp_path}/second.err || echo again failed
        cp -r {disk} {tmp_path}/copy
        exit $code
    """
    environment = os.environ | {"HVD_CACHE": str(disk / "cache")}
    done = subprocess.run(
        [*IN_NAMESPACE, "sh", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr + done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: policy.weight_loader: "), done.stderr
    assert "no space left on the disk of" in errors[0] and "set HVD_CACHE" in errors[0], done.stderr
    assert "again failed" not in done.stdout and not (tmp_path / "believed").exists(), done.stdout
    (entry,) = entries(tmp_path / "copy")
    assert files_below(entry / "params") == PARAMS


def test_progress(monkeypatch, capfd):
    clock = iter([0.0, 20.0, 40.0, 41.0, 50.0])
    monkeypatch.setattr(storage_progress.time, "monotonic", lambda: next(clock))
    with storage_progress.Progress("gs://b/x", 3_000_000_000) as progress:
        progress.add(1_000_000_000)
        progress.add(1_000_000_000)
        progress.add(500_000_000, fetched=False)
    assert capfd.readouterr().err.splitlines() == [
        "gs://b/x: 1 GB of 3 GB, 50 MB/s, 40 s left",
        "gs://b/x: 2 GB of 3 GB, 50 MB/s, 20 s left",
        "gs://b/x: 3 GB in 50.0 s (40 MB/s); 1 GB of it were here already",
    ]
