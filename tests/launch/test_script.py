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
from hvd.errors import UserError
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
        (GPU, {"gpus_as": "gres", "gres_type": "h100"}, {"gres": "gpu:h100:8"}),
        (GPU, {"mem_per_cpu": "4G"}, {"mem-per-cpu": "4G"}),
        (CPU, {"constraint": "(a|b)&c", "clusters": "big"}, {"constraint": "(a|b)&c", "clusters": "big"}),
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
    by_digest = Site(container="pyxis", image="docker://r/hvd@sha256:ab")
    text = script.render(dataclasses.replace(CPU, site=by_digest))
    assert "\nexport HVD_IMAGE=docker://r/hvd@sha256:ab\n" in text


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


@pytest.mark.parametrize(
    "job, changes, gone, written",
    [
        (GPU, {"gpus_as": "gres"}, "gpus-per-node", "--gres=gpu:8"),
        (GPU, {"extra": ("--gres=gpu:a100:8,tmp:1",)}, "gpus-per-node", "--gres=gpu:a100:8,tmp:1"),
        (GPU, {"extra": ("--gres=tmp:1",)}, "", "--gpus-per-node=8"),
        (GPU, {"extra": ("--gpus-per-task=8",)}, "gpus-per-node", "--gpus-per-task=8"),
        (CPU, {"extra": ("--mem-per-cpu=1G",)}, "mem", "--mem-per-cpu=1G"),
        (CPU, {"mem": ""}, "mem", "--nodes=1"),
        (GPU, {"mem_per_gpu": ""}, "mem", "--nodes=2"),
        (GPU, {"mem_per_cpu": "4G"}, "mem", "--mem-per-cpu=4G"),
        (CPU, {"extra": ("-C", "--time=5")}, "constraint", "--time=5"),
        (CPU, {"extra": ("--array=1-5%1",)}, "", "--array=1-5%1"),
    ],
)
def test_one_option_of_a_kind_is_written(job, changes, gone, written):
    job = dataclasses.replace(job, site=dataclasses.replace(Site(), **changes))
    lines = [line.removeprefix("#SBATCH ") for line in script.render(job).splitlines() if line.startswith("#SBATCH ")]
    assert written in lines and written.removeprefix("--") in job.describe().split()
    assert not gone or not [line for line in lines if line.startswith(f"--{gone}=")]
    assert len({line.partition("=")[0] for line in lines}) == len(lines)


@pytest.mark.parametrize(
    "option, message",
    [
        ("--gres=gpu:a100:4", "is 4 GPUs of a node, the value job is for 8"),
        ("--gres=gpu", "is 1 GPUs of a node"),
        ("--gpus-per-node=a100:2", "is 2 GPUs of a node"),
        ("--gpus=8", "is 4 GPUs of a node"),
        ("--gpus-per-task=a100:2", "is 2 GPUs of a node"),
        ("--nodes=4", "the launcher's --nodes"),
        ("-n4", "the launcher's --nodes"),
        ("--array=1-5", "one run; --array=1-5%1"),
    ],
)
def test_an_option_that_contradicts_the_plan_is_refused(option, message):
    with pytest.raises(UserError) as error:
        script.render(dataclasses.replace(GPU, site=dataclasses.replace(Site(), extra=(option,))))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "image, want",
    [
        ("hvd.sqsh", "./hvd.sqsh"),
        ("images/hvd.sqsh", "./images/hvd.sqsh"),
        ("/data/hvd.sqsh", "/data/hvd.sqsh"),
        ("registry.example/robots/hvd:1", "registry.example#robots/hvd:1"),
        ("localhost:5000/hvd", "localhost:5000#hvd"),
        ("docker://registry.example/hvd", "docker://registry.example#hvd"),
        ("registry.example#robots/hvd:1", "registry.example#robots/hvd:1"),
        ("robots/hvd:1", "robots/hvd:1"),  # Docker Hub's
        ("debian", "debian"),
    ],
)
def test_an_image_in_the_words_of_pyxis(image, want):
    assert f"--container-image={want} " in calls(CPU, container="pyxis", image=image)


def test_a_percent_sign_in_the_folder_s_name_is_not_slurm_s(tmp_path, monkeypatch):
    folder = tmp_path / "my %j runs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    want = str(folder).replace("%", "%%")
    assert f'#SBATCH --output="{want}/slurm/jobs/%j.log"\n' in script.render(CPU)
