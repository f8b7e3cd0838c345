"""SIGKILL at 6 random moments of both stages and SIGTERM at 2; every resumed run is the whole one.

`python -m tests.kills` does it 500 times, to other commands too.
"""

import random
import signal
import time
from pathlib import Path

import pytest

from hvd.errors import EXIT_COMPLETE, EXIT_STOPPED
from hvd.train import complete
from tests.train import factory
from tests.train.children import Child, Children
from tests.train.compare import assert_same_run, lines

STEPS = 120
KILLS, TERMS = 6, 2
CHANGES = {
    stage: {"num_train_steps": STEPS, "save_interval": 4, "val_interval": 7, "log_interval": 5}
    for stage in ("value", "policy")
}


def run_folder(cfg, stage: str) -> Path:
    return Path(cfg.value_dir if stage == "value" else cfg.policy_dir)


def steps_done(folder: Path) -> int:
    path = folder / "samples.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def strike(child: Child, number: signal.Signals, folder: Path, rng: random.Random) -> bool:
    """Send the signal at a random moment of one of the run's phases; False if it had ended before."""
    phase = rng.choice(["warm-up", "steps", "steps", "steps", "saving"])
    if phase == "warm-up":
        end = time.monotonic() + rng.uniform(0, 2)
        alive = child.wait_until(lambda: time.monotonic() > end)
        child.send(number)
        return alive
    target = steps_done(folder) + rng.randint(1, 6)
    alive = child.wait_until(lambda: steps_done(folder) >= target)
    if alive and phase == "saving":  # a temporary folder of Orbax, or a new step's, while it is written
        before = set((folder / "checkpoints").glob("*"))
        alive = child.wait_until(lambda: bool(set((folder / "checkpoints").glob("*")) - before))
    time.sleep(rng.uniform(0, 0.05))
    if alive:
        child.send(number)
    return alive


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_and_resumed_runs_are_the_undisturbed_run(data_folder, tmp_path):
    children = Children(tmp_path)
    changes = {"runs_dir": str(tmp_path / "undisturbed"), **CHANGES}
    undisturbed = factory.experiment(data_folder, **changes)
    for step in ("train-value", "train-policy"):
        child = children.start(step, factory.Settings(str(data_folder), changes))
        assert child.end() == EXIT_COMPLETE, child.text()

    rng = random.Random(0)
    signals = [signal.SIGKILL] * KILLS + [signal.SIGTERM] * TERMS
    rng.shuffle(signals)
    changes = {"runs_dir": str(tmp_path / "disturbed"), **CHANGES}
    disturbed = factory.experiment(data_folder, **changes)
    settings = factory.Settings(str(data_folder), changes, slow_s=0.02)
    half = len(signals) // 2
    sent = {"value": 0, "policy": 0}
    for stage, waiting in (("value", signals[:half]), ("policy", signals[half:])):
        folder = run_folder(disturbed, stage)
        while waiting:
            child = children.start(f"train-{stage}", settings)
            if not strike(child, waiting[0], folder, rng):
                # complete before all signals were sent: the rest strikes a run that starts again from nothing
                assert child.end() == EXIT_COMPLETE, child.text()
                assert_same_run(folder, run_folder(undisturbed, stage), STEPS)
                _again(folder)
                continue
            number = waiting.pop(0)
            code = child.end()
            if code == EXIT_COMPLETE:  # it came after the last step
                waiting.append(number)
                _again(folder)
                continue
            sent[stage] += 1
            # A process that has not yet said how it takes a SIGTERM dies of it, and a shell calls that 143 as well
            deaf = number == signal.SIGTERM and not child.text()
            assert code == (-number if number == signal.SIGKILL or deaf else EXIT_STOPPED), child.text()
            assert not (folder / "complete.json").exists()
        child = children.start(f"train-{stage}", settings)
        assert child.end() == EXIT_COMPLETE, child.text()
        complete.check_complete(folder, stage=stage, cfg=disturbed)
        assert_same_run(folder, run_folder(undisturbed, stage), STEPS)
    assert sum(sent.values()) == KILLS + TERMS
    print(f"signals {sent}, starts", {s: _starts(run_folder(disturbed, s)) for s in sent})


def _again(folder: Path) -> None:
    from hvd.train import run_dir as runs

    runs.delete(folder)


def _starts(folder: Path) -> int:
    return sum(line["event"] == "start" for line in lines(folder / "events.jsonl"))
