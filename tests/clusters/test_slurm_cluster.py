"""The test cluster is what the other tests take it for: real nodes, real failures, nothing left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.clusters import daemons
from tests.clusters.slurm_cluster import SlurmCluster, missing, parse_job
from tests.folders import ROOT

pytestmark = pytest.mark.slurm


def submit(slurm: SlurmCluster, folder: Path, script: str, *options: str) -> str:
    """Job id of a batch script whose output goes to `folder`/out."""
    (folder / "job.sh").write_text(f"#!/bin/bash\n{script}\n")
    where = ("-o", str(folder / "out"), "--open-mode=append", "-D", str(folder))
    return slurm.run("sbatch", "--parsable", *where, *options, str(folder / "job.sh")).strip()


def ours(cluster: SlurmCluster) -> list[str]:
    """Command lines of all processes on the machine that this cluster has started."""
    mark = f"SLURM_CONF={cluster.environment['SLURM_CONF']}"
    return [daemons.command_line(pid) for pid in daemons.all_pids() if mark in daemons.read(f"/proc/{pid}/environ")]


def test_a_job_on_two_nodes_sees_two_machines(slurm, tmp_path):
    before = dict(os.environ)
    seen = slurm.run("srun", "-N2", "--ntasks-per-node=1", "sh", "-c", "echo $(hostname) $(ls -d /proc/[0-9]* | wc -l)")
    names, processes = zip(*(line.split() for line in seen.splitlines()), strict=True)
    assert len(set(names)) == 2 and set(names) <= {"node1", "node2", "node3", "node4"}
    assert max(map(int, processes)) < 20, "/proc shows other processes than the node's"
    assert os.environ == before


def test_fields_of_a_job_may_hold_anything(slurm, tmp_path):
    folder = tmp_path / "a b JobState=FAILED"
    folder.mkdir()
    job = submit(slurm, folder, "true", "-J", "x Restarts=7 y", "--comment", "why JobState=FAILED not")
    found = slurm.wait_state(job, "COMPLETED", timeout=30)
    assert (found["JobId"], found["JobName"], found["Restarts"]) == (job, "x Restarts=7 y", "0")
    assert found["Comment"] == "why JobState=FAILED not"
    assert found["WorkDir"] == str(folder)


def test_a_state_that_will_not_come_is_known_at_once(slurm, tmp_path):
    job = submit(slurm, tmp_path, "exit 3")
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"expected COMPLETED, got JobState=FAILED.*ExitCode=3:0"):
        slurm.wait_state(job, "COMPLETED", timeout=30)
    assert time.monotonic() - began < 10


def test_a_rank_can_be_killed_from_outside(slurm, tmp_path):
    job = submit(slurm, tmp_path, "srun --kill-on-bad-exit=1 sleep 71", "-N2", "--ntasks-per-node=1")
    node = slurm.wait_state(job, "RUNNING", timeout=30)["BatchHost"]

    def ranks() -> list[int]:
        return [pid for pid, command in slurm.node_processes(node) if re.fullmatch(r"\S*sleep 71", command)]

    daemons.wait_until(lambda: bool(ranks()), 20, "the rank")
    os.kill(ranks()[0], signal.SIGKILL)
    # srun returns the largest code of all tasks: the other one's, which srun has sent SIGTERM
    assert slurm.wait_state(job, "FAILED", timeout=30)["ExitCode"] == "143:0"
    assert re.search(r"srun: error: node\d: task \d: Killed", (tmp_path / "out").read_text())


def test_a_job_survives_the_power_off_of_its_node(slurm, tmp_path):
    script = 'echo "life ${SLURM_RESTART_COUNT:-0} on $(hostname)"; [ "$SLURM_RESTART_COUNT" ] || sleep 300'
    job = submit(slurm, tmp_path, script, "--requeue", "-w", "node2")
    slurm.wait_state(job, "RUNNING", timeout=30)
    daemons.wait_until(lambda: "life 0" in daemons.read(str(tmp_path / "out")), 20, "the job's first line")
    began = time.monotonic()
    slurm.kill_node("node2")
    assert slurm.node_processes("node2") == []
    slurm.wait_state(job, "PENDING", timeout=40)
    slurm.start_node("node2")
    assert slurm.wait_state(job, "COMPLETED", timeout=60)["Restarts"] == "1"
    assert time.monotonic() - began < 60
    assert (tmp_path / "out").read_text().splitlines()[-1] == "life 1 on node2"
    slurm.wait_idle()


def test_an_urgent_job_preempts_one_that_is_requeued(slurm, tmp_path):
    script = 'echo "life ${SLURM_RESTART_COUNT:-0}"; [ "$SLURM_RESTART_COUNT" ] || sleep 300'
    job = submit(slurm, tmp_path, script, "-p", "scavenge", "--exclusive", "-w", "node1")
    slurm.wait_state(job, "RUNNING", timeout=30)
    (tmp_path / "urgent").mkdir()
    urgent = submit(slurm, tmp_path / "urgent", "true", "-p", "urgent", "--exclusive", "-w", "node1")
    slurm.wait_state(urgent, "COMPLETED", timeout=60)
    assert slurm.wait_state(job, "COMPLETED", timeout=60)["Restarts"] == "1"
    assert "DUE TO PREEMPTION" in (tmp_path / "out").read_text()


def test_accounting_knows_a_finished_job(slurm_accounting, tmp_path):
    job = submit(slurm_accounting, tmp_path, "exit 5")
    slurm_accounting.wait_state(job, "FAILED", timeout=30)

    def line() -> str:
        return slurm_accounting.run("sacct", "-n", "-X", "-P", "-j", job, "-o", "State,ExitCode").strip()

    daemons.wait_until(lambda: line() == "FAILED|5:0", 20, f"the job in sacct, which says: {line()}")


@pytest.mark.parametrize("how", ["down", "killed"])
def test_nothing_is_left_of_a_cluster(tmp_path, how):
    if lacking := missing():
        pytest.skip(lacking)
    cluster = SlurmCluster(tmp_path, nodes=2, gpus=2)
    mounts = Path("/proc/mounts").read_text()
    if how == "down":
        with cluster:
            cluster.run("sbatch", "-N2", "--gpus-per-node=2", "-o", "/dev/null", "--wrap", "srun sleep 300")
            daemons.wait_until(
                lambda: any(re.fullmatch(r"\S*sleep 300", command) for command in ours(cluster)), 20, "the job"
            )
            run = Path(cluster.layout.run)
            cluster.kill_node("node2")  # one that is off is no obstacle
    else:
        # The owner has no chance to take it down: its keeper does.
        code = (
            f"from tests.clusters import slurm_cluster as s; s.SlurmCluster({str(tmp_path)!r}, nodes=1).up(); input()"
        )
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE) as owner:
            daemons.wait_until(lambda: any("slurmd -f" in command for command in ours(cluster)), 30, "the cluster")
            run = Path(SlurmCluster.attach(tmp_path).layout.run)
            owner.kill()
        daemons.wait_until(lambda: not ours(cluster), 20, "the end of the cluster")
    assert ours(cluster) == []
    assert not run.exists()
    assert Path("/proc/mounts").read_text() == mounts
    cluster.down()


def test_a_half_failed_start_leaves_nothing(tmp_path, monkeypatch):
    if lacking := missing():
        pytest.skip(lacking)
    cluster = SlurmCluster(tmp_path, nodes=2)
    monkeypatch.setattr("tests.clusters.slurm_config.NODE_INIT", "echo no such machine; exit 1\n")

    def fails(timeout):
        logs = Path(cluster.layout.log)
        daemons.wait_until(lambda: any("no such machine" in p.read_text() for p in logs.iterdir()), 30, "a node's word")
        return 1 / 0

    monkeypatch.setattr(cluster, "wait_idle", fails)
    with pytest.raises(ZeroDivisionError) as raised:
        cluster.up()
    assert "no such machine" in "".join(raised.value.__notes__)
    assert ours(cluster) == [] and not Path(cluster.layout.run).exists()


def test_jobs_are_parsed_line_by_line():
    text = "JobId=12 ArrayJobId=11 JobName=a=b c\n   JobState=RUNNING Reason=None\n   Command=/x y=z\n   Power=\n   \n"
    job = {"JobId": "12", "ArrayJobId": "11", "JobName": "a=b c", "JobState": "RUNNING", "Reason": "None"}
    assert parse_job(text) == job | {"Command": "/x y=z", "Power": ""}
