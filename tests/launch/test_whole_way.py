"""The whole way in its smallest size, through the launcher: stopped, gone on with, run again, on two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    *("--sim.num_optimal", "3", "--sim.num_mixed", "4", "--sim.workers", "1"),
    *("--value.num_train_steps", "30", "--value.batch_size", "16", "--value.save_interval", "10"),
    *("--policy.num_train_steps", "30", "--policy.batch_size", "16", "--policy.save_interval", "10"),
    *("--value.log_interval", "10", "--policy.log_interval", "10"),
    *("--value.val_interval", "30", "--policy.val_interval", "30"),
    *("--evaluate.num_rollouts", "2", "--evaluate.workers", "1", "--evaluate.videos", "1"),
    *("--evaluate.baselines", "false"),  # the same code five times more; .ci/run trains them
    *("--policy.gate", "none"),  # of four recordings none may succeed
)


PATIENCE = 1500  # seconds for one launch; it takes 1 to 2 minutes on two free cores


@pytest.fixture
def launch(tmp_path):
    """Start launch/submit.py in the test's folder; whatever still runs at the test's end is stopped."""
    started: list[subprocess.Popen] = []

    def start(*options: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "launch" / "submit.py"), *options, *SMALL]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
        with open(tmp_path / "out", "w") as out:
            started.append(subprocess.Popen(command, cwd=tmp_path, env=env, stdout=out, stderr=subprocess.STDOUT))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(120)


@pytest.fixture
def run(tmp_path, launch):
    """Run launch/submit.py to its end, which must be a good one; returns the lines that it printed."""

    def complete(*options: str) -> list[str]:
        code = launch(*options).wait(PATIENCE)
        text = (tmp_path / "out").read_text()
        assert code == 0, text[-3000:]
        return [line for line in text.splitlines() if line.strip()]

    return complete


def wait_for(path: Path, holds, process: subprocess.Popen) -> None:
    until = time.monotonic() + PATIENCE
    while not (path.exists() and holds(path)):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_processes_are_stopped_in_the_value_stage_go_on_and_end_with_the_report(tmp_path, launch, run):
    process = launch("--stage", "all", "--nodes", "2")
    demo = tmp_path / "runs" / "demo"
    value = demo / "value"
    wait_for(value / "checkpoints", lambda path: any(path.iterdir()), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 143
    assert not (value / "complete.json").exists()

    lines = run("--stage", "all", "--nodes", "2")
    assert lines[-1] == "report: runs/demo/report.html"
    assert lines[-2].startswith("doing nothing")
    assert (demo / "report.html").stat().st_size > 100_000
    events = [json.loads(line) for line in (value / "events.jsonl").read_text().splitlines()]
    assert [event["processes"] for event in events if event["event"] == "start"] == [2, 2]
    assert events[-1]["event"] == "complete"
    assert (demo / "policy" / "complete.json").exists()
    assert {path.name for path in (demo / "logs").glob("policy*.log")} == {"policy.log", "policy.1.log"}

    digest = json.loads((value / "complete.json").read_text())["digest"]
    again = run("--stage", "all")
    assert any("nothing to do" in line for line in again)
    assert json.loads((value / "complete.json").read_text())["digest"] == digest
