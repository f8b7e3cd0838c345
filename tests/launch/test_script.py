"""Batch scripts: the shipped ones, a golden one, what their parameters do, and the program that they source."""

import dataclasses
import shutil
import subprocess
import sys

import pytest

from hvd import gpu_environment
from hvd.clusters.slurm import script
from hvd.clusters.slurm.script import BatchJob
from hvd.clusters.slurm.site import Site
from hvd.stages import Step
from tests.launch.golden_scripts import CASES, ROOT, render

CPU = BatchJob("value", (Step("train-value", "train-value", spread=True),), ("--config", "demo"), 1, 0, Site())
GPU = dataclasses.replace(CPU, gpus=8, nodes=2)


@pytest.mark.parametrize("name", CASES)
def test_the_scripts_are_what_a_dry_run_prints(name):
    text = render(CASES[name])
    assert text == (ROOT / name).read_text(), "python -m tests.launch.golden_scripts"
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck on this machine")
def test_the_batch_program_and_the_shipped_scripts_pass_shellcheck():
    files = ["slurm/job.sh", "slurm/value.sbatch", "slurm/awr.sbatch"]
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "job, changes, want",
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
def test_parameters(job, changes, want):
    asked = script.directives(dataclasses.replace(job, site=dataclasses.replace(Site(), **changes)))
    assert {name: asked[name] for name in want} == want


def test_what_is_not_set_is_not_asked_for():
    asked = script.directives(dataclasses.replace(CPU, site=dataclasses.replace(Site(), grace=0)))
    assert not {"partition", "account", "gpus-per-node", "signal", "exclusive", "exclude"} & asked.keys()


def calls(job: BatchJob, **changes: object) -> str:
    """How the rendered script calls hvd."""
    text = script.render(dataclasses.replace(job, site=dataclasses.replace(Site(), **changes)))
    return next(line for line in text.splitlines() if line.startswith("hvd=("))


def test_hvd_is_called_in_the_container_or_environment_of_the_site():
    assert calls(CPU, command="conda run -n hvd hvd") == "hvd=(conda run -n hvd hvd)"
    assert calls(CPU, container="apptainer", image="/i.sif", mounts=("/data:/data", "/scratch")) == (
        'hvd=(apptainer exec ${HVD_EXPECT_GPUS:+--nv} --pwd "$PWD" --bind "$PWD" '
        "--bind /data:/data --bind /scratch /i.sif hvd)"
    )
    assert calls(CPU, container="pyxis", image="/i.sqsh") == (
        'hvd=(--container-image=/i.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD" '
        "--no-container-mount-home hvd)"
    )


def test_the_batch_program_is_found_outside_of_a_checkout(tmp_path, monkeypatch):
    assert script.job_sh() == str(ROOT / "slurm" / "job.sh") or script.job_sh() == "slurm/job.sh"
    monkeypatch.chdir(tmp_path)
    assert f"\n. {ROOT}/slurm/job.sh || exit 2\n" in script.render(CPU)


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
