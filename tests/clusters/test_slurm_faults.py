"""Whatever ends a job on the way, its run is the undisturbed one, bit for bit (acceptance C4 and C5).

All disturbed jobs run side by side, each on two nodes of its own and with steps that wait: what takes time is starting,
and being found dead.
"""

import os
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.clusters.site import STEPS, Site
from tests.clusters.slurm_cluster import SlurmCluster, missing
from tests.train import compare

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]

DISTURBANCES = ("preempted", "time-limit", "requeued", "killed", "node", "batch-host", "hang")
AT_STEP = 22  # past the first checkpoint


@dataclass
class Disturbed:
    """A job and what was done to it."""

    site: Site
    job: str
    nodes: list[str] = field(default_factory=list)
    saw: dict[str, Any] = field(default_factory=dict)


def hosts(cluster: SlurmCluster, job: str) -> list[str]:
    return cluster.run("scontrol", "show", "hostnames", cluster.show(job)["NodeList"]).split()


def ranks(cluster: SlurmCluster, node: str) -> list[int]:
    """Host pids of the training processes on a node."""
    return [pid for pid, command in cluster.node_processes(node) if "train-value" in command and "python" in command]


def elapsed(cluster: SlurmCluster, job: str) -> float:
    """Seconds since the job's start."""
    return time.time() - time.mktime(time.strptime(cluster.show(job)["StartTime"], "%Y-%m-%dT%H:%M:%S"))


def is_due(how: str, d: Disturbed, cluster: SlurmCluster) -> bool:
    """Slurm counts limits in whole minutes: the next one must come before the job's end."""
    return d.site.step() >= AT_STEP and (how != "time-limit" or elapsed(cluster, d.job) % 60 >= 30)


def disturb(how: str, d: Disturbed, cluster: SlurmCluster) -> None:
    first, second = d.nodes
    match how:
        case "preempted":
            nodes = ",".join(d.nodes)
            d.saw["urgent"] = cluster.run(
                "sbatch",
                "--parsable",
                "-p",
                "urgent",
                "-N2",
                "-w",
                nodes,
                "--exclusive",
                "-o",
                "/dev/null",
                "--wrap",
                "sleep 1",
            ).strip()
        case "time-limit":
            minutes = int(elapsed(cluster, d.job) / 60) + 1
            cluster.run("scontrol", "update", f"JobId={d.job}", f"TimeLimit={minutes}")
        case "requeued":
            cluster.run("scontrol", "requeue", d.job)
        case "killed":
            os.kill(ranks(cluster, second)[0], signal.SIGKILL)
        case "node":
            cluster.kill_node(second)
        case "batch-host":
            cluster.kill_node(first)
        case "hang":
            os.kill(ranks(cluster, second)[0], signal.SIGSTOP)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(undisturbed site, how -> Disturbed), all jobs at their end."""
    if lacking := missing():
        pytest.skip(lacking)
    root = tmp_path_factory.mktemp("faults")
    with SlurmCluster(root / "cluster", nodes=2 * len(DISTURBANCES) + 4, cpus=2, grace=20, kill_wait=25) as cluster:
        shared = root / "shared"
        calm = Site(root / "calm", cluster, shared, slow=0.0)  # its programs are those of all others
        quick = ("--value.val_batches", "0")
        (reference,) = calm.submit("--stage", "value", "--nodes", "2", *quick)
        cluster.wait_state(reference, "COMPLETED", timeout=600)

        found: dict[str, Disturbed] = {}
        for how in DISTURBANCES:
            site = Site(root / how, cluster, shared, slow=1.5 if how == "time-limit" else 0.7)
            flags = ["--slurm.partition", "scavenge"] if how == "preempted" else []
            # JAX's own heartbeat finds a stopped process 50 to 100 s after its stop; the watchdog has to be first
            flags += ["--hang_timeout", "35"] if how == "hang" else []
            (job,) = site.submit("--stage", "value", "--nodes", "2", *quick, *flags)
            found[how] = Disturbed(site, job)
        waiting = dict(found)
        while waiting:
            for how, d in list(waiting.items()):
                assert not d.site.ended(d.job), f"{how}: {d.site.log(d.job)}"
                if is_due(how, d, cluster):
                    d.nodes = hosts(cluster, d.job)
                    disturb(how, d, cluster)
                    d.saw["disturbed"] = time.monotonic()
                    del waiting[how]
            time.sleep(0.1)
        for how, d in found.items():
            try:
                cluster.wait_state(d.job, "COMPLETED", timeout=900)
            except AssertionError as error:
                pytest.fail(f"{how}: {error}\n{d.site.log(d.job)}")
            d.saw["restarts"] = cluster.show(d.job)["Restarts"]
            print(f"{how}: complete {time.monotonic() - d.saw['disturbed']:.0f} s after it was disturbed")
        yield calm, found


@pytest.mark.parametrize("how", DISTURBANCES)
def test_the_run_is_the_undisturbed_one(runs, how):
    calm, found = runs
    d = found[how]
    compare.assert_same_run(d.site.run / "value", calm.run / "value", STEPS)
    d.site.hvd("verify", *d.site.options, "--value.val_batches", "0")
    starts = [event["step"] for event in d.site.events() if event["event"] == "start"]
    assert len(starts) == 2 or how == "time-limit", "the limit is that of every attempt"
    assert len(starts) >= 2 and starts == sorted(set(starts)), "each went on from a checkpoint"
    assert not (d.site.run / "value" / "owner.json").exists()


@pytest.mark.parametrize(
    "how, causes",
    [
        ("preempted", ["preempted"]),
        ("time-limit", ["time-limit"]),
        ("requeued", ["requeued"]),
        ("killed", ["killed", "lost"]),
        ("node", ["node-failure"]),
        ("batch-host", ["node-failure"]),
        ("hang", ["hang"]),
    ],
)
def test_the_restart_is_recorded_with_its_cause(runs, how, causes):
    _, found = runs
    d = found[how]
    (cause,) = set(d.site.restarts(d.job))
    assert cause in causes, d.site.log(d.job)
    assert len(d.site.restarts(d.job)) == int(d.saw["restarts"]), "none is missing"
    assert d.site.ended(d.job) == "0 complete"


@pytest.mark.parametrize("how", ["preempted", "time-limit", "requeued"])
def test_what_is_announced_loses_no_step(runs, how):
    """Signals reach the ranks in time: they save together at the step where they are, and the restart goes on there."""
    _, found = runs
    events = found[how].site.events()
    stop = next(event for event in events if event["event"] == "stop")
    again = [event for event in events if event["event"] == "start"][1]
    assert again["step"] == stop["step"] >= AT_STEP
    assert stop["grace_seconds"] == 20.0 and stop["save_seconds"] < 20.0


def test_a_hung_rank_is_found_and_the_stacks_of_the_others_are_in_the_log(runs):
    _, found = runs
    log = found["hang"].site.log(found["hang"].job)
    assert re.search(r"hang: no progress for \d+ s in process 0 on node\d+; stacks of all its threads:", log)
    stacks = log.partition("hang: no progress")[2]
    assert "hvd/train/loop.py" in stacks and "in train" in stacks
    assert "goes back into the queue: hang" in log


def test_a_rank_that_is_killed_takes_the_others_along_at_once(runs):
    _, found = runs
    log = found["killed"].site.log(found["killed"].job)
    assert re.search(r"srun: error: node\d+: task 1: Killed", log)
    assert "goes back into the queue" in log


def test_nothing_else_is_left_in_the_jobs_folders(runs):
    _, found = runs
    for d in found.values():
        hidden = [str(path) for path in (Path(d.site.folder) / "slurm").rglob(".*")]
        assert not hidden
