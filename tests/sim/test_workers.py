"""Jobs in parallel processes: results, errors, one thread each, and no worker that outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from hvd.errors import Failed, UserError
from hvd.sim import workers
from hvd.sim.workers import run_jobs


def square(x: int) -> tuple[int, int]:
    return x * x, os.getpid()


def refuse(x: int) -> int:
    if x == 1:
        raise UserError(f"job {x} cannot be done")
    return x


def crash_once(folder: str, i: int) -> int:
    """Job 2 takes its process down the first time that anybody does it."""
    mark = Path(folder) / "crashed"
    if i == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    return i * i


def crash(i: int) -> int:
    if i == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return i


def environment(_: int) -> tuple[str, str]:
    return os.environ["OMP_NUM_THREADS"], os.environ["XLA_FLAGS"]


def test_results_carry_their_jobs_number():
    found = dict(run_jobs(square, [(i,) for i in range(5)], 2))
    assert {i: value for i, (value, _) in found.items()} == {i: i * i for i in range(5)}
    assert os.getpid() not in {pid for _, pid in found.values()}


def test_one_worker_is_this_process():
    assert dict(run_jobs(square, [(3,), (4,)], 1)) == {0: (9, os.getpid()), 1: (16, os.getpid())}
    assert list(run_jobs(square, [], 4)) == []


def test_an_error_in_a_worker_is_the_callers():
    with pytest.raises(UserError, match="job 1 cannot be done"):
        list(run_jobs(refuse, [(i,) for i in range(4)], 2))


def test_a_worker_that_dies_is_replaced_and_its_jobs_are_done_again(tmp_path, capfd):
    found = list(run_jobs(crash_once, [(str(tmp_path), i) for i in range(8)], 2))
    assert sorted(found) == [(i, i * i) for i in range(8)]
    printed = capfd.readouterr().err
    assert "a worker process died" in printed and "in crash_once" in printed  # faulthandler's stack


def test_a_worker_may_die_while_jobs_are_handed_out(monkeypatch, capfd):
    submit, calls = ProcessPoolExecutor.submit, []

    def refuse_the_third(self, *job):
        calls.append(job)
        if len(calls) == 3:
            raise workers.BrokenProcessPool("a worker died")
        return submit(self, *job)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", refuse_the_third)
    found = {i: value for i, (value, _) in run_jobs(square, [(i,) for i in range(5)], 2)}
    assert found == {i: i * i for i in range(5)} and len(calls) == 6
    assert "3 jobs left" in capfd.readouterr().err


def test_workers_that_die_again_and_again_are_an_error():
    with pytest.raises(Failed, match=f"died .*, {workers.MAX_DEATHS + 1} times; [1-4] of 4 jobs are not done"):
        list(run_jobs(crash, [(i,) for i in range(4)], 2))


def test_workers_use_one_thread_and_keep_the_users_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    for _, (threads, flags) in run_jobs(environment, [(0,), (1,)], 2):
        assert threads == "1" and flags.startswith("--xla_cpu_enable_fast_math=false --xla_cpu_multi_thread_eigen")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_no_worker_outlives_a_killed_parent(tmp_path):
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.sim.test_workers import wait_here
from hvd.sim.workers import run_jobs
if __name__ == "__main__":
    list(run_jobs(wait_here, [({str(tmp_path)!r}, i) for i in range(2)], 2))
"""
    script = tmp_path / "parent.py"
    script.write_text(program)
    parent = subprocess.Popen([sys.executable, str(script)])
    try:
        wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
        pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_until(lambda: not any(alive(pid) for pid in pids))


def wait_here(folder: str, i: int) -> None:
    (Path(folder) / f"{os.getpid()}.pid").touch()
    time.sleep(120)


def wait_until(condition) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
