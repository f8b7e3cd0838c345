"""What the batch script makes of a step's end: done, back into the queue, failed. The script runs; Slurm is faked."""

import os
import subprocess
from pathlib import Path

import pytest

from hvd.clusters.slurm import script
from hvd.clusters.slurm.script import BatchJob
from hvd.clusters.slurm.site import Site
from hvd.stages import Step

STEPS = (Step("prepare", "prepare"), Step("train-value", "train-value", ("--overwrite",), spread=True))
JOB = BatchJob("value", STEPS, ("--config", "demo"), 2, 0, Site())
SOON = "2020-01-01T00:00:00"  # an end of the job that is near, or over
RUNNING = "JobId=7 JobName=x JobState=RUNNING Reason=None Restarts=0 PreemptTime=None EndTime=Unknown"

# $1 = number of tasks; the processes of the step say what $FOLDER/said holds, "-" says nothing
SRUN = """#!/bin/bash
echo "$*" >>"$FOLDER/srun"
case "$*" in *prepare*) exit 0 ;; esac
mkdir -p "$HVD_JOB_DIR/exit"; rank=0
for code in $(cat "$FOLDER/said"); do [ $code = - ] || echo $code >"$HVD_JOB_DIR/exit/$rank"; rank=$((rank + 1)); done
[ ! -e "$FOLDER/terminate" ] || { kill -TERM $PPID; sleep 0.3; }
exit $(cat "$FOLDER/code")
"""
SCONTROL = """#!/bin/bash
case $1 in
  show) cat "$FOLDER/job" ;;
  requeue)
    echo "$2" >>"$FOLDER/requeued"
    [ ! -e "$FOLDER/requeue-code" ] || exit $(cat "$FOLDER/requeue-code")
    kill -TERM $PPID; sleep 0.2 ;; # Slurm ends the attempt, and may do so before the script has gone
esac
"""
SINFO = '#!/bin/bash\ncat "$FOLDER/down" 2>/dev/null\n'


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Runs the script once; returns (exit code, what it printed, the job's folder)."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sinfo": SINFO, "squeue": "#!/bin/bash\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "value.sbatch"
    path.write_text(script.render(JOB))

    def run(said: str, code: int, *, job: str = RUNNING, restarts: int = 0, inherited=None, **files: str):
        job = job.replace("Restarts=0", f"Restarts={restarts}")
        for name, text in {"said": said, "code": str(code), "job": job, **files}.items():
            (tmp_path / name.replace("_", "-")).write_text(text)
        env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "FOLDER": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_RESTART_COUNT": str(restarts),
            **(inherited or {}),
        }
        done = subprocess.run(["bash", str(path)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, tmp_path / "slurm" / "jobs" / "7"

    return run


def requeued(folder: Path) -> bool:
    return (folder.parents[2] / "requeued").exists()


def test_a_stage_that_is_complete(attempt):
    code, _, folder = attempt("0 0", 0)
    assert code == 0 and (folder / "end").read_text().endswith(" 0 complete\n") and not requeued(folder)
    first, second = (folder.parents[2] / "srun").read_text().splitlines()
    assert "--nodes=1 --ntasks=1" in first and "prepare --config demo" in first
    assert "--label" in second and "--kill-on-bad-exit=1" in second
    assert second.endswith("train-value --config demo --overwrite")


@pytest.mark.parametrize(
    "said, srun, job, cause",
    [
        ("143 143", 143, RUNNING.replace("PreemptTime=None", f"PreemptTime={SOON}"), "preempted"),
        ("143 143", 143, RUNNING.replace("EndTime=Unknown", f"EndTime={SOON}"), "time-limit"),
        ("143 143", 143, RUNNING, "requeued"),  # somebody's signal
        ("143 0", 143, RUNNING, "requeued"),
        ("143 143", 143, RUNNING.replace("RUNNING", "SIGNALING"), "requeued"),
        (
            "143 143",
            143,
            RUNNING.replace("RUNNING", "COMPLETING").replace("Reason=None", "Reason=TimeLimit"),
            "time-limit",
        ),
        ("143 -", 137, RUNNING, "killed"),
        ("- -", 137, RUNNING, "killed"),
        ("143 -", 143, RUNNING, "killed"),  # srun's 143 hides the 137
        ("75 -", 143, RUNNING, "lost"),
        ("- -", 134, RUNNING, "lost"),
        ("76 -", 137, RUNNING, "hang"),
        ("76 75", 76, RUNNING, "hang"),
        ("- -", 1, RUNNING, "killed"),  # srun itself failed
    ],
)
def test_back_into_the_queue(attempt, said, srun, job, cause):
    code, printed, folder = attempt(said, srun, job=job)
    assert code == 143 and requeued(folder), printed
    assert (folder / "cause").read_text().split()[0] == cause
    assert not (folder / "end").exists() and f"goes back into the queue: {cause}" in printed


@pytest.mark.parametrize(
    "said, srun, code, text",
    [
        ("2 2", 2, 2, "a mistake to be mended"),
        ("2 -", 137, 2, "a mistake to be mended"),
        ("75 2", 75, 2, "a mistake to be mended"),
        ("1 75", 75, 1, "train-value failed"),
        ("1 -", 143, 1, "train-value failed"),  # the other one was told to go
        ("- -", 127, 2, "could not be started"),
    ],
)
def test_errors_are_never_tried_again(attempt, said, srun, code, text):
    got, printed, folder = attempt(said, srun)
    assert got == code and not requeued(folder), printed
    assert text in (folder / "end").read_text()


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", "NODE_FAIL"])
@pytest.mark.parametrize("said", ["143 143", "- 75"])
def test_what_slurm_has_decided_stays_decided(attempt, state, said):
    """To requeue a cancelled job would bring it back."""
    code, _, folder = attempt(said, 143, job=RUNNING.replace("RUNNING", state))
    assert code == 143 and not requeued(folder) and not (folder / "end").exists()


def test_a_lost_node_is_told_from_a_requeue(attempt):
    decided = RUNNING.replace("RUNNING", "COMPLETING")
    _, _, folder = attempt("75 -", 143, job=decided, terminate="", down="n2\n")
    assert (folder / "cause").read_text() == "node-failure ended by Slurm\n"
    (folder.parents[2] / "down").unlink()
    attempt("75 -", 143, job=decided, terminate="")
    assert (folder / "cause").read_text() == "requeued ended by Slurm\n"


def test_a_requeue_that_the_script_asks_for_is_not_its_own_cause(attempt):
    """Slurm's SIGTERM comes while scontrol still runs: the fake's does at every requeue."""
    code, _, folder = attempt("76 -", 137)
    assert code == 143 and requeued(folder)
    assert (folder / "cause").read_text() == "hang train-value made no progress, see the stacks in the log\n"


def test_sigterm_to_the_script_does_not_hide_what_the_step_said(attempt):
    code, printed, folder = attempt("2 2", 2, terminate="")
    assert code == 2 and (folder / "end").exists(), printed


def test_causes_are_recorded_at_the_restart_and_node_failures_have_a_budget(attempt):
    attempt("143 143", 143)
    for number in range(1, 4):
        code, _, folder = attempt("- -", 137, restarts=number)
        assert code == 143
    (folder.parents[2] / "requeued").unlink()
    code, _, folder = attempt("- -", 137, restarts=4)
    lines = (folder / "restarts").read_text().splitlines()
    assert [line.split()[1:3] for line in lines] == [
        ["1", "requeued"],
        ["2", "killed"],
        ["3", "killed"],
        ["4", "killed"],
    ]
    assert code == 1 and not requeued(folder), "three were the budget"
    assert "gave up after 3 restarts for such reasons" in (folder / "end").read_text()


def test_an_attempt_that_left_no_word_went_down_with_its_node(attempt):
    ends = [attempt("0 0", 0, restarts=number) for number in range(1, 4)]
    assert [code for code, _, _ in ends] == [0, 0, 0]
    folder = ends[-1][2]
    assert [line.split()[2] for line in (folder / "restarts").read_text().splitlines()] == ["node-failure"] * 3
    code, printed, folder = attempt("0 0", 0, restarts=4)
    assert code == 1 and "gave up after 4 node failures" in printed
    assert not (folder.parents[2] / "srun").read_text().splitlines()[6:], "nothing was started any more"


def test_preemptions_have_no_budget(attempt):
    preempted = RUNNING.replace("PreemptTime=None", f"PreemptTime={SOON}")
    ends = [attempt("143 143", 143, job=preempted, restarts=number) for number in range(12)]
    folder = ends[-1][2]
    assert [code for code, _, _ in ends] == [143] * 12 and requeued(folder)
    assert {line.split()[2] for line in (folder / "restarts").read_text().splitlines()} == {"preempted"}


@pytest.mark.slow
def test_a_silent_controller_is_asked_again_and_then_said(attempt):
    code, printed, folder = attempt("143 143", 143, job="")
    assert code == 143 and not requeued(folder)
    assert "Slurm does not answer: submit it again to go on" in (folder / "end").read_text(), printed


def test_a_cluster_that_does_not_requeue(attempt):
    code, _, folder = attempt("143 143", 143, requeue_code="1")
    assert code == 143 and "Slurm does not requeue it: submit it again" in (folder / "end").read_text()


def test_settings_of_gpus_are_for_jobs_that_have_some_and_the_user_s_own_come_first(attempt, tmp_path, monkeypatch):
    text = (
        (tmp_path / "value.sbatch")
        .read_text()
        .replace("gpu_settings=(TF_CPP_MIN_LOG_LEVEL=1)", "gpu_settings=(A=1 B=2 XLA_FLAGS=--new=1)")
    )
    (tmp_path / "value.sbatch").write_text(text)
    environment = '#!/bin/bash\nprintf "%s\\n" "$A,$B,$XLA_FLAGS,$JAX_PLATFORMS,$HVD_EXPECT_GPUS" >>"$FOLDER/srun"\n'
    (tmp_path / "bin" / "srun").write_text(environment)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name, value in {"B": "mine", "XLA_FLAGS": "--old"}.items():
        monkeypatch.setenv(name, value)
    attempt("0 0", 0)
    (tmp_path / "value.sbatch").write_text("export SLURM_JOB_GPUS=0\n" + text)
    attempt("0 0", 0)
    seen = (tmp_path / "srun").read_text().splitlines()
    assert seen == [",mine,--old,cpu,"] * 2 + ["1,mine,--new=1 --old,,1"] * 2


ENVIRONMENT = '#!/bin/bash\necho "$*" >>"$FOLDER/srun"; env >"$FOLDER/environment"\n'


def environment(folder: Path) -> dict[str, str]:
    """Of the last step."""
    lines = (folder.parents[2] / "environment").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.mark.parametrize("gpus", ["SLURM_JOB_GPUS", "SLURM_GPUS_PER_NODE"])
def test_steps_get_what_the_batch_script_sets_and_nothing_of_another_job(attempt, tmp_path, gpus):
    (tmp_path / "bin" / "srun").write_text(ENVIRONMENT)
    inherited = {
        "SLURM_EXPORT_ENV": "NONE",
        "SLURM_TIMELIMIT": "1",
        "SLURM_MEM_PER_CPU": "100",
        "SLURM_MEM_PER_NODE": "6144",
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
        "SLURM_STDOUTMODE": "/elsewhere",
        gpus: "2",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "HVD_EXPECT_GPUS": "1",
        "HVD_COORDINATOR": "other:1",
        "JAX_COORDINATOR_ADDRESS": "other:1",
        "OMPI_COMM_WORLD_SIZE": "4",
        "PMIX_RANK": "3",
        "SQUEUE_USERS": "nobody",
    }
    first = inherited | {"SLURM_RESTART_COUNT": ""}
    code, printed, folder = attempt("0 0", 0, job=f"{RUNNING} TRES=cpu=4,mem=6G", inherited=first)
    assert code == 0, printed
    found = environment(folder)
    assert not inherited.keys() & found.keys()
    assert found["HVD_JOB_DIR"] == str(folder) and found["JAX_PLATFORMS"] == "cpu"
    assert "--export=ALL" in (tmp_path / "srun").read_text()


def test_what_is_this_job_s_own_stays(attempt, tmp_path):
    (tmp_path / "bin" / "srun").write_text(ENVIRONMENT)
    own = {"SLURM_MEM_PER_NODE": "6144", "SLURM_CPU_BIND": "none", "SLURM_JOB_GPUS": "0", "CUDA_VISIBLE_DEVICES": "0"}
    _, _, folder = attempt("0 0", 0, job=f"{RUNNING} TRES=cpu=4 TresPerNode=gres:gpu:1", inherited=own)
    found = environment(folder)
    assert own.items() <= found.items() and found["HVD_EXPECT_GPUS"] == "1"


def test_the_restarts_of_the_job_that_submitted_this_one_are_not_its_own(attempt):
    code, _, folder = attempt("0 0", 0, inherited={"SLURM_RESTART_COUNT": "2"})
    assert code == 0 and (folder / "restarts").read_text() == ""


def test_a_job_of_an_array_goes_back_by_its_own_name(attempt, tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3"}
    attempt("143 143", 143, job=f"JobId=7 ArrayJobId=5 ArrayTaskId=3 {RUNNING}", inherited=array)
    attempt("143 143", 143, job=f"JobId=6 ArrayJobId=5 ArrayTaskId=3 {RUNNING}", inherited=array)  # left by another
    assert (tmp_path / "requeued").read_text().split() == ["5_3", "7"]


def test_the_jobs_of_a_large_site_are_no_variable(attempt, tmp_path):
    (tmp_path / "bin" / "srun").write_text(ENVIRONMENT)
    (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\nseq 10000000 10060000\n")
    text = (tmp_path / "value.sbatch").read_text().replace("\n. ", "\ncontainer=pyxis\n. ")
    (tmp_path / "value.sbatch").write_text(text)
    code, printed, folder = attempt("0 0", 0)
    assert code == 0, printed
    listed = environment(folder)["HVD_LIVE_JOBS_FILE"]
    assert Path(listed).parent == folder and "10060000" in Path(listed).read_text().split()
