"""A Slurm of the test's own, no other, and a folder of jobs in the working directory."""

import json

import pytest

from hvd.clusters import base
from hvd.clusters.slurm import log
from hvd.clusters.slurm import queue as asking
from tests.jobs.fake_slurm import FakeSlurm


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    fake = FakeSlurm(tmp_path / "slurm-of-the-test")
    monkeypatch.setenv("PATH", str(fake.bin))
    monkeypatch.setattr(asking, "_PAUSES_S", (0.0, 0.0))
    return fake


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The working directory, with slurm/jobs in it."""
    work = tmp_path / "work"
    (work / "slurm" / "jobs").mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.delenv("HVD_JOBS_DIR", raising=False)
    monkeypatch.setattr(base, "_WAIT_S", (0.01, 0.05))
    monkeypatch.setattr(log, "_ASK_EVERY_S", 0.05)
    monkeypatch.setattr(log, "_READ_EVERY_S", 0.01)
    monkeypatch.setattr(log, "_SETTLE_S", 0.05)
    return work


@pytest.fixture
def submitted(work):
    """Write what the launcher, the trainer and the batch script leave of a job; returns its folder."""

    def write(number: str, *, run=None, restarts=(), end=None, log="line 1\nline 2\nline 3\n", **what):
        jobs = work / "slurm" / "jobs"
        folder = jobs / number
        folder.mkdir()
        about = {"id": number, "stage": "value", "name": "hvd-value", "options": [], "exp_dir": "runs/demo"}
        about |= {"run_dir": "runs/demo/value", "log": f"slurm/jobs/{number}.log", "after": "", "cluster": "slurm"}
        (folder / "job.json").write_text(json.dumps(about | {"submitted": "2026-01-01T10:00:00+00:00"} | what))
        if run is not None:
            (folder / "run.json").write_text(json.dumps(run))
        if restarts:
            (folder / "restarts").write_text("".join(f"{line}\n" for line in restarts))
        if end is not None:
            (folder / "end").write_text(end + "\n")
        if log is not None:
            (jobs / f"{number}.log").write_text(log)
        return folder

    return write
