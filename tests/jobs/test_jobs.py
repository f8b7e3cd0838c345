"""`hvd jobs`: what it prints, what it cancels, when it ends and with which exit code."""

import builtins
import contextlib
import io
import json
import subprocess
import sys
import threading
import time

import pytest

from hvd import cli
from hvd.clusters.base import jobs_folder
from hvd.clusters.slurm import log as job_log
from hvd.clusters.slurm import records
from hvd.jobs import command, listing
from hvd.train import metrics


def jobs(*argv: str) -> int:
    return cli.main(["jobs", *argv])


@pytest.fixture
def run_folder(work):
    """The run folder of `submitted`'s jobs: step 200 at 4 steps a second, checkpoints of 100 and 200."""
    run = work / "runs" / "demo" / "value"
    for name in ("100", "200", "300.orbax-checkpoint-tmp-1"):
        (run / "checkpoints" / name).mkdir(parents=True)
    lines = [
        {"step": 100, "split": "train", "time/step_s": 0.5},
        {"step": 200, "split": "train", "time/step_s": 0.25},
        {"step": 200, "split": "val", "loss": 1.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 300, "spl')
    return run


# --------------------------------------------------------------------------------------------------------------- list


def test_the_table_tells_everything_about_a_job(slurm, submitted, run_folder, capsys):
    restarts = ["2026-01-01T10:00:00+00:00 1 preempted by whom", "2026-01-01T11:00:00+00:00 2 node-failure", "torn"]
    submitted("9", run={"stage": "value", "run_dir": "runs/demo/value", "steps": 1000}, restarts=restarts)
    submitted("10", stage="policy", run_dir="runs/demo/policy", after="9")
    slurm.job("9", restarts=1)
    slurm.job("10", state="PENDING", reason="Dependency", after="afterok:9(unfulfilled)", nodes="")
    assert jobs() == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == "id stage experiment state reason step step/s ETA restarts checkpoint after".split()
    assert " ".join(first.split()) == (
        "9 value runs/demo/value RUNNING - 200/1000 4 3m 20s 2 (1 preempted, 1 node-failure) 200 -"
    )
    assert " ".join(second.split()) == "10 policy runs/demo/policy PENDING Dependency - - - - - 9"


def test_json_is_the_same_as_a_list(slurm, submitted, run_folder, capsys):
    submitted("9", run={"run_dir": "runs/demo/value", "steps": 1000})
    slurm.job("9")
    assert jobs("list", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["step"], row["total"], row["steps_per_s"], row["eta_s"]) == ("RUNNING", 200, 1000, 4, 200)
    assert (row["last_checkpoint"], row["complete"], row["nodes"]) == (200, False, "node1")


def test_a_complete_run_is_complete(slurm, submitted, run_folder, capsys):
    (run_folder / "complete.json").write_text("{}")
    submitted("9", end="2099-01-01T00:00:00+00:00 0 complete")
    assert jobs() == 0
    assert " ".join(capsys.readouterr().out.splitlines()[1].split()) == (
        "9 value runs/demo/value COMPLETED complete 200/- 4 - - complete -"
    )


def test_an_evaluation_that_trains_a_policy_to_compare_with_is_an_evaluation(slurm, submitted, run_folder, capsys):
    submitted("9", stage="evaluate", run_dir="", run={"stage": "policy", "run_dir": "runs/demo/imitation", "steps": 20})
    slurm.job("9")
    assert jobs() == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["9", "evaluate", "runs/demo", "RUNNING"]


def test_without_run_json_the_config_says_how_many_steps(slurm, submitted, run_folder):
    from hvd import overrides
    from hvd.train import run_dir as runs

    cfg = overrides.experiment(["--config", "demo", "--value.num_train_steps", "777"])
    runs.write_config(run_folder, cfg, "value", {})
    submitted("9")
    assert records.progress(records.read(jobs_folder(), "9"))["total"] == 777
    (run_folder / "config.yaml").write_text("stage: value")
    assert records.progress(records.read(jobs_folder(), "9"))["total"] is None


def test_the_last_line_of_a_long_metrics_file_is_found(slurm, submitted, run_folder, monkeypatch):
    monkeypatch.setattr(metrics, "_TAIL", 64)
    with (run_folder / "metrics.jsonl").open("w") as file:
        file.write(json.dumps({"step": 7, "split": "train", "time/step_s": 0.5}) + "\n")
        for step in range(500):
            file.write(json.dumps({"step": step, "split": "val", "loss": 0.5}) + "\n")
    submitted("9")
    done = records.progress(records.read(jobs_folder(), "9"))
    assert (done["step"], done["steps_per_s"]) == (7, 2.0)


def test_old_jobs_are_shown_on_request(slurm, submitted, capsys):
    submitted("1", end="2020-01-01T00:00:00+00:00 0 complete")
    assert jobs() == 0
    assert "--all shows 1 older" in capsys.readouterr().out
    assert jobs("--all") == 0
    assert "COMPLETED" in capsys.readouterr().out


def test_where_it_looked_when_there_is_nothing(slurm, work, capsys, monkeypatch):
    assert jobs() == 0
    assert capsys.readouterr().out == "no jobs in slurm/jobs; --jobs-dir or $HVD_JOBS_DIR name another folder\n"
    monkeypatch.setenv("HVD_JOBS_DIR", "elsewhere")
    jobs()
    assert capsys.readouterr().out.startswith("no jobs in elsewhere;")
    jobs("--jobs-dir", "third")
    assert capsys.readouterr().out.startswith("no jobs in third;")
    assert jobs("--json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_damaged_files_of_one_job_do_not_hide_the_others(slurm, submitted, work, capsys):
    folder = submitted("1", restarts=["x"], end="what is this")
    (folder / "job.json").write_bytes(b'{"id": \xff')
    (folder / "run.json").write_text("[1, 2")
    other = submitted("3", run={"stage": ["policy"], "run_dir": {}, "steps": "many"})
    (other / "job.json").write_text('{"stage": null, "after": [1]}')
    (work / "slurm" / "jobs" / "2.log").write_text("")  # plain sbatch: a log and no folder
    (work / "slurm" / "jobs" / "notes.txt").write_text("")
    slurm.job("2")
    assert jobs() == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[0]: line.split()[1:4] for line in lines[1:]}
    assert found == {
        "1": ["-", "-", "UNKNOWN"],
        "2": ["value", "-", "RUNNING"],
        "3": ["-", "-", "UNKNOWN"],
    }


@pytest.mark.parametrize(
    ("name", "field", "value", "shown"),
    [
        ("run.json", "stage", ["policy"], ("stage", "value")),  # job.json's
        ("run.json", "run_dir", {"a": 1}, ("experiment", "runs/other")),
        ("run.json", "steps", "many", ("total", None)),
        ("job.json", "run_dir", [17], ("name", "")),
    ],
)
def test_a_record_of_another_form_is_left_out(slurm, submitted, run_folder, capsys, name, field, value, shown):
    folder = submitted("9", run={"stage": "policy", "run_dir": "runs/demo/value", "steps": 1000}, run_dir="runs/other")
    about = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(about | {field: value}))
    slurm.job("9")
    assert jobs("list", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row[shown[0]] == shown[1], row


def test_a_waiting_job_of_plain_sbatch_is_known_by_its_name_and_folder(slurm, work, capsys):
    slurm.job("5", name="hvd-policy", folder=str(work), state="PENDING", reason="Priority", nodes="")
    slurm.job("6", name="hvd-policy", folder="/another")
    slurm.job("7", name="other", folder=str(work))
    assert jobs() == 0
    (line,) = capsys.readouterr().out.splitlines()[1:]
    assert line.split()[:5] == ["5", "policy", "-", "PENDING", "Priority"]


def test_the_folder_tells_how_a_forgotten_job_ended(slurm, submitted, capsys):
    submitted("1", end="2099-01-01T00:00:00Z 0 complete")
    submitted("2", end="2099-01-01T00:00:00Z 1 value: loss is not finite")
    submitted("3")
    assert jobs() == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[3] for row in rows] == ["COMPLETED", "FAILED", "UNKNOWN"]
    assert jobs("--json") == 0
    assert json.loads(capsys.readouterr().out)[1]["reason"] == "value: loss is not finite"


def test_the_list_goes_on_without_the_controller(slurm, submitted, capsys):
    submitted("1", end="2099-01-01T00:00:00Z 0 complete")
    slurm.set(down=True)
    assert jobs() == 0
    printed = capsys.readouterr()
    assert "COMPLETED" in printed.out
    assert printed.err == (
        "Slurm cannot be asked: slurm_load_jobs error: Unable to contact slurm controller (connect failure); "
        "states are what the jobs' folders say\n"
    )


@pytest.mark.parametrize(
    "seconds, text", [(0.2, "0s"), (61, "1m 1s"), (3600, "1h"), (12_000, "3h 20m"), (100_000, "1d 3h"), (1e12, "years")]
)
def test_durations(seconds, text):
    assert listing.duration(seconds) == text


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "argv, line",
    [
        ("logs 77", "no job 77 in slurm/jobs; known: 9, 8"),
        ("wait 77", "no job 77 in slurm/jobs; known: 9, 8"),
        ("cancel 77 --yes", "no job 77 in slurm/jobs; known: 9, 8"),
        ("logs ../9", "'../9' is not the id of a job"),
        ("wait 9_1", "'9_1' is not the id of a job"),
        ("lgos 9", "hvd jobs: unknown command 'lgos'; nearest: logs"),
        ("logs", "hvd jobs logs ID: the id is missing"),
        ("logs 9 -n many", "--lines: 'many' is not a whole number"),
        ("wait 9 --timeout soon", "--timeout: 'soon' is not a number"),
        ("list 9", "'9' stands alone; options are written --field value"),
        ("list --jobs-dir", "--jobs-dir: the value is missing"),
        ("cancel 8 --yes", "job 8 has ended (COMPLETED: complete): there is nothing to cancel"),
        ("cancel 9", "hvd jobs cancel asks before it cancels, and there is no terminal to answer at: add --yes"),
    ],
)
def test_a_mistake_is_one_line(slurm, submitted, capsys, monkeypatch, argv, line):
    submitted("8", end="2099-01-01T00:00:00Z 0 complete")
    submitted("9")
    slurm.job("9")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert jobs(*argv.split()) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {line}")
    assert printed.count("\n") == 1


def test_help(capsys):
    assert jobs("--help") == 0
    assert "wait ID" in capsys.readouterr().out
    for name, option in (("list", "--json"), ("logs", "--lines"), ("cancel", "--yes"), ("wait", "--timeout")):
        assert jobs(name, "--help") == 0
        assert option in capsys.readouterr().out


def test_no_jax(slurm, work):
    code = (
        "import sys; from hvd import cli; code = cli.main(['jobs']); "
        "assert not {'jax', 'orbax', 'hvd.train.telemetry'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------- cancel


@pytest.fixture
def chain(slurm, submitted):
    """1 <- 2 (by job.json) <- 3 (by Slurm alone), 3 waits for 1 too; 4 waits for another."""
    submitted("1")
    submitted("2", stage="policy", run_dir="runs/demo/policy", after="1")
    slurm.job("1")
    slurm.job("2", state="PENDING", reason="Dependency", after="(null)")
    slurm.job("3", state="PENDING", reason="Dependency", after="afterok:1(unfulfilled),afterok:2(unfulfilled)")
    slurm.job("4", state="PENDING", reason="Dependency", after="afterok:99(unfulfilled)")
    return slurm


def test_cancel_takes_those_that_wait_first(chain, capsys):
    assert jobs("cancel", "1", "--yes") == 0
    assert [call for call in chain.calls() if call.startswith("scancel")] == ["scancel 3", "scancel 2", "scancel 1"]
    assert chain.state("4") == "PENDING"
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "cancel 1  RUNNING  value  runs/demo/value"
    assert printed[1] == "  and, waiting for it, 2  PENDING  policy  runs/demo/policy"
    assert printed[-1] == "cancelled 3, 2, 1"


@pytest.mark.parametrize("answer, code, state", [("y", 0, "CANCELLED"), ("", 1, "RUNNING"), (EOFError, 1, "RUNNING")])
def test_cancel_asks(chain, capsys, monkeypatch, answer, code, state):
    def reply(question):
        assert question == "cancel these 3 jobs? [y/N] "
        if answer is EOFError:
            raise EOFError
        return answer

    monkeypatch.setattr(builtins, "input", reply)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert jobs("cancel", "1") == code
    assert chain.state("1") == state


def test_an_ended_job_s_followers_are_named(chain, capsys):
    chain.job("1", state="FAILED", code="1:0")
    assert jobs("cancel", "1", "--yes") == 2
    assert "waiting for it still, and not cancelled: 2, 3" in capsys.readouterr().err


def test_a_circle_in_job_json_does_not_hang(slurm, submitted):
    for number, after in (("1", "2"), ("2", "1"), ("3", "3")):
        submitted(number, after=after)
        slurm.job(number, state="PENDING")
    assert jobs("cancel", "1", "--yes") == 0
    assert (slurm.state("1"), slurm.state("2"), slurm.state("3")) == ("CANCELLED", "CANCELLED", "PENDING")


def test_who_refuses_is_said(chain, capsys):
    chain.job("3", refused=True)
    assert jobs("cancel", "1", "--yes") == 1
    assert capsys.readouterr().err.startswith("failed: job 3 is not cancelled: scancel: error:")
    assert chain.state("1") == "RUNNING"


# --------------------------------------------------------------------------------------------------------------- wait


@pytest.mark.parametrize(
    "what, code, text",
    [
        ({"state": "COMPLETED"}, 0, "COMPLETED"),
        ({"state": "FAILED", "code": "7:0", "reason": "NonZeroExitCode"}, 7, "FAILED, exit code 7: NonZeroExitCode"),
        ({"state": "FAILED", "code": "0:9"}, 137, "FAILED, exit code 137"),
        ({"state": "FAILED"}, 1, "FAILED"),
        ({"state": "TIMEOUT", "code": "0:15", "reason": "TimeLimit"}, 1, "TIMEOUT: TimeLimit"),
        (
            {"state": "CANCELLED", "reason": "DependencyNeverSatisfied"},
            1,
            "CANCELLED: DependencyNeverSatisfied (job 8, which it waits for, did not complete)",
        ),
        ({"forgotten": True}, 1, "UNKNOWN: Slurm has forgotten the job, and its folder does not say how it ended"),
    ],
)
def test_wait_ends_with_the_job_s_code(slurm, submitted, capsys, what, code, text):
    submitted("9", after="8")
    slurm.job("9", **what)
    assert jobs("wait", "9") == code
    assert capsys.readouterr().out.partition(" ")[2] == f"job 9: {text}\n"


def test_a_forgotten_job_s_end_is_its_code(slurm, submitted, capsys):
    submitted("9", end="2099-01-01T00:00:00Z 5 value: loss is not finite")
    assert jobs("wait", "9") == 5
    assert "FAILED, exit code 5: value: loss is not finite" in capsys.readouterr().out


def test_wait_outlasts_a_requeue_and_an_outage(slurm, submitted):
    submitted("9")
    slurm.job("9")
    with following(command.main, ["wait", "9"]) as (seen, errors, done):
        until(lambda: "RUNNING on node1\n" in seen())
        slurm.job("9", state="COMPLETING")
        until(lambda: "COMPLETING" in seen())
        slurm.job("9", state="PENDING", reason="BeginTime", nodes="", restarts=1)
        until(lambda: "PENDING, restart 1: BeginTime" in seen())
        slurm.set(down=True)
        until(lambda: "Unable to contact slurm controller" in errors())
        time.sleep(0.2)
        slurm.set(down=False)
        slurm.job("9", state="RUNNING", reason="None", nodes="node2")
        until(lambda: "RUNNING on node2, restart 1" in seen())
        assert not done
        slurm.job("9", state="FAILED", code="3:0")
    assert done == [3]
    assert errors().count("Unable to contact") == 1
    assert len(seen().splitlines()) == 5


def test_wait_gives_up_after_its_timeout(slurm, submitted, capsys):
    submitted("9")
    slurm.job("9")
    assert jobs("wait", "9", "--timeout", "0.1") == 124
    assert capsys.readouterr().err == "job 9, which is RUNNING on node1, has not ended within 0.1 s; it is left alone\n"


def test_a_job_that_can_never_start_is_not_waited_for(slurm, submitted, capsys):
    submitted("9", after="8")
    slurm.job("9", state="PENDING", reason="DependencyNeverSatisfied", nodes="")
    assert jobs("wait", "9") == 1
    assert "job 9 will never start (job 8, which it waits for, did not complete)" in capsys.readouterr().out


def test_wait_needs_a_slurm(submitted, capsys, monkeypatch, tmp_path):
    submitted("9")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert jobs("wait", "9") == 1
    assert "no squeue on this machine" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- logs


def test_logs_prints_the_last_lines(submitted, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # needs no Slurm
    submitted("9", log="".join(f"line {i}\n" for i in range(1000)))
    assert jobs("logs", "9") == 0
    assert capsys.readouterr().out.splitlines() == [f"line {i}" for i in range(800, 1000)]
    assert jobs("logs", "9", "-n", "2") == 0
    assert capsys.readouterr().out == "line 998\nline 999\n"
    assert jobs("logs", "9", "-n", "0") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1000


@pytest.mark.parametrize("block", [1, 3, 1000])
@pytest.mark.parametrize("text", ["", "\n", "a", "a\nb\nc\n", "a\nb\nc", "\n\nab\n\n", "ab\ncd"])
@pytest.mark.parametrize("lines", [0, 1, 2, 9])
def test_the_last_lines_are_those_of_tail(monkeypatch, block, text, lines):
    monkeypatch.setattr(job_log, "_BLOCK", block)
    file = io.BytesIO(text.encode())
    file.seek(job_log.start_of_last(file, lines))
    assert file.read().decode() == "".join(text.splitlines(keepends=True)[-lines:])


def test_each_state_of_a_progress_bar_is_a_line():
    file = io.BytesIO(b"start\n" + b"".join(b"\r%d%%" % i for i in range(100)) + b"\nend\n")
    file.seek(job_log.start_of_last(file, 3))
    assert file.read() == b"98%\r99%\nend\n"


def test_a_log_that_is_not_there(slurm, submitted, capsys):
    submitted("8", log=None)
    submitted("9", log=None)
    slurm.job("8", state="CANCELLED")
    slurm.job("9", state="PENDING", reason="Priority", nodes="")
    assert jobs("logs", "9") == 2
    assert capsys.readouterr().err == (
        "error: job 9 has no log (slurm/jobs/9.log): it is PENDING: Priority; -f waits for it\n"
    )
    assert jobs("logs", "8", "-f") == 2
    assert "job 8 has no log (slurm/jobs/8.log): it is CANCELLED" in capsys.readouterr().err


def test_logs_follow_through_requeues_to_the_end(slurm, submitted, work):
    submitted("9", log=None)
    slurm.job("9", state="PENDING", reason="Priority", nodes="")
    log = work / "slurm" / "jobs" / "9.log"
    with following(command.main, ["logs", "9", "-f", "-n", "1"]) as (seen, errors, done):
        until(lambda: "job 9 is PENDING: Priority; its log slurm/jobs/9.log is not there yet\n" in errors())
        slurm.job("9", state="RUNNING")
        log.write_text("first █\n")
        until(lambda: seen() == "first █\n")
        with log.open("a") as file:
            for text in ("half ", "a line\n"):
                file.write(text)
                file.flush()
                time.sleep(0.05)
        until(lambda: seen().endswith("half a line\n"))
        slurm.job("9", state="PENDING", restarts=1)
        log.write_text("cut\n")  # shorter than before
        until(lambda: seen().endswith("cut\n"))
        other = work / "other"
        other.write_text("another file of the same name\n")
        other.replace(log)
        until(lambda: seen().endswith("same name\n"))
        assert not done
        with log.open("a") as file:
            file.write("last words")
        slurm.job("9", state="COMPLETED")
    assert done == [0]
    assert seen() == "first █\nhalf a line\ncut\nanother file of the same name\nlast words"
    assert errors().splitlines()[1:] == ["job 9: COMPLETED"]


def test_following_without_slurm_ends_with_the_job_s_own_word(submitted, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = submitted("9")
    with following(command.main, ["logs", "9", "-f"]) as (seen, errors, done):
        until(lambda: "line 3\n" in seen() and "no squeue" in errors())
        (folder / "end").write_text("2099-01-01T00:00:00Z 0 complete\n")
    assert done == [0]


def until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def following(function, argv):
    """Run the command in a thread: what it has printed, what it has complained of, and its exit code once it ends."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(function(argv)), daemon=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        thread.start()
        try:
            yield (lambda: out.buffer.getvalue().decode()), (lambda: err.buffer.getvalue().decode()), done
        finally:
            thread.join(30)
    assert not thread.is_alive()


def test_nothing_is_asked_twice_where_there_is_nothing_to_show(slurm, submitted, capsys):
    submitted("1", end="2020-01-01T00:00:00+00:00 0 complete")
    assert jobs() == 0
    assert "--all shows 1 older" in capsys.readouterr().out
    asked = slurm.calls()
    assert len(asked) == len(set(asked)), asked
