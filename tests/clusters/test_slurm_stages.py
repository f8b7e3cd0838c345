"""Both stages on two nodes from one command, in all shapes of processes (C1), and two jobs on one run directory."""

import json
import time

import numpy as np
import pytest

from tests.clusters.site import STEPS, Site, until
from tests.train import compare

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def both(slurm, tmp_path_factory):
    """(site, ids) of `--stage all --nodes 2`, one task with two devices a node and one task with one: all complete."""
    root = tmp_path_factory.mktemp("stages")
    sites = {name: Site(root / name, slurm, root / "shared") for name in ("two_nodes", "four_tasks", "local")}
    ids = {"two_nodes": sites["two_nodes"].submit("--stage", "all", "--nodes", "2")}
    flags = ("--slurm.tasks-per-node", "2", "--slurm.cpus", "2")
    ids["four_tasks"] = sites["four_tasks"].submit("--stage", "value", "--nodes", "2", *flags)
    for name, jobs in ids.items():
        for job in jobs:
            slurm.wait_state(job, "COMPLETED", timeout=400)
            assert sites[name].ended(job) == "0 complete"
    return sites, ids


def test_the_stages_follow_one_another(both, slurm):
    sites, ids = both
    value, policy, evaluate = (slurm.show(job) for job in ids["two_nodes"])
    assert value["EndTime"] <= policy["StartTime"] and policy["EndTime"] <= evaluate["StartTime"]
    assert value["NumNodes"] == policy["NumNodes"] == "2" and evaluate["NumNodes"] == "1"
    site = sites["two_nodes"]
    assert (site.run / "report.html").is_file()
    site.hvd("verify", *site.options)
    for stage, job in zip(("value", "policy"), ids["two_nodes"], strict=False):
        starts = [event for event in site.events(stage) if event["event"] == "start"]
        assert len(starts) == 1 and starts[0]["processes"] == 2
        first = next(event["seconds"] for event in site.events(stage) if event["event"] == "first_step")
        print(f"{stage}: job {job}, {first:.1f} s from the start of the step to its first training step")


def test_the_results_are_those_of_a_local_run(both):
    sites, _ = both
    local = sites["local"]
    env = {"JAX_PLATFORMS": "cpu"}
    local.env |= env
    for step in ("prepare", "train-value", "advantages", "train-policy"):
        local.hvd(step, *local.options)
    for stage in ("value", "policy"):
        ours, theirs = (compare.arrays(sites[name].run / stage, STEPS) for name in ("two_nodes", "local"))
        assert ours.keys() == theirs.keys()
        for name, array in ours.items():
            np.testing.assert_allclose(array, theirs[name], rtol=2e-3, atol=2e-4, err_msg=f"{stage} {name}")
        kept = ("step", "samples")
        samples = [
            [{k: line[k] for k in kept} for line in compare.lines(sites[name].run / stage / "samples.jsonl")]
            for name in ("two_nodes", "local")
        ]
        assert samples[0] == samples[1]


def test_two_tasks_on_each_node_are_four_processes_of_the_same_run(both):
    sites, _ = both
    starts = [event for event in sites["four_tasks"].events() if event["event"] == "start"]
    assert starts[0]["processes"] == starts[0]["devices"] == 4
    ours, theirs = (compare.arrays(sites[name].run / "value", STEPS) for name in ("four_tasks", "two_nodes"))
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=2e-3, atol=2e-4, err_msg=name)


def test_a_task_may_have_several_devices(both, slurm, tmp_path):
    site = Site(tmp_path / "devices", slurm, tmp_path / "shared")
    site.env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    (job,) = site.submit("--stage", "value", "--nodes", "2", "--value.num_train_steps", "10", "--fsdp_devices", "0")
    slurm.wait_state(job, "COMPLETED", timeout=300)
    start = site.events()[0]
    assert (start["devices"], start["processes"]) == (4, 2)


def test_a_second_job_on_a_run_directory_refuses_and_names_the_first(slurm, tmp_path_factory):
    root = tmp_path_factory.mktemp("owners")
    site = Site(root / "site", slurm, root / "shared", slow=0.8)
    (first,) = site.submit("--stage", "value", "--slurm.no-requeue")
    until(lambda: site.step() >= 5, lambda: site.log(first))
    owner = json.loads((site.run / "value" / "owner.json").read_text())
    (second,) = site.submit("--stage", "value")
    shown = slurm.wait_state(second, "FAILED", timeout=200)
    assert shown["ExitCode"] == "2:0" and shown["Restarts"] == "0"
    assert f"is being worked on by Slurm job {first} on {owner['host']}" in site.log(second)
    assert site.ended(second).startswith("2 train-value")

    # The first goes down with its node and cannot let go: that it is gone is asked of Slurm, and known at once
    slurm.kill_node(owner["host"])
    slurm.wait_state(first, "NODE_FAIL", timeout=60)
    slurm.start_node(owner["host"])
    began = time.monotonic()
    assert (site.run / "value" / "owner.json").exists()
    (third,) = site.submit("--stage", "value")
    until(lambda: [event["event"] for event in site.events()].count("first_step") == 2, lambda: site.log(third), 200)
    print(f"taken over and at work after {time.monotonic() - began:.0f} s")
    assert json.loads((site.run / "value" / "owner.json").read_text())["job"] == third
    slurm.run("scancel", third)
