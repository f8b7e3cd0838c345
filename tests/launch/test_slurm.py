"""Submission to Slurm, against programs that answer as Slurm's do; tests/clusters has the real one."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from hvd.clusters.slurm import handover as slurm
from hvd.clusters.slurm import script
from hvd.clusters.slurm.site import Site
from hvd.launch import submit

SBATCH = """#!{python}
import os, pathlib, sys
folder = pathlib.Path({folder!r})
with open(folder / "calls", "a") as file:
    file.write(" ".join(a for a in sys.argv[1:] if not a.endswith(".sh")) + "\\n")
if "--test-only" in sys.argv:
    text = sys.stdin.read()
    (folder / "tested").write_text(text)
    answer = folder / "refuse-test"
    if answer.exists() and answer.read_text().split()[0] in text:
        sys.exit("sbatch: " + answer.read_text())
    print("sbatch: Job 9 to start at 2030-01-01T00:00:00 on nodes n1 in partition main", file=sys.stderr)
    sys.exit(0)
refuse = folder / "refuse"
count = len(list(folder.glob("script-*")))
if refuse.exists() and count >= int(refuse.read_text()):
    sys.exit("sbatch: error: Batch job submission failed: Job violates accounting/QOS policy")
(folder / f"script-{{count}}").write_text(pathlib.Path(sys.argv[-1]).read_text())
print(f"Submitted batch job {{100 + count}}")
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A working directory whose PATH has a Slurm; the folder where its sbatch leaves notes."""
    bin_, notes, work = tmp_path / "bin", tmp_path / "notes", tmp_path / "work"
    for folder in (bin_, notes, work):
        folder.mkdir()
    programs = {
        "sbatch": SBATCH.format(python=sys.executable, folder=str(notes)),
        "scontrol": "#!/bin/sh\n[ $1 = ping ]\n",
        "srun": "#!/bin/sh\n",
        "scancel": f"#!/bin/sh\necho scancel $* >> {notes}/calls\n",
    }
    for name, text in programs.items():
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("HVD_SITE", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.chdir(work)
    return notes


def calls(cluster):
    return (cluster / "calls").read_text().splitlines()


def test_all_stages_go_into_the_queue_one_after_the_other(cluster, capsys):
    assert submit.main(["--stage", "all", "--nodes", "2"]) == 0
    after = "--dependency=afterok:{} --kill-on-invalid-dep=yes"
    tested = ["--test-only"] * 3
    assert [line.strip() for line in calls(cluster)] == [*tested, "", after.format(100), after.format(101)]
    names = [(cluster / f"script-{i}").read_text().splitlines()[1:3] for i in range(3)]
    assert names == [
        ["#SBATCH --job-name=hvd-value", "#SBATCH --nodes=2"],
        ["#SBATCH --job-name=hvd-policy", "#SBATCH --nodes=2"],
        ["#SBATCH --job-name=hvd-evaluate", "#SBATCH --nodes=1"],
    ]
    printed = capsys.readouterr().out
    assert "value: nodes=2 ntasks-per-node=1 cpus-per-task=2 mem=6G" in printed
    assert "policy: job 101, after the value job; log slurm/jobs/101.log" in printed


def test_what_is_left_on_the_disk(cluster):
    assert submit.main(["--stage", "all"]) == 0
    files = sorted(str(path) for path in Path("slurm").rglob("*") if not path.is_dir())
    assert files == sorted(
        f"slurm/jobs/{i}/{name}" for i in (100, 101, 102) for name in ("job.json", f"{i}_submission.sh")
    ), "no pickle, no temporary file, no link"
    (config,) = (path for path in Path("runs").rglob("*") if not path.is_dir())
    assert re.fullmatch(r"runs/demo/configs/[0-9a-f]{12}\.yaml", str(config))
    about = json.loads(Path("slurm/jobs/101/job.json").read_text())
    assert about["after"] == "100" and about["stage"] == "policy" and about["run_dir"] == "runs/demo/policy"
    assert about["options"] == ["--config-file", str(config)] and about["log"] == "slurm/jobs/101.log"


def test_what_slurm_could_never_run_is_refused_before_anything_is_submitted(cluster, capsys):
    (cluster / "refuse-test").write_text(
        "error: Batch job submission failed: Requested node configuration is not available"
    )
    (cluster / "refuse-test").write_text(
        "#!/bin/bash allocation failure: Requested node configuration is not available"
    )
    assert submit.main(["--stage", "all"]) == 2
    line = capsys.readouterr().err
    assert "Slurm cannot run the value job: " in line and "Requested node configuration is not available" in line
    assert "slurm/site.toml" in line and line.count("\n") == 1
    assert not list(Path.cwd().iterdir()) and not list(cluster.glob("script-*"))


def test_a_refused_second_job_takes_the_first_one_back(cluster, capsys):
    (cluster / "refuse").write_text("1")
    assert submit.main(["--stage", "all"]) == 2
    assert "sbatch refuses the policy job: error: Batch job submission failed" in capsys.readouterr().err
    assert calls(cluster)[-1] == "scancel 100"
    assert not list(Path("slurm/jobs").glob(".*"))


def test_a_silent_controller_is_not_the_users_mistake(cluster, capsys):
    (cluster / "refuse-test").write_text("#!/bin/bash error: Unable to contact slurm controller (connect failure)")
    assert submit.main(["--stage", "value"]) == 1
    assert capsys.readouterr().err.startswith("failed: Slurm does not answer: ")


def test_gpus_need_a_jax_that_has_cuda(cluster, capsys, monkeypatch):
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
    assert submit.main(["--stage", "value", "--accelerator", "gpu"]) == 2
    assert "this environment's jax has no CUDA: `uv sync --extra cuda12`" in capsys.readouterr().err
    assert submit.main(["--stage", "value"]) == 0, "the demo asks for none"
    assert "gpus" not in (cluster / "script-0").read_text().partition("hvd: ")[0]


def test_hvd_is_called_as_the_working_directory_has_it(cluster):
    python = f"{sys.executable} -m hvd.cli"
    assert script.with_command(Site()).command == python, "no .venv here"
    assert script.with_command(Site(command="mine")).command == "mine"
    assert script.with_command(Site(container="pyxis", image="x")).command == ""
    Path(".venv/bin").mkdir(parents=True)
    Path(".venv/bin/python").touch()
    assert script.with_command(Site()).command == "", "the script's own default"


def test_the_batch_must_be_divisible_by_the_devices_of_all_nodes(cluster, capsys):
    assert submit.main(["--stage", "value", "--nodes", "3"]) == 2
    assert "value.batch_size 64 is not divisible by the 3 devices" in capsys.readouterr().err


def test_a_policy_job_may_wait_for_a_value_job(cluster, capsys):
    assert submit.main(["--stage", "policy"]) == 2, "there is no complete value run"
    assert submit.main(["--stage", "policy", "--after", "7"]) == 0
    assert calls(cluster)[-1].strip() == "--dependency=afterok:7 --kill-on-invalid-dep=yes"
    assert submit.main(["--stage", "policy", "--after", "7;id"]) == 2


def test_without_sbatch(cluster, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert submit.main(["--stage", "value", "--cluster", "slurm"]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err


def test_what_slurm_has_accepted_is_taken_back_when_it_cannot_be_recorded(cluster, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "slurm/jobs/100")

    monkeypatch.setattr(slurm, "_record", full)
    assert submit.main(["--stage", "value"]) == 1
    printed = capsys.readouterr().err
    assert "cancelled again: job 100" in printed and "failed: slurm/jobs/100: No space left on device" in printed
    assert calls(cluster)[-1] == "scancel 100"
