"""Batch scripts: golden ones, the shipped ones, and what their parameters do."""

import dataclasses
import subprocess
import sys

import pytest

from hvd.clusters.slurm import batch
from hvd.clusters.slurm.batch import Request, Step
from hvd.clusters.slurm.site import Site
from hvd.launch import gpu_environment
from tests.launch import golden_scripts

CPU = Request("value", (Step("all", ("train-value",)),), ("--config", "demo"), 1, 0)
GPU = dataclasses.replace(CPU, gpus=8, nodes=2)


@pytest.mark.parametrize("name", golden_scripts.CASES)
def test_golden(name, tmp_path):
    text = golden_scripts.render(golden_scripts.CASES[name], golden_scripts.make_data(tmp_path))
    assert text == (golden_scripts.GOLDEN / f"{name}.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.parametrize("name", golden_scripts.SHIPPED)
def test_the_shipped_files_are_what_a_dry_run_prints_for_the_default_site(name, tmp_path):
    text = golden_scripts.render(golden_scripts.SHIPPED[name], tmp_path)
    assert text == (golden_scripts.ROOT / "slurm" / name).read_text()


@pytest.mark.parametrize(
    "request_, changes, want",
    [
        (CPU, {}, {"nodes": "1", "ntasks-per-node": "1", "cpus-per-task": "2", "mem": "6G", "time": "1-00:00:00"}),
        (CPU, {"cpus": 8, "tasks_per_node": 4, "mem": "512M"}, {"cpus-per-task": "2", "mem": "512M"}),
        (GPU, {}, {"nodes": "2", "gpus-per-node": "8", "cpus-per-task": "96", "mem": "800G"}),
        (GPU, {"tasks_per_node": 8}, {"ntasks-per-node": "8", "cpus-per-task": "12"}),
        (GPU, {"gres_type": "h100"}, {"gpus-per-node": "h100:8"}),
        (CPU, {"partition": "p", "account": "a", "qos": "q"}, {"partition": "p", "account": "a", "qos": "q"}),
        (CPU, {"constraint": "c", "reservation": "r", "exclude": "n1"}, {"constraint": "c", "reservation": "r"}),
        (CPU, {"exclude": "n[1-3]"}, {"exclude": "n[1-3]"}),
        (CPU, {"exclusive": True}, {"exclusive": None}),
        (CPU, {"requeue": False}, {"no-requeue": None}),
        (CPU, {"requeue": True}, {"requeue": None, "open-mode": "append"}),
        (CPU, {"grace": 90}, {"signal": "USR1@90"}),
        (CPU, {}, {"job-name": "hvd-value", "output": "slurm/jobs/%j.log"}),
    ],
)
def test_parameters(request_, changes, want):
    found = batch.directives(request_, dataclasses.replace(Site(), **changes))
    assert {name: found[name] for name in want} == want


def test_what_is_not_set_is_not_asked_for():
    found = batch.directives(CPU, dataclasses.replace(Site(), grace=0))
    assert not {"partition", "account", "gpus-per-node", "signal", "exclusive", "exclude"} & found.keys()


def test_settings_of_gpus_have_reasons_and_are_for_their_kind():
    assert all(len(row.reason) > 20 for row in gpu_environment.TABLE)
    names = {row.name for row in gpu_environment.settings("rtx4090-24gb", 2)}
    assert "NCCL_P2P_DISABLE" in names and "XLA_FLAGS" not in names
    assert "XLA_FLAGS" in {row.name for row in gpu_environment.settings("h100-80gb", 8)}
    assert [row.name for row in gpu_environment.settings("", 1)] == ["TF_CPP_MIN_LOG_LEVEL"]


def test_xla_knows_the_flags_of_the_table():
    """An unknown flag ends a process before it has said anything; the flags of GPUs are known to every build."""
    flags = " ".join(row.value for row in gpu_environment.TABLE if row.name == "XLA_FLAGS")
    code = f"import os; os.environ['XLA_FLAGS'] = {flags!r}; import jax; jax.devices()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
