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
from hvd.storage import remote as storage_remote
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
PART = 1 << 18  # bytes that are downloaded at a time
FILES = {"params/a": noise(3 * MB, 1), "params/b": noise(2 * MB + 5, 2), "params/c/small": b"small"}
TOTAL = sum(map(len, FILES.values()))
PARAMS = {name.removeprefix("params/"): data for name, data in FILES.items()}

# `hvd` would do the same: errors as a line and an exit code
_FETCH = """
import sys
from hvd import cli
from hvd.storage import cache as storage
from hvd.storage import remote as storage_remote
storage_remote.PART = 1 << 17
cli.STEPS = {"fetch": cli.Step("fetching", "", own_flags=True)}
class Fetching:
    @staticmethod
    def main(argv):
        print("at", storage.fetch(argv[0], "policy.weight_loader"), flush=True)
sys.modules["fetching"] = Fetching
cli.command()
"""


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


def test_cut_connections(served):
    url, proxy = served
    proxy.fault = lambda request, n: Fault(cut_after=100_000) if n % 2 else None
    assert files_below(storage.fetch(url)) == PARAMS
    assert proxy.bytes_read < 3 * TOTAL, "a part that is cut comes again, and not its object"


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
    downloads_have_ended()
    before = proxy.bytes_read
    assert files_below(storage.fetch(url)) == PARAMS
    assert proxy.bytes_read - before < TOTAL, "the other objects are not fetched again"


def test_a_store_that_never_answers(served, cache, monkeypatch):
    url, proxy = served
    monkeypatch.setattr(storage_remote, "TRIES", 3)
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
    """kill -9 in the middle: the second process fetches the files that are not there, and no other."""
    url, proxy = served
    proxy.fault = lambda request, n: Fault(slow_s=5.0) if request.path.split("?")[0].endswith("b") else None
    killed = start(url)
    while not (kept := list(cache.rglob("*.partial/params/a"))):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not entries(cache) and storage.cached(url) is None
    assert kept[0].read_bytes() == PARAMS["a"], "a file has its name when it is whole"
    proxy.fault = lambda request, n: None
    time.sleep(1.0)  # answers to the dead process run out
    proxy.requests.clear()
    again = start(url)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert proxy.bytes_read <= TOTAL - len(PARAMS["a"])
    assert files_below(Path(out.split()[1])) == PARAMS, "and nothing that the killed one has left"


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
    errors = [line for line in done.stderr.splitlines() if line and "B/s]" not in line]  # the progress line
    assert len(errors) == 1 and errors[0].startswith("error: policy.weight_loader: "), done.stderr
    assert "no space left on the disk of" in errors[0] and "set HVD_CACHE" in errors[0], done.stderr
    assert "again failed" not in done.stdout and not (tmp_path / "believed").exists(), done.stdout
    (entry,) = entries(tmp_path / "copy")
    assert files_below(entry / "params") == PARAMS
