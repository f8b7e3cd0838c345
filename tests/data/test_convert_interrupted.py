"""Conversions that are killed, stopped or run out of disk: no half dataset, and the same command goes on."""

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hvd.data.convert import ConvertConfig, convert
from hvd.data.convert_plan import make_plan
from hvd.data.convert_work import WorkFolder
from hvd.errors import Stopped, UserError
from tests.data import joylo
from tests.folders import ROOT
from tests.small_disk import need_small_disk, run_on_small_disk


def command(raw: Path, target: Path, *more: str) -> list[str]:
    argv = [sys.executable, "-m", "hvd.cli", "convert", "--raw-dirs", str(raw), "--repo-id", "me/set"]
    return [*argv, "--root", str(target), *more]


def run(raw: Path, target: Path, *more: str, before: str = "") -> subprocess.CompletedProcess:
    """The command's result; `before` is Python that its process runs first (this one has threads: it must not fork)."""
    start = [sys.executable, "-c", f"{before}\nimport os, sys\nos.execv(sys.argv[1], sys.argv[1:])"] if before else []
    argv = [*start, *command(raw, target, *more)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_sigkill_at_any_file_operation(tmp_path):
    joylo.write_folder(tmp_path / "raw", (6, 5, 4), failures=(1,))
    argv = [sys.executable, "-m", "tests.data.killed_conversion", str(tmp_path / "raw"), str(tmp_path), "0", "12"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "12 kills" in done.stdout


def test_a_signal_is_no_damage_of_the_recording_that_was_looked_at(tmp_path):
    class Signalled(joylo.Here):
        def __call__(self, function, *args, **kwargs):
            raise Stopped("by SIGTERM")

    joylo.write_folder(tmp_path / "raw", (5,))
    for skip_bad in (False, True):
        config = ConvertConfig((str(tmp_path / "raw"),), "me/set", root=str(tmp_path / "set"), skip_bad=skip_bad)
        with pytest.raises(Stopped):
            make_plan(config, Signalled())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_their_parent(tmp_path, number):
    """Killed in the middle of encoding with processes: none survives, and finished segments are not encoded again."""
    raw, target, work = tmp_path / "raw", tmp_path / "set", tmp_path / "set.partial"
    joylo.write_folder(raw, (120,) * 8, size=(120, 160))
    process = subprocess.Popen(
        command(raw, target, "--workers", "2"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    journal = work / "journal.jsonl"
    deadline = time.monotonic() + 100
    while not (journal.is_file() and journal.read_bytes().count(b"\n") >= 3):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.005)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    assert "Traceback" not in said
    assert not target.exists()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    noted = journal.read_bytes().count(b"\n")
    assert 3 <= noted <= len(list((work / "segments").glob("*.mp4")))
    again = run(raw, target)
    assert again.returncode == 0, again.stderr
    assert f"{noted * 120}/{24 * 120}" in again.stderr  # the bar begins where it was
    assert not work.exists()
    run(raw, tmp_path / "other", "--workers", "1")
    assert joylo.tree(target) == joylo.tree(tmp_path / "other")


def test_file_size_limit(tmp_path):
    """A write that the system refuses (here by a limit on file size) is one line; the rerun goes on."""
    raw, target = tmp_path / "raw", tmp_path / "set"
    joylo.write_folder(raw, (40, 40))

    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    done = run(raw, target, before=limit)
    check_no_room(done, target)
    assert run(raw, target).returncode == 0


def check_no_room(done: subprocess.CompletedProcess, target: Path) -> None:
    errors = [line for line in done.stderr.split("\n") if "error: " in line]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert "cannot write" in errors[0] and "make room and run the same command again" in errors[0]
    assert f"what is done is kept in {target}.partial" in errors[0]
    assert not target.exists()


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 1.2])
def test_full_disk(tmp_path, share):
    """A real file system of too few bytes, full while encoding (small shares) or while joining; then it is enlarged."""
    need_small_disk()
    raw, disk = tmp_path / "raw", tmp_path / "disk"
    disk.mkdir()
    joylo.write_folder(raw, (60, 60), size=(64, 96))
    whole = run(raw, tmp_path / "whole")
    assert whole.returncode == 0
    used = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    target = disk / "set"
    line = " ".join(command(raw, target, "--workers", "1"))
    script = f"""
        {line}; code=$?
        [ -e {target} ] && echo half
        $enlarge
        {line} >&2 || echo again failed
        cp -r {target} {tmp_path}/copy
        exit $code
    """
    done = run_on_small_disk(disk, int(used * share) // 4096 * 4, script, timeout=120)
    assert done.stdout == ""
    check_no_room(done, target)
    assert joylo.tree(tmp_path / "copy") == joylo.tree(tmp_path / "whole")


def test_a_target_below_a_file(tmp_path):
    joylo.write_folder(tmp_path / "raw", (5,))
    done = run(tmp_path / "raw", tmp_path / "raw/demo_0000.hdf5/set")
    assert done.returncode == 2, done.stderr
    assert "Not a directory; choose another --root" in done.stderr and "Traceback" not in done.stderr


def test_no_rights(tmp_path, monkeypatch):
    def refused(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self.path))

    joylo.write_folder(tmp_path / "raw", (5,))
    monkeypatch.setattr(WorkFolder, "__enter__", refused)  # root, as which tests may run, has all rights
    with pytest.raises(UserError, match=r"set.partial: Permission denied; choose another --root, or look at the"):
        convert(ConvertConfig((str(tmp_path / "raw"),), "me/set", root=str(tmp_path / "set")))
