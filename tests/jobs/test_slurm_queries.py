"""What is read out of the answers of squeue, scontrol, sacct and scancel, and what is made of none."""

import subprocess
import sys

import pytest

from hvd.clusters.base import Unreachable
from hvd.clusters.slurm import queue as asking
from hvd.clusters.slurm.queue import Queued, Status
from hvd.errors import Failed


def test_a_job_s_status_is_read_with_its_exit_code_and_restarts(slurm):
    slurm.job("1", state="COMPLETED")
    slurm.job("2", state="FAILED", reason="NonZeroExitCode", code="7:0")
    slurm.job("3", state="PENDING", reason="ReqNodeNotAvail, UnavailableNodes:node[1-2]", nodes="", restarts=2)
    slurm.job("4", state="OUT_OF_MEMORY", reason="OutOfMemory", code="0:9", nodes="node[1-2]")
    assert asking.states(["1", "2", "3", "4", "5"]) == {
        "1": Status("1", "COMPLETED", "", 0, "node1", 0),
        "2": Status("2", "FAILED", "NonZeroExitCode", 7, "node1", 0),
        "3": Status("3", "PENDING", "ReqNodeNotAvail, UnavailableNodes:node[1-2]", None, "", 2),
        "4": Status("4", "OUT_OF_MEMORY", "OutOfMemory", 137, "node[1-2]", 0),
    }
    assert asking.states([]) == {}


@pytest.mark.parametrize("more", [1, 20])
def test_one_forgotten_id_does_not_spoil_the_answer(slurm, more):
    slurm.set(strict=True)
    slurm.job("1")
    slurm.job("2", forgotten=True)
    others = [str(1000 + i) for i in range(more)]
    assert set(asking.states(["1", "2", *others])) == {"1"}
    assert len(slurm.calls()) < 8


def test_accounting_tells_of_jobs_that_slurmctld_has_forgotten(slurm):
    slurm.set(accounting=True)
    starts = [["NODE_FAIL", "1:0", "None"], ["PREEMPTED", "0:0", "None"], ["CANCELLED by 1000", "0:15", "Dependency"]]
    slurm.job("1", forgotten=True, starts=starts)
    slurm.job("2", forgotten=True, starts=[["FAILED", "3:0", "NonZeroExitCode"]])
    slurm.job("3", forgotten=True, starts=[["RUNNING", "0:0", "None"]])  # left in the books by a crash
    assert asking.states(["1", "2", "3"]) == {
        "1": Status("1", "CANCELLED", "Dependency", 143, "node1", 2),
        "2": Status("2", "FAILED", "NonZeroExitCode", 3, "node1", 0),
    }


def test_no_accounting_is_nobody_s_mistake(slurm, capfd):
    slurm.job("1", forgotten=True)
    assert asking.states(["1"]) == {}
    (slurm.bin / "sacct").unlink()
    assert asking.states(["1"]) == {}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "state, lives",
    [
        *((state, True) for state in ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED")),
        *((state, True) for state in ("REQUEUE_HOLD", "STOPPED", "A_STATE_OF_SLURM_99")),
        *((state, False) for state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")),
    ],
)
def test_alive(slurm, state, lives):
    slurm.job("1", state=state)
    assert asking.alive("1") is lives


def test_an_unknown_job_is_not_alive_and_a_silent_controller_says_nothing(slurm):
    assert asking.alive("7") is False
    slurm.set(down=True)
    assert asking.alive("7") is None
    assert len(slurm.calls()) == 1 + 3


def test_an_outage_that_passes_is_not_noticed(slurm):
    slurm.job("1")
    slurm.set(down=2)
    assert asking.alive("1") is True
    slurm.set(down=2)
    assert asking.states(["1"])["1"].state == "RUNNING"


def test_without_slurm_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert asking.alive("1") is None
    with pytest.raises(Unreachable, match="no squeue on this machine"):
        asking.states(["1"])
    with pytest.raises(Unreachable, match="no scancel"):
        asking.cancel(["1"])


def test_a_command_that_hangs_is_given_up(slurm, monkeypatch):
    monkeypatch.setattr(asking, "_TIMEOUT_S", 0.2)
    (slurm.bin / "squeue").write_text(f"#!{sys.executable} -IS\nimport time\ntime.sleep(60)\n")
    assert asking.alive("1") is None
    with pytest.raises(Unreachable, match=r"squeue did not answer within 0\.2 s"):
        asking.states(["1"], tries=1)


def test_the_user_s_own_settings_do_not_change_the_answers(slurm, monkeypatch):
    monkeypatch.setenv("SQUEUE_STATES", "PENDING")
    monkeypatch.setenv("SLURM_CONF", "/kept")
    seen = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kw: seen.append(kw["env"]) or run(*args, **kw))
    asking.alive("1")
    assert "SQUEUE_STATES" not in seen[0]
    assert seen[0]["SLURM_CONF"] == "/kept"


def test_the_queue_says_what_waits_for_what(slurm):
    slurm.job("10", state="PENDING", reason="Dependency", after="afterok:9(unfulfilled),afterany:8(unfulfilled)")
    slurm.job("9", name="hvd-value|odd", folder="/work")
    slurm.job("7", state="COMPLETED")
    assert asking.queue() == [
        Queued("9", "RUNNING", "", "hvd-value|odd", (), "/work"),
        Queued("10", "PENDING", "Dependency", "hvd-value", ("9", "8"), "/somewhere"),
    ]
    assert asking.dependencies("afterok:12:13?afternotok:14_*(failed)") == ("12", "13", "14")
    assert asking.dependencies("(null)") == ()


def test_cancel_takes_jobs_in_the_order_given(slurm):
    for number in ("1", "2"):
        slurm.job(number)
    slurm.job("3", state="COMPLETED")
    asking.cancel(["2", "3", "99", "1"])
    assert (slurm.state("1"), slurm.state("2"), slurm.state("3")) == ("CANCELLED", "CANCELLED", "COMPLETED")
    assert slurm.calls() == ["scancel 2", "scancel 3", "scancel 99", "scancel 1"]


def test_cancel_says_who_refuses(slurm):
    slurm.job("1", refused=True)
    with pytest.raises(Failed, match=r"^job 1 is not cancelled: scancel: error: .*permission denied$"):
        asking.cancel(["1"])
    slurm.set(down=True)
    with pytest.raises(Unreachable, match="Unable to contact slurm controller"):
        asking.cancel(["1"])
