"""Steps as processes: order, sharing of cores, logs, exit codes, signals."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from hvd.clusters.local import runner as local
from hvd.errors import UserError
from hvd.stages import Step

FAKE = (sys.executable, str(Path(__file__).with_name("fake_step.py")))
ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path, *groups, nodes=1):
    return local.Runner(tmp_path / "logs", nodes, (), FAKE).run(groups)


def step(name, words, spread=False):
    return Step(words[0], name, tuple(words[1:]), spread)


def notes(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_steps_run_one_after_the_other_and_say_so(tmp_path, capfd):
    out = tmp_path / "notes"
    groups = [(step(name, ("note", str(out), name, "0.1")),) for name in ("first", "second")]
    assert run(tmp_path, *groups) == 0
    first, second = notes(out)
    assert (first["name"], second["name"]) == ("first", "second")
    assert first["ended"] <= second["began"]
    printed = capfd.readouterr().out
    assert printed.index("] first") < printed.index("] second")


def test_what_a_step_prints_goes_to_the_terminal_and_to_its_log(tmp_path, capfd):
    assert run(tmp_path, (step("talk", ("say", "to out", "to err")),)) == 0
    printed = capfd.readouterr()
    assert "to out" in printed.out
    assert printed.err == "to err\n"
    log = (tmp_path / "logs" / "talk.log").read_text()
    assert "to out" in log and "to err" in log and "fake_step.py say" in log


def test_a_progress_bar_is_one_line_of_the_log(tmp_path, capfd):
    assert run(tmp_path, (step("bar", ("bar",)),)) == 0
    log = (tmp_path / "logs" / "bar.log").read_text()
    assert log.count("work:") == 1 and "3/4" in log
    assert capfd.readouterr().err.count("work:") == 1


@pytest.mark.slow
def test_tasks_of_a_group_run_side_by_side_each_on_its_own_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "gpus", list)
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core only")
    out = tmp_path / "notes"
    assert run(tmp_path, tuple(step(f"t{i}", ("note", str(out), f"t{i}", "4")) for i in range(4))) == 0
    records = sorted(notes(out), key=lambda record: record["began"])
    assert len(records) == 4
    a, b = records[:2]
    assert b["began"] < a["ended"]
    assert not set(a["cores"]) & set(b["cores"])
    assert int(a["OMP_NUM_THREADS"]) == len(a["cores"])
    assert os.sched_getaffinity(0) == cores, "the launcher's own cores are as before"


def test_lines_of_a_group_have_the_name_of_their_task(tmp_path, capfd):
    assert run(tmp_path, (step("a", ("say", "x", "y")), step("b", ("say", "x", "y")))) == 0
    printed = capfd.readouterr()
    assert "a | x\n" in printed.out and "b | x\n" in printed.out and "a | y\n" in printed.err


def test_nodes_are_processes_that_know_of_each_other(tmp_path):
    out = tmp_path / "notes"
    groups = [(step(name, ("note", str(out), name, "0"), name == "all"),) for name in ("alone", "all")]
    assert run(tmp_path, *groups, nodes=2) == 0
    alone, *both = notes(out)
    assert alone["HVD_NUM_PROCESSES"] is None
    assert {record["HVD_PROCESS_ID"] for record in both} == {"0", "1"}
    assert {record["HVD_NUM_PROCESSES"] for record in both} == {"2"}
    assert len({record["HVD_COORDINATOR"] for record in both}) == 1
    assert all(record["HVD_LAUNCHER_PID"] == str(os.getpid()) for record in both)


@pytest.mark.parametrize("code", [1, 2, 143])
def test_the_exit_code_of_the_step_that_fails_is_returned_and_the_rest_does_not_run(tmp_path, code):
    out = tmp_path / "notes"
    assert run(tmp_path, (step("bad", ("exit", str(code))),), (step("next", ("note", str(out), "", "0")),)) == code
    assert not out.exists()


def test_a_killed_step_is_named(tmp_path, capfd):
    assert run(tmp_path, (step("poor", ("killed",)),)) == 137
    assert "poor: killed by SIGKILL (out of memory?)" in capfd.readouterr().err


def test_a_failure_stops_the_companions(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "core_shares", lambda tasks: [os.sched_getaffinity(0)] * 2)
    state = tmp_path / "state"
    start = time.monotonic()
    assert run(tmp_path, (step("long", ("wait", str(state), "143")), step("bad", ("exit", "1")))) == 1
    assert time.monotonic() - start < 20
    assert not state.exists() or "READY" not in state.read_text() or "SIGTERM" in state.read_text()


@pytest.mark.parametrize(
    "codes, expected",
    [((), 0), ((0, 0), 0), ((0, 143), 143), ((143, 1), 1), ((1, 2), 2), ((143, 137, 1), 137)],
)
def test_worst_of_several_exit_codes(codes, expected):
    assert local.worst(codes) == expected


LAUNCHER = """
    import sys
    from pathlib import Path
    from hvd.clusters.local import runner as local
    from hvd.stages import Step
    command, folder, code = ({python!r}, {fake!r}), Path({folder!r}), {code!r}
    waits, later = (str(folder / "state"), code), (str(folder / "next"), "0")
    runner = local.Runner(folder / "logs", 1, (), command)
    sys.exit(runner.run([(Step("wait", "waits", waits),), (Step("wait", "next", later),)]))
"""


def start_launcher(tmp_path, code):
    source = textwrap.dedent(LAUNCHER).format(python=FAKE[0], fake=FAKE[1], folder=str(tmp_path), code=str(code))
    process = subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(tmp_path / "state", "READY")
    return process


def wait_for(path, text, seconds=30):
    until = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < until, f"no {text} in {path}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "number, code, expected",
    [
        (signal.SIGTERM, 143, 143),
        (signal.SIGUSR1, 143, 143),
        (signal.SIGUSR2, 143, 143),
        (signal.SIGINT, 130, 130),
        (signal.SIGTERM, 0, 143),  # the step was done by then, the stage is not
        (signal.SIGTERM, 1, 1),
    ],
)
def test_signals_reach_the_step_and_its_exit_code_comes_back(tmp_path, number, code, expected):
    process = start_launcher(tmp_path, code)
    process.send_signal(number)
    process.wait(30)
    assert process.returncode == expected
    assert (tmp_path / "state").read_text().split()[2:] == [signal.Signals(number).name]
    assert not (tmp_path / "next").exists(), "no further step is started"


def test_two_launches_of_one_experiment_do_not_run_at_once(tmp_path, monkeypatch):
    process = start_launcher(tmp_path, 143)
    monkeypatch.setattr(local, "PATIENCE_SECONDS", 0.5)
    with pytest.raises(UserError, match="another launch is at work"):
        run(tmp_path, (step("late", ("exit", "0")),))
    process.kill()  # the step outlives it, as one that is saving would, and still holds the lock
    process.wait(30)
    with pytest.raises(UserError, match="another launch is at work"):
        run(tmp_path, (step("late", ("exit", "0")),))
    os.kill(int((tmp_path / "state").read_text().split()[1]), signal.SIGTERM)
    monkeypatch.setattr(local, "PATIENCE_SECONDS", 20)
    assert run(tmp_path, (step("late", ("exit", "0")),)) == 0
