"""The policy stage starts once, and only on a complete value run (acceptance C2 and C3)."""

import copy
import os
import shutil
import signal
import time

import pytest

from hvd.clusters.slurm.queue import ENDED
from tests.clusters.site import STEPS, Site, until
from tests.clusters.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]

# The README's line.
AFTER = "sbatch --dependency=afterok:$V --kill-on-invalid-dep=yes slurm/awr.sbatch"


def seconds(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))


def ended(cluster: SlurmCluster, job: str, within: float) -> dict[str, str]:
    """The job's fields once it has ended, however."""
    until(lambda: cluster.show(job)["JobState"] in ENDED, lambda: f"{job}: {cluster.show(job)}", within)
    return cluster.show(job)


def number(answer: str) -> str:
    """Of `Submitted batch job 123`."""
    return answer.split()[-1]


@pytest.fixture(scope="module")
def pair(slurm, tmp_path_factory):
    """(site, value job, policy job): the value job's training was killed on the way, by now both jobs have ended."""
    root = tmp_path_factory.mktemp("order")
    site = Site(root / "checkout", slurm, root / "shared", slow=0.3)
    (value,) = site.submit("--stage", "value")
    policy = number(site.call("bash", "-c", f'{AFTER} "$@"', "bash", *site.options, V=value).stdout)
    until(lambda: site.ended(value) or site.step() >= 25, lambda: f"step 25: {site.log(value)}")
    assert not site.ended(value), site.log(value)
    (node,) = slurm.run("scontrol", "show", "hostnames", slurm.show(value)["NodeList"]).split()
    training = [pid for pid, line in slurm.node_processes(node) if "train-value" in line and "srun" not in line]
    os.kill(training[0], signal.SIGKILL)
    for job in (value, policy):
        try:
            slurm.wait_state(job, "COMPLETED", timeout=500)
        except AssertionError as error:
            pytest.fail(f"{error}\n{site.log(value)}\n{site.log(policy)}")
    return site, value, policy


def test_a_value_job_that_fails_by_a_mistake_cancels_the_policy_job_that_has_never_run(slurm, tmp_path):
    site = Site(tmp_path / "checkout", slurm, tmp_path / "shared")
    lines = f"V=$(sbatch --parsable slurm/value.sbatch --config nonsense) && echo $V && {AFTER} --config nonsense"
    value, policy = map(number, site.call("bash", "-c", lines).stdout.splitlines())
    failed = ended(slurm, value, 60)
    assert (failed["JobState"], failed["ExitCode"], failed["Restarts"]) == ("FAILED", "2:0", "0"), site.log(value)
    assert site.ended(value).startswith("2 prepare: a mistake")
    assert "nonsense" in site.log(value) and "Traceback" not in site.log(value)

    cancelled = ended(slurm, policy, 15)
    assert cancelled["JobState"] == "CANCELLED", cancelled
    assert seconds(cancelled["EndTime"]) - seconds(failed["EndTime"]) <= 10
    assert site.log(policy) == "" and not (site.folder / "slurm" / "jobs" / policy).exists()
    assert not (site.folder / "runs").exists()


def test_a_killed_value_job_is_completed_by_its_restart(slurm, pair):
    site, value, _ = pair
    assert site.restarts(value) == ["killed"], site.log(value)
    assert slurm.show(value)["Restarts"] == "1" and site.ended(value) == "0 complete"
    first, second = (event["step"] for event in site.events() if event["event"] == "start")
    assert first == 0 and 20 <= second < STEPS, "it went on from a checkpoint"


def test_the_policy_job_starts_once_and_only_after_the_end_of_the_value_job(slurm, pair):
    site, value, policy = pair
    shown = slurm.show(policy)
    assert seconds(shown["StartTime"]) >= seconds(slurm.show(value)["EndTime"])
    assert shown["Restarts"] == "0" and site.restarts(policy) == []
    assert site.log(policy).count(f"job {policy}, attempt ") == 1
    assert [event["event"] for event in site.events("policy")].count("start") == 1
    site.hvd("verify", *site.options)


@pytest.fixture(scope="module")
def damaged(pair, tmp_path_factory):
    """(site, file): a copy of the checkout with its value run, of whose final checkpoint one byte is another."""
    site = copy.copy(pair[0])
    folder = tmp_path_factory.mktemp("damaged") / "checkout"
    ignored = shutil.ignore_patterns("jobs", "policy", "advantages")
    shutil.copytree(site.folder, folder, symlinks=True, ignore=ignored)
    (folder / "slurm" / "jobs").mkdir()
    site.folder = folder
    params = site.run / "value" / "checkpoints" / str(STEPS) / "params"
    file = max((path for path in params.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return site, str(file.relative_to(folder))


def test_a_policy_job_refuses_a_value_run_with_one_byte_flipped(slurm, pair, damaged):
    site, file = damaged
    policy = number(site.call("bash", "-c", f'{AFTER} "$@"', "bash", *site.options, V=pair[1]).stdout)
    failed = ended(slurm, policy, 120)
    assert (failed["JobState"], failed["ExitCode"], failed["Restarts"]) == ("FAILED", "2:0", "0"), site.log(policy)
    assert site.ended(policy).startswith("2 advantages: a mistake") and site.restarts(policy) == []
    assert f"{file} is corrupted" in site.log(policy) and "Traceback" not in site.log(policy)
    assert not (site.run / "policy").exists() and not (site.run / "advantages").exists()


def test_the_launcher_refuses_it_too_and_submits_nothing(slurm, damaged):
    site, file = damaged
    known = slurm.run("squeue", "-h", "-t", "all", "-o", "%i").split()
    before = sorted(site.folder.rglob("*"))
    refused = site.launch("--stage", "policy", check=False)
    assert refused.returncode == 2, refused.stderr
    assert f"{file} is corrupted" in refused.stderr and "Traceback" not in refused.stderr
    assert slurm.run("squeue", "-h", "-t", "all", "-o", "%i").split() == known
    assert sorted(site.folder.rglob("*")) == before
