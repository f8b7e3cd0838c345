"""A new scheduler is one module of hvd.clusters: launcher, `hvd jobs` and the owner check know it by that."""

import importlib
import sys
import textwrap

import pytest

import hvd.clusters
from hvd import cli
from hvd.clusters import base
from hvd.errors import UserError
from hvd.launch import submit
from hvd.runtime import owner

TOY = """
from hvd import stages
from hvd.clusters.base import JobState, Planned, Submitted, wait_for

class Toy:
    name, auto, stays, shares_files = "toy", True, True, False
    queue = {}

    def __init__(self, flags=(), jobs_dir=""):
        self.flags = flags

    def available(self):
        return True

    def plan(self, request):
        parts = stages.parts(request.cfg, request.stage)
        steps = [" ".join(step.words(request.options)) for groups in parts.values() for g in groups for step in g]
        return Planned(request, "\\n".join(steps) + "\\n", 1, 1, parts=steps)

    def check(self, planned):
        pass

    def submit(self, planned, again=()):
        Toy.queue["toy-1"] = JobState("toy-1", "COMPLETED", planned.request.stage, exit_code=0, ended=True)
        return [Submitted("toy-1", planned.request.stage, "toy.log")]

    def owns(self, job):
        return job.startswith("toy-")

    def states(self, days):
        return list(Toy.queue.values()), 0

    def dependents(self, job):
        return [Toy.queue[job]]

    def cancel(self, jobs):
        for job in jobs:
            del Toy.queue[job]

    def logs(self, job, lines, follow):
        print("the log of", job)
        return 0

    def wait(self, job, timeout):
        return wait_for(job, timeout, lambda: Toy.queue[job])

    def alive(self, job):
        return job in Toy.queue

CLUSTER = Toy
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "toy.py").write_text(textwrap.dedent(TOY))
    monkeypatch.setattr(hvd.clusters, "__path__", [*hvd.clusters.__path__, str(tmp_path / "more")])
    importlib.invalidate_caches()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    yield
    sys.modules.pop("hvd.clusters.toy", None)


def test_one_module_is_a_new_scheduler(toy, tmp_path, capsys, monkeypatch):
    assert set(base.names()) == {"kubernetes", "slurm", "toy", "local"}
    assert base.choose("auto") == "toy"
    assert submit.main(["--stage", "policy", "--dry-run"]) == 0
    assert capsys.readouterr().out == "advantages --config demo\ntrain-policy --config demo\n"
    assert submit.main(["--stage", "value"]) == 0
    printed = capsys.readouterr().out
    assert "value: job toy-1; log toy.log" in printed and "job toy-1: COMPLETED" in printed
    assert cli.main(["jobs"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["toy-1", "value"]
    assert cli.main(["jobs", "logs", "toy-1"]) == 0
    monkeypatch.setenv("HVD_SCHEDULER", "toy")
    monkeypatch.setenv("HVD_JOB_ID", "toy-1")
    monkeypatch.setattr(owner, "job_alive", cli._job_alive)
    owner.claim(tmp_path / "run")
    monkeypatch.setenv("HVD_JOB_ID", "toy-2")
    with pytest.raises(UserError, match=r"being worked on by Toy job toy-1 on"):
        owner.claim(tmp_path / "run")
    assert cli.main(["jobs", "cancel", "toy-1", "--yes"]) == 0
    owner.claim(tmp_path / "run")


def test_each_silence_is_said_once_and_one_that_ends_the_asking_is_raised(capsys):
    def ask() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    silent = base.Unreachable("no answer")
    answers = iter([silent, silent, "up", silent, "up", base.Absent("no program"), base.Absent("no program")])
    asking = base.Asking(ask)
    assert [asking() for _ in range(6)] == [None, None, "up", None, "up", None]
    said = ["no answer", "no answer", "no program"]
    assert capsys.readouterr().err == "".join(f"{text}; going on until it answers\n" for text in said)
    with pytest.raises(base.Absent):
        base.Asking(ask, ends=base.Absent)()
