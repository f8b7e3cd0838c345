"""`hvd jobs` of a real Slurm: jobs that wait, run, are requeued, end, and that Slurm has forgotten (acceptance C7)."""

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.clusters.site import STEPS, Site, until
from tests.clusters.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]

BOOKS = ("none", "accounting")


def rows(site: Site) -> dict[str, dict[str, Any]]:
    """What `hvd jobs --json` says of each job."""
    return {row["id"]: row for row in json.loads(site.hvd("jobs", "--json").stdout)}


def cells(site: Site) -> dict[str, dict[str, str]]:
    """The table: id -> column -> cell."""
    head, *lines = site.hvd("jobs").stdout.splitlines()
    starts = [match.start() for match in re.finditer(r"\S+", head)]
    found = {}
    for line in lines:
        parts = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        found[parts[0]] = dict(zip(head.split(), parts, strict=True))
    return found


def wait(site: Site, job: str) -> int:
    return site.hvd("jobs", "wait", job, "--timeout", "300", check=False).returncode


def forget(cluster: SlurmCluster) -> None:
    """Let Slurm forget jobs two seconds after their end; it looks for such once a minute."""
    conf = Path(cluster.environment["SLURM_CONF"])
    conf.write_text(re.sub("MinJobAge=.*", "MinJobAge=2", conf.read_text()))
    cluster.run("scontrol", "reconfigure")


# ------------------------------------------------------------------------------------------------- jobs that have ended


@dataclass
class Ended:
    """A cluster's site with a job that is complete, one that failed by a mistake and one that was cancelled."""

    site: Site
    complete: str
    mistaken: str
    cancelled: str


@pytest.fixture(scope="module")
def ended(slurm_accounting, tmp_path_factory):
    """With books and without, all jobs ended; from then on Slurm forgets them soon."""
    root = tmp_path_factory.mktemp("ended")
    with SlurmCluster(root / "cluster", nodes=1) as without:
        found = {}
        for name, cluster in zip(BOOKS, (without, slurm_accounting), strict=True):
            site = Site(root / name, cluster, root / "shared")
            (complete,) = site.submit("--stage", "value", "--slurm.command", "true")
            (cancelled,) = site.submit("--stage", "value", "--slurm.command", "bash -c 'sleep 600'")
            mistaken = site.sbatch("slurm/value.sbatch", "--config", "nonsense")
            cluster.wait_state(cancelled, "RUNNING")
            until(lambda site=site, job=cancelled: "prepare on 1 task" in site.log(job), "its first step")
            site.hvd("jobs", "cancel", cancelled, "--yes")
            found[name] = Ended(site, complete, mistaken, cancelled)
        yield found


@pytest.mark.parametrize("books", BOOKS)
def test_wait_ends_as_the_job_has(ended, books):
    e = ended[books]
    assert [wait(e.site, job) for job in (e.complete, e.mistaken, e.cancelled)] == [0, 2, 1]


@pytest.mark.parametrize("books", BOOKS)
def test_ended_jobs_are_listed_with_their_reason(ended, books):
    e = ended[books]
    shown = rows(e.site)
    assert {job: row["state"] for job, row in shown.items()} == {
        e.complete: "COMPLETED",
        e.mistaken: "FAILED",
        e.cancelled: "CANCELLED",
    }
    assert shown[e.mistaken]["exit_code"] == 2 and "prepare: a mistake" in shown[e.mistaken]["reason"]
    assert shown[e.complete]["reason"] == "complete" and shown[e.complete]["stage"] == "value"
    refused = e.site.hvd("jobs", "cancel", e.complete, "--yes", check=False)
    assert refused.returncode == 2 and "has ended" in refused.stderr
    unknown = e.site.hvd("jobs", "wait", "999999999", check=False)
    assert unknown.returncode == 2 and "no job 999999999" in unknown.stderr
    forget(e.site.cluster)  # while the next tests go on


# ------------------------------------------------------------------------------------------------------ jobs that live


@dataclass
class Live:
    """What was seen while the job `value` ran, was requeued and was followed to its end, and of a chain beside it."""

    site: Site
    value: str
    chain: list[str]
    by_hand: str
    running: dict[str, dict[str, Any]]
    table: dict[str, dict[str, str]]
    followed: str
    cancelled: str
    cancelled_at: float


@pytest.fixture(scope="module")
def live(slurm, tmp_path_factory):
    root = tmp_path_factory.mktemp("live")
    site = Site(root / "checkout", slurm, root / "shared", slow=0.4)
    (value,) = site.submit("--stage", "value")
    until(lambda: site.step() >= 1 or site.ended(value), lambda: site.log(value))  # it has filled the cache
    chain = site.submit("--stage", "all", "--exp-name", "second")
    by_hand = site.sbatch("--hold", "slurm/value.sbatch", *site.options)
    until(lambda: site.step() >= 25 or site.ended(value), lambda: site.log(value))
    running = rows(site)
    slurm.run("scontrol", "requeue", value)
    follow = subprocess.Popen(
        [sys.executable, "-m", "hvd.cli", "jobs", "logs", value, "-f", "-n", "0"],
        cwd=site.folder,
        env=site.env,
        stdout=subprocess.PIPE,
        text=True,
    )
    second = site.run.with_name("second") / "value" / "checkpoints" / "20"
    until(lambda: second.exists() or site.ended(chain[0]), lambda: site.log(chain[0]))
    table = cells(site)
    cancelled = site.hvd("jobs", "cancel", chain[0], "--yes").stdout
    cancelled_at = time.monotonic()
    followed = follow.communicate(timeout=240)[0]
    return Live(site, value, chain, by_hand, running, table, followed, cancelled, cancelled_at)


def test_a_running_job_is_listed_with_its_progress(live):
    row = live.running[live.value]
    assert (row["state"], row["stage"], row["experiment"]) == ("RUNNING", "value", "runs/demo/value")
    assert row["total"] == STEPS and 20 <= row["step"] < STEPS
    assert row["last_checkpoint"] == 20 and not row["complete"]
    assert 0 < row["steps_per_s"] < 7 and row["eta_s"] > 0
    assert row["restarts"] == 0 and row["waiting_for"] == [] and re.fullmatch(r"node\d", row["nodes"])


def test_jobs_that_wait_are_listed_with_those_they_wait_for(live):
    value, policy, evaluate = live.chain
    for job, stage, after in ((policy, "policy", value), (evaluate, "evaluate", policy)):
        row = live.running[job]
        assert (row["state"], row["stage"], row["waiting_for"]) == ("PENDING", stage, [after])
        assert (live.table[job]["state"], live.table[job]["after"]) == ("PENDING", after)
        assert live.table[job]["reason"] == "Dependency"
    assert live.table[value]["state"] == "RUNNING"
    assert re.fullmatch(rf"\d+/{STEPS}", live.table[value]["step"]) and live.table[value]["checkpoint"] == "20"


def test_a_job_of_plain_sbatch_is_listed_too_and_can_be_cancelled(live):
    row = live.running[live.by_hand]
    assert (row["state"], row["stage"], row["name"], row["reason"]) == ("PENDING", "value", "hvd-value", "JobHeldUser")
    assert live.table[live.by_hand]["stage"] == "value"
    asked = live.site.hvd("jobs", "cancel", live.by_hand, check=False)
    assert asked.returncode == 2 and "add --yes" in asked.stderr
    assert live.site.cluster.show(live.by_hand)["JobState"] == "PENDING"
    live.site.hvd("jobs", "cancel", live.by_hand, "--yes")
    assert live.site.cluster.show(live.by_hand)["JobState"] == "CANCELLED"
    assert wait(live.site, live.by_hand) == 1


def test_logs_follow_a_requeued_job_to_its_end(live):
    assert live.followed == live.site.log(live.value)
    assert live.followed.endswith("ends with exit code 0: complete\n")
    tail = live.site.hvd("jobs", "logs", live.value, "-n", "1").stdout
    assert tail.splitlines() == live.followed.splitlines()[-1:]


def test_restarts_are_listed_by_cause(live):
    assert wait(live.site, live.value) == 0
    row = rows(live.site)[live.value]
    assert (row["state"], row["restarts"], row["causes"]) == ("COMPLETED", 1, {"requeued": 1}), live.followed
    assert (row["step"], row["last_checkpoint"], row["complete"], row["eta_s"]) == (STEPS, STEPS, True, None)
    assert cells(live.site)[live.value]["restarts"] == "1 (1 requeued)"


def test_cancel_takes_along_the_jobs_that_wait_and_none_of_them_comes_back(live):
    value, policy, evaluate = live.chain
    assert f"cancelled {evaluate}, {policy}, {value}" in live.cancelled
    time.sleep(max(0.0, live.cancelled_at + 12 - time.monotonic()))
    for job in live.chain:
        shown = live.site.cluster.show(job)
        assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0"), live.site.log(job)
        assert wait(live.site, job) == 1
    assert "goes back into the queue" not in live.site.log(value)
    assert live.site.log(policy) == ""


# --------------------------------------------------------------------------------------- jobs that Slurm has forgotten


@pytest.mark.parametrize("books", BOOKS)
def test_of_jobs_that_slurm_has_forgotten_the_books_or_their_own_last_words_tell(ended, books):
    e = ended[books]
    until(lambda: not e.site.cluster.run("squeue", "-h", "-t", "all"), "Slurm has forgotten them", 90)
    shown = rows(e.site)
    # A cancelled job has no chance to leave a word.
    last = "UNKNOWN" if books == "none" else "CANCELLED"
    jobs = (e.complete, e.mistaken, e.cancelled)
    assert [shown[job]["state"] for job in jobs] == ["COMPLETED", "FAILED", last]
    assert shown[e.mistaken]["exit_code"] == 2 and "prepare: a mistake" in shown[e.mistaken]["reason"]
    assert [wait(e.site, job) for job in jobs] == [0, 2, 1]
    assert e.site.hvd("jobs", "logs", e.complete).stdout == e.site.log(e.complete)
