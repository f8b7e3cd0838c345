"""`hvd site check`: what follows from the job's findings, and what its processes find out by files."""

import dataclasses
import re
import threading
import time

import pytest

from hvd.clusters.base import JobState
from hvd.clusters.slurm.trial import Trial
from hvd.errors import UserError
from hvd.experiments import get_config
from hvd.site import command, findings, probe
from hvd.site.findings import Asked, Clock, Devices, Peer, Report, Seen, Sum
from hvd.site.options import Check

GPUS = Devices("gpu", 8, "NVIDIA H100 80GB HBM3", "12.8")
ASKED = Asked(nodes=2, processes=2, gpus=8, limit=3600, grace=300, limit_option="--slurm.time", space=10**10)


def report(process: int, **other) -> Report:
    found = Report(process, 2, f"node{process + 1}", 3, 1000.0, "hvd 2.0+abc", "/storage/runs", 10001, free=10**12)
    found = dataclasses.replace(found, gpus=8, driver="550.54.15", devices=GPUS, sum=Sum(16, 4.0, 0.01), done=True)
    return dataclasses.replace(found, **({} if process else {"peers": {"1": Peer(0.004, -0.1)}}) | other)


def seen(first: dict | None = None, second: dict | None = None, **other) -> Seen:
    reports = {0: report(0, **(first or {})), 1: report(1, **(second or {}))}
    clocks = {0: Clock(-0.2, 0.3), 1: Clock(-0.1, 0.4)}
    return Seen(reports, other.pop("clocks", clocks), other.pop("images", {"node1": "sha256:a"}), **other)


def test_a_good_site_has_no_other_word_than_ok():
    found = [findings.time_limit(ASKED), *findings.judge(seen(), ASKED)]
    assert [one.name for one in found] == ["time limit", *findings.NAMES]
    assert {one.state for one in found} == {"ok"}, [one.line() for one in found]
    cpu = dataclasses.replace(ASKED, nodes=1, processes=1, gpus=0)
    one = Seen({0: report(0, devices=Devices("cpu", 1), peers=None, sum=None)}, {0: Clock(0, 0)})
    states = {finding.name: finding.state for finding in findings.judge(one, cpu)}
    assert {name for name, state in states.items() if state == "not checked"} == {
        *("gpu", "cuda", "all-reduce", "rename", "image")
    }
    assert {finding.state for finding in findings.judge(Seen(trouble="PENDING"), cpu)} == {"FAILED", "not checked"}
    one.reports[0] = dataclasses.replace(one.reports[0], devices=Devices(error="no such symbol"))
    assert findings.judge(one, cpu)[0].text == "jax does not work on node1: no such symbol; mend the environment"


FAILURES = {
    "the job is killed": (seen(trouble="FAILED: out of memory"), "job", "out of memory"),
    "one node for all": (seen(second={"host": "node1"}), "job", "2 nodes were asked for"),
    "a process is silent": (Seen({0: report(0)}), "job", "process 1 has not reported"),
    "a process hangs": (seen(second={"done": False}), "job", "process 1 on node2 did not end"),
    "no GPU": (seen(second={"gpus": 0}), "gpu", "node2 shows the job 0 GPUs of 8"),
    "jax has no CUDA": (seen({"devices": Devices("cpu", 1)}), "gpu", r"install hvd\[cuda12\]"),
    "jax breaks": (seen({"devices": Devices(error="no such symbol")}), "gpu", "no such symbol"),
    "old driver": (seen(second={"driver": "470.82.01"}), "cuda", "node2 has driver 470.82.01; CUDA 12 needs 525"),
    "no way between nodes": (seen({"sum": Sum(error="DEADLINE_EXCEEDED")}), "all-reduce", "NCCL_SOCKET_IFNAME"),
    "another sum": (seen({"sum": Sum(16, 4, 0.1, "the sum is 1, not 24")}), "all-reduce", "not 24"),
    "read-only": (seen(second={"storage_error": "/s: Read-only file system"}), "storage", "let user 10001 write"),
    "separate folders": (seen({"peers": None, "peers_error": "no file"}), "rename", "same folder on all nodes"),
    "late files": (seen({"peers": {"1": Peer(3.0, 0.0)}}), "rename", "after 3.0 s; NFS: mount with a short actimeo"),
    "a node's clock": (seen({"peers": {"1": Peer(0.01, -90.0)}}), "clocks", "node2 and node1 differ by 90 s"),
    "our clock": (seen(clocks={0: Clock(), 1: Clock(60, 61)}), "clocks", "node2 and this machine differ by 60 s"),
    "no space": (seen(second={"free": 10**9}), "space", r"1\.0 GB are free .* on node2, less than --space 10"),
    "two versions": (seen(second={"version": "hvd 1.9"}), "version", r"node1 runs hvd 2\.0\+abc, node2 hvd 1\.9"),
    "two images": (seen(images={"node1": "sha256:a", "node2": "sha256:b"}), "image", "by its digest"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_is_wrong_is_one_line_that_says_what_to_do(case):
    what, name, words = FAILURES[case]
    failed = [one for one in findings.judge(what, ASKED) if one.state == "FAILED"]
    assert [one.name for one in failed] == [name]
    assert re.search(words, failed[0].line())


def test_a_save_must_fit_into_the_time_that_there_is():
    asked = dataclasses.replace(ASKED, limit=480, grace_option="--slurm.grace")
    assert findings.time_limit(asked).line().startswith("time limit:  FAILED: of 480 s the last 300 are for the save")
    asked = dataclasses.replace(ASKED, limit=None, stop=30)
    assert "the cluster kills after 30" in findings.time_limit(asked).line()


def test_a_clock_is_compared_by_when_a_report_was_not_there_and_when_it_was():
    late, early, right = Clock(), Clock(), Clock()
    late.heard(80.0, asked=99.5, read=100.0)  # written at 80 by its clock, between 99.5 and 100 by ours
    early.heard(120.0, None, 100.0)
    for moment in (100.2, 110.2):
        right.heard(moment, moment - 0.4, moment + 0.1)
    assert (late.skew, early.skew) == (-19.5, 20.0) and abs(right.skew) < 0.5


def both(monkeypatch, folders, patience: float) -> list[Report]:
    """Two processes of a job; jax is left out."""
    monkeypatch.setattr(probe, "_jax", lambda form, what, seconds: form())
    monkeypatch.setattr(probe, "_ROUND_S", 0.3)
    monkeypatch.setenv("HVD_NUM_PROCESSES", "2")
    monkeypatch.setenv("HVD_COORDINATOR", "127.0.0.1:1")
    probes = []
    for process, folder in enumerate(folders):
        monkeypatch.setenv("HVD_PROCESS_ID", str(process))
        probes.append(probe.Probe(folder, patience))
    threads = [threading.Thread(target=one.run) for one in probes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [one._report for one in probes]


def test_processes_meet_by_files_and_leave_none(tmp_path, monkeypatch, capsys):
    first, second = both(monkeypatch, [tmp_path / "runs" / ".site"] * 2, 20.0)
    assert first.peers and first.peers["1"].seen_s < findings.SEEN_S and abs(first.peers["1"].clock_s) < 0.5
    assert first.done and second.done and first.free and not list(tmp_path.iterdir())
    told = probe.reports(capsys.readouterr().out + probe.MARK + "{half")
    assert [one for one in told if one.process == 0][-1] == first


def test_the_reason_of_a_process_that_jax_has_aborted_is_no_frame_of_its_stack():
    aborted = "F1 client.h:80] absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded\n@ 0x7f xla::SetError()\n"
    assert probe.why(aborted, -6) == "DEADLINE_EXCEEDED: Deadline Exceeded"
    assert probe.why("Traceback\njaxlib.JaxRuntimeError: no such device\nbye\n", 1).endswith("Error: no such device")
    assert (probe.why("Killed\n", 137), probe.why("", 137)) == ("Killed", "exit code 137")


def test_separate_folders_and_one_that_is_not_writable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    first, _ = both(monkeypatch, [tmp_path / "a" / ".site", tmp_path / "b" / ".site"], 0.2)
    assert first.peers_error == f"{first.host} does not see the files of process 1"
    _, second = both(monkeypatch, [tmp_path / "a" / ".site", tmp_path / "file" / ".site"], 0.2)
    assert "Not a directory" in second.storage_error and second.done
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class FakeTrial:
    """A job that is told how it goes."""

    def __init__(self, states, end=None):
        self.asked, self.states, self.end, self.removed = dataclasses.replace(ASKED, gpus=0), states, end, 0

    def queue(self) -> str:
        if self.end:
            raise self.end
        return "taken"

    def start(self) -> None: ...

    def state(self) -> JobState:
        found = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(found, BaseException):
            raise found
        self.now = found.state
        return found

    def reports(self) -> list[Report]:
        return [report(process, time=time.time()) for process in (0, 1)] if self.now == "RUNNING" else []

    def last_words(self) -> str:
        return "no such image"

    def images(self) -> dict[str, str]:
        return {}

    def remove(self) -> None:
        self.removed += 1


@pytest.mark.parametrize("before, after", [((), False), ((".",), True), ((".", "demo"), True)])
def test_what_killed_processes_left_on_slurm_goes(tmp_path, monkeypatch, before, after):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    for name in before:
        (runs / name).mkdir()
    left = Trial(get_config("demo"), (), Check(), 60)
    left._folder.mkdir(parents=True)
    (left._folder / "answer-0.json").touch()
    left.remove()
    assert runs.exists() == after and set(runs.glob("*")) == {runs / name for name in before if name != "."}


def test_the_job_is_removed_however_it_ends(monkeypatch, capsys):
    monkeypatch.setattr(command, "_POLL_S", 0.01)
    waits, runs = JobState("7", "PENDING", reason="Resources"), JobState("7", "RUNNING")
    good = FakeTrial([waits, runs])
    assert "FAILED" not in {one.state for one in command.look(good, 5)} and good.removed == 1
    assert "job 7: PENDING: Resources\njob 7: RUNNING" in capsys.readouterr().out
    late, dead = FakeTrial([waits]), FakeTrial([JobState("7", "FAILED", ended=True)])
    for trial, words in ((late, "has not started within"), (dead, "FAILED: no such image")):
        (failed,) = [one for one in command.look(trial, 0.05) if one.state == "FAILED"]
        assert failed.name == "job" and words in failed.text and trial.removed == 1
    broken = FakeTrial([waits, KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        list(command.look(broken, 5))
    assert broken.removed == 1
    refused = list(command.look(FakeTrial([waits], UserError("invalid partition")), 5))
    assert refused[1].line() == "queue:       FAILED: invalid partition"
    assert {one.state for one in refused[2:]} == {"not checked"}
