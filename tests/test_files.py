"""Files that are written whole, locks, JSON lines, and the one line about a full disk."""

import errno
import fcntl
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from hvd import files
from hvd.errors import UserError


def test_a_write_replaces_a_link_and_leaves_what_it_pointed_to(tmp_path):
    (tmp_path / "other").write_text("other")
    (tmp_path / "a").symlink_to(tmp_path / "other")
    files.write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and not (tmp_path / "a").is_symlink()
    assert (tmp_path / "other").read_text() == "other"


def test_temporary_names_differ_and_have_the_usual_rights(tmp_path):
    with files.replacing(tmp_path / "a") as first, files.replacing(tmp_path / "a") as second:
        assert first != second and str(os.getpid()) not in first.name
        first.write_text("1")
        second.write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    files.write_atomic(tmp_path / "b", b"")
    (tmp_path / "c").write_text("")
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "c").stat().st_mode


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    files.write_atomic(tmp_path / "a", "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    half = [".a.0123456789abcdef.tmp", ".a.b.fedcba9876543210.tmp"]
    others = ["a", ".a.tmp", ".a.0123456789abcdeg.tmp", "a.0123456789abcdef.tmp", ".notes"]
    for name in half + others:
        (tmp_path / name).write_text("")
    (tmp_path / ".c.0123456789abcdef.tmp").mkdir()
    (tmp_path / "kept").mkdir()
    (tmp_path / ".d.0123456789abcdef.tmp").symlink_to(tmp_path / "kept")
    files.remove_left_over(tmp_path, "a")
    assert {path.name for path in tmp_path.iterdir()} >= {half[1], *others} and not (tmp_path / half[0]).exists()
    files.remove_left_over(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "kept"}
    files.remove_left_over(tmp_path / "nothing")
    files.remove_left_over("gs://bucket/folder")


def test_who_writes_a_shared_file_removes_what_killed_ones_left(tmp_path):
    for name in (".a.0123456789abcdef.tmp", ".b.0123456789abcdef.tmp", ".a.lock"):
        (tmp_path / name).write_text("")
    files.write_shared(tmp_path / "a", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", ".b.0123456789abcdef.tmp": ""}


def _hold(path: Path, held, release) -> None:
    with files.locked(path):
        held.set()
        release.wait(30)


def test_a_lock_ends_with_its_process(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "lock", held, release))
    process.start()
    assert held.wait(30)

    def give_up():
        raise UserError("it is busy")

    with pytest.raises(UserError, match="it is busy"), files.locked(tmp_path / "lock", give_up):
        raise AssertionError("the lock is held by another process")
    process.kill()
    with files.locked(tmp_path / "lock"):
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()
    process.join()


def test_who_waits_for_a_lock_whose_file_is_removed_gets_the_new_one(tmp_path):
    inside, most, count = [], [], 0

    def work():
        nonlocal count
        for _ in range(20):
            with files.locked(tmp_path / "lock"):
                inside.append(1)
                most.append(len(inside))
                count += 1
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count == 80 and max(most) == 1


def test_without_locks_the_block_runs(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with files.locked(tmp_path / "lock"), files.locked(tmp_path / "lock"):
        pass


def test_a_torn_line_is_left_out_and_dropped_at_opening(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert files.read_lines(path) == []
    path.write_text('{"a": 1}\n{"a": 2}\n[3]\n{"a": 4')
    assert files.read_lines(path) == [{"a": 1}, {"a": 2}]
    lines = files.JsonLines(path, keep=lambda line: line["a"] != 1)
    lines.write({"a": 5})
    lines.close()
    assert path.read_text() == '{"a": 2}\n{"a": 5}\n'


def test_json_lines_on_a_path_that_cannot_append(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n')
    monkeypatch.setattr(files, "is_local", lambda path: False)
    lines = files.JsonLines(path)
    lines.write({"a": 2})
    assert len(files.read_lines(path)) == 1
    lines.flush()
    assert len(files.read_lines(path)) == 2 and list(tmp_path.iterdir()) == [path]
    lines.close()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "no space left on the disk of /a/b; free some"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left on the disk of /here; free some"),
        (OSError("100 requested and 8 written"), "no space left on the disk of /here; free some"),
        (RuntimeError("HDF5: '/a/c' No space left on device"), "no space left on the disk of /a/c; free some"),
        (OSError(errno.EROFS, "Read-only file system"), "/here: cannot write (Read-only file system); free some"),
        (OSError(errno.EIO, "Input/output error"), None),
        (ValueError("no"), None),
    ],
)
def test_disk_errors(error, line):
    found = files.disk_error(error, "/here", "free some")
    assert (found and str(found)) == line
    if isinstance(error, OSError):
        with pytest.raises(UserError if line else OSError), files.disk_errors("/here", "free some"):
            raise error
