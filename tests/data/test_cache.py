"""The cache: whole or nothing, one maker at a time, and a full disk is said in one line."""

import errno
import multiprocessing
import threading
import time

import pytest

from hvd.data.cache import cached
from hvd.errors import UserError


def whole(path):
    path.mkdir()
    (path / "part").write_text("whole")


def test_made_once_by_many(tmp_path):
    made = []

    def make(path):
        made.append(path)
        time.sleep(0.05)
        whole(path)

    threads = [threading.Thread(target=cached, args=(tmp_path / "c/x", make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and [p.name for p in (tmp_path / "c").iterdir()] == ["x"]


def _slow_make(folder):
    def make(path):
        path.mkdir()
        (path / "half").write_text("half")
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
    assert (cached(tmp_path / "c/x", whole) / "part").read_text() == "whole"
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["x"], "what it left is removed"


def test_failure_leaves_nothing(tmp_path):
    def fails(path):
        path.mkdir()
        (path / "half").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached(tmp_path / "c/x", fails)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("100 requested and 8 written"), "no space left"),  # numpy's words
        (OSError(errno.ENOSPC, "it is so"), "no space left"),
        (OSError(errno.EROFS, "it is so"), "cannot write"),
        (OSError(errno.EIO, "it is so"), None),
    ],
)
def test_disk_errors(tmp_path, error, message):
    def make(path):
        path.write_text("half")
        raise error

    with pytest.raises(UserError if message else OSError, match=message):
        cached(tmp_path / "c/x", make)
    assert not list(tmp_path.iterdir())
