"""The cache: whole or nothing, one maker at a time, and a full disk is said in one line."""

import errno
import multiprocessing
import threading
import time

import pytest

from hvd.data import cache
from hvd.data.cache import cached, replacing
from hvd.errors import UserError


def test_made_once_by_many(tmp_path):
    made = []

    def make(path):
        made.append(path)
        time.sleep(0.05)
        path.write_text("whole")

    threads = [threading.Thread(target=cached, args=(tmp_path / "c/x", make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and [p.name for p in (tmp_path / "c").iterdir()] == ["x"]


def _slow_make(folder):
    def make(path):
        (folder / "begun").touch()
        time.sleep(60)

    cached(folder / "c/x", make)


def test_a_killed_maker_leaves_the_lock_free(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_slow_make, args=(tmp_path,))
    process.start()
    while not (tmp_path / "begun").exists():
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    assert cached(tmp_path / "c/x", lambda path: path.write_text("whole") and None).read_text() == "whole"


def test_failure_leaves_nothing(tmp_path):
    def fails(path):
        path.mkdir()
        (path / "half").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached(tmp_path / "c/x", fails)
    assert not list(tmp_path.iterdir())


def test_numpys_short_write_is_a_full_disk(tmp_path):
    with pytest.raises(UserError, match="the disk is full"), replacing(tmp_path / "c/x"):
        raise OSError("100 requested and 8 written")


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "cannot write"), (errno.EIO, None)]
)
def test_disk_errors(tmp_path, number, message):
    with pytest.raises(UserError if message else OSError, match=message), replacing(tmp_path / "c/x") as temporary:
        temporary.write_text("half")
        raise OSError(number, "it is so")
    assert not list(tmp_path.iterdir())


def test_only_a_result_that_is_there_already_is_let_be(tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()

    def read_only(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(cache.os, "replace", read_only)
    with pytest.raises(OSError, match="Input/output"), replacing(tmp_path / "made") as temporary:
        temporary.mkdir()


def test_without_locks_what_two_make_at_once_is_whole(tmp_path, monkeypatch):
    """A network file system may have none: the second one's folder finds the first one's in its place."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache.fcntl, "flock", no_locks)
    target = tmp_path / "made"

    def make(path, inner=None):
        path.mkdir()
        (path / "content").write_text("whole")
        if inner:
            inner()

    def second():
        with cache._alone(target), replacing(target) as temporary:
            make(temporary)

    assert cached(target, lambda path: make(path, second)) == target
    assert (target / "content").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
