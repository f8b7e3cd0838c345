"""Pods that find another one at work on their run: they wait for one of their own Job, and refuse beside another."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hvd.errors import UserError
from hvd.runtime import heartbeat, owner


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat, "SILENT_SECONDS", 1.5)


@pytest.fixture
def pod(monkeypatch):
    """Makes this process a pod."""

    def become(uid: str, job: str = "hvd-value", job_uid: str = "j1") -> None:
        for name, value in {"HVD_POD_UID": uid, "HVD_JOB_NAME": job, "HVD_JOB_UID": job_uid}.items():
            monkeypatch.setenv(name, value)

    return become


OTHER = """
import sys, time
from hvd.runtime import heartbeat, owner
heartbeat.BEAT_SECONDS = 0.1
owner.claim(sys.argv[1])
print("claimed", flush=True)
sys.stdin.readline()
owner.release(sys.argv[1])
"""


@pytest.fixture
def other(tmp_path):
    """Another pod, in a process of its own, at work on tmp_path/run."""
    processes = []

    def start(uid: str, job: str = "hvd-value", job_uid: str = "j1") -> subprocess.Popen:
        env = os.environ | {"HVD_POD_UID": uid, "HVD_JOB_NAME": job, "HVD_JOB_UID": job_uid}
        process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(tmp_path / "run")],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stdout.readline() == "claimed\n"
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_another_jobs_pod_at_work_is_named_and_refused(tmp_path, pod, other):
    other("p1", "hvd-other", "j9")
    pod("p2")
    with pytest.raises(UserError, match=r"run is being worked on by pod \S+ of Job hvd-other: wait for it"):
        owner.claim(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "owner.json").read_text())["pod"] == "p1"


def test_a_pod_that_has_died_is_found_by_its_silence(tmp_path, pod, other):
    process = other("p1", "hvd-other", "j9")
    process.send_signal(signal.SIGKILL)
    process.wait()
    pod("p2")
    began = time.monotonic()
    owner.claim(tmp_path / "run")
    assert time.monotonic() - began >= heartbeat.SILENT_SECONDS
    assert json.loads((tmp_path / "run" / "owner.json").read_text())["pod"] == "p2"
    owner.release(tmp_path / "run")
    assert not list((tmp_path / "run").glob("owner.json*"))


def test_a_pod_waits_for_its_predecessor_to_save(tmp_path, pod, other, capsys):
    process = other("p1")
    pod("p2")

    def leave() -> None:
        time.sleep(2.5)  # longer than the silence that would make it dead
        process.stdin.write("\n")
        process.stdin.flush()

    thread = threading.Thread(target=leave)
    thread.start()
    began = time.monotonic()
    owner.claim(tmp_path / "run")
    assert time.monotonic() - began >= 2.4
    thread.join()
    assert "waiting until pod" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "owner.json").read_text())["pod"] == "p2"
    owner.release(tmp_path / "run")


def test_the_same_pod_again_is_the_same_owner(tmp_path, pod):
    pod("p1")
    owner.claim(tmp_path / "run")
    owner.claim(tmp_path / "run")
    owner.release(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_who_is_no_pod_refuses_beside_one(tmp_path, other):
    other("p1")
    with pytest.raises(UserError, match="of Job hvd-value"):
        owner.claim(tmp_path / "run")


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    beat = heartbeat.Heartbeat(tmp_path / "file" / "run", "p1")
    beat.stop()
