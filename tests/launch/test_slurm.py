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
surrounding = sorted(name for name in os.environ if name.startswith(("SBATCH_", "SLURM_")))
(folder / "environment").write_text(" ".join(surrounding))
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
answer = folder / "answer"
print(answer.read_text() if answer.exists() else f"Submitted batch job {{100 + count}}")
(folder / "command").write_text(os.path.abspath(sys.argv[-1]))
if (folder / "lost").exists():
    sys.exit("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
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
        "squeue": f'#!/bin/sh\n[ ! -e {notes}/silent ] && echo "55 /a/b.sh" && echo "56 $(cat {notes}/command)"\n',
        "sinfo": f"#!/bin/sh\ncat {notes}/nodes 2>/dev/null || echo idle\n",
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


# ------------------------------------------------------------------------------- what surrounds the launcher and sbatch


def test_variables_of_a_site_that_would_win_over_what_is_asked_for_are_set_aside_and_named(
    cluster, capsys, monkeypatch
):
    given = {"SBATCH_QOS": "low", "SBATCH_TIMELIMIT": "3", "SBATCH_MEM_PER_CPU": "9M", "SBATCH_NO_REQUEUE": "1"}
    given |= {"SBATCH_ARRAY_INX": "1-9", "SBATCH_GRES": "gpu:2", "SBATCH_WAIT": "1"}
    for name, value in {**given, "SBATCH_ACCOUNT": "team", "SBATCH_DEBUG": "1", "SLURM_CONF": "/c"}.items():
        monkeypatch.setenv(name, value)
    assert submit.main(["--stage", "value", "--slurm.qos", "high"]) == 0
    assert (cluster / "environment").read_text() == "SBATCH_ACCOUNT SBATCH_DEBUG SLURM_CONF"
    printed = capsys.readouterr().out
    aside, kept = (line for line in printed.splitlines() if line.startswith("of this environment"))
    assert all(f"{name}={value}" in aside for name, value in given.items()) and "set aside" in aside
    assert "SBATCH_ACCOUNT=team: kept" in kept
    assert submit.main(["--stage", "value"]) == 0, "nothing is said of a quality of service: the site's own stays"
    assert "SBATCH_QOS" in (cluster / "environment").read_text()


def test_a_job_from_inside_of_a_job_inherits_nothing_of_it(cluster, monkeypatch):
    names = ("JOB_ID", "MEM_PER_CPU", "GPUS_ON_NODE", "RESTART_COUNT", "STEP_GPUS", "CPU_BIND")
    for name in (*names, "CONF", "JWT"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    assert submit.main(["--stage", "value", "--cluster", "slurm"]) == 0
    assert (cluster / "environment").read_text() == "SLURM_CONF SLURM_JWT"


@pytest.mark.parametrize(
    "answer, number",
    [
        ("4711", "4711"),
        ("4711;big", "4711"),
        ("Submitted batch job 4711 on cluster big", "4711"),
        ("Welcome, job 3 of yours has ended\n--> jobname OK\nSubmitted batch job 4711\n", "4711"),
        ("Your last job 3 failed.\n4711;big\n", "4711"),
        ("thank you", "56"),  # the queue has a job that runs this very script
        ("Your last job 3 failed.", "56"),
    ],
)
def test_every_form_of_sbatchs_answer(cluster, capsys, answer, number):
    (cluster / "answer").write_text(answer)
    assert submit.main(["--stage", "value"]) == 0
    assert f"value: job {number}; log slurm/jobs/{number}.log" in capsys.readouterr().out
    assert json.loads(Path(f"slurm/jobs/{number}/job.json").read_text())["id"] == number


def test_a_job_whose_id_nobody_tells_is_named(cluster, capsys):
    for name, text in {"answer": "thank you", "silent": ""}.items():
        (cluster / name).write_text(text)
    assert submit.main(["--stage", "value"]) == 1
    line = capsys.readouterr().err
    assert "sbatch's answer 'thank you' has no job id" in line and (cluster / "command").read_text() in line


def test_a_job_that_was_taken_before_the_answer_was_lost_is_taken_back(cluster, capsys):
    (cluster / "lost").touch()
    assert submit.main(["--stage", "value"]) == 2
    assert calls(cluster)[-1] == "scancel 56" and "cancelled again: job 56" in capsys.readouterr().err


def test_a_job_that_cannot_be_taken_back_is_named(cluster, capsys):
    (cluster / "lost").touch()
    (cluster.parent / "bin" / "scancel").write_text("#!/bin/sh\nexit 1\n")
    assert submit.main(["--stage", "value"]) == 2
    assert "job 56 is in the queue and could not be cancelled" in capsys.readouterr().err


def test_of_several_clusters_the_one_that_has_the_job_is_told_to_cancel_it(cluster):
    (cluster / "answer").write_text("Submitted batch job 7 on cluster big")
    (cluster / "refuse").write_text("1")
    assert submit.main(["--stage", "all", "--slurm.clusters", "small,big"]) == 2
    assert calls(cluster)[-1] == "scancel -M big 7"


NODES = "#!/bin/bash allocation failure: Requested node configuration is not available"


@pytest.mark.parametrize(
    "refusal, nodes, code",
    [
        (NODES, "idle mixed", 2),
        (NODES, "idle drained", 0),
        (NODES, "down*", 0),
        ("#!/bin/bash allocation failure: Requested nodes are busy", "idle", 0),
        ("#!/bin/bash allocation failure: Invalid partition name specified", "drained", 2),
    ],
)
def test_a_job_that_only_waits_for_nodes_is_queued(cluster, capsys, refusal, nodes, code):
    (cluster / "refuse-test").write_text(refusal)
    (cluster / "nodes").write_text(nodes)
    assert submit.main(["--stage", "value"]) == code
    assert ("value: not now" in capsys.readouterr().out) == (code == 0) == bool(list(cluster.glob("script-*")))
    assert submit.main(["--stage", "value", "--slurm.no-test"]) == 0, "sbatch itself has the last word"


def test_the_evaluation_by_itself(cluster, capsys):
    assert submit.main(["--stage", "evaluate"]) == 2 and "no run at runs/demo/policy" in capsys.readouterr().err
    asked = ["--stage", "evaluate", "--after", "7", "--exp-name", "mine", "--accelerator", "gpu", "--no-plan"]
    command = ["--slurm.command", "hvd", "--slurm.tasks-per-node", "4", "--policy.batch_size", "64"]
    assert submit.main([*asked, *command]) == 0
    assert "#SBATCH --gpus-per-node=8" in (cluster / "script-0").read_text(), "its baselines are trained on all"
    assert submit.main([*asked, *command, "--evaluate.no-baselines"]) == 0
    lines = (cluster / "script-1").read_text().splitlines()
    assert {"#SBATCH --gpus-per-node=1", "#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=12"} <= {*lines}
    assert json.loads(Path("slurm/jobs/101/job.json").read_text())["exp_dir"] == "runs/mine"


def test_options_of_sbatch_are_given_with_their_dashes(cluster):
    given = ["--slurm.extra", "--mail-type=FAIL", "--slurm.extra=--nice=5", "--slurm.qos", "q"]
    assert submit.main(["--stage", "value", *given]) == 0
    lines = (cluster / "script-0").read_text().splitlines()
    assert {"#SBATCH --mail-type=FAIL", "#SBATCH --nice=5", "#SBATCH --qos=q"} <= {*lines}
