"""The files of a run that was interrupted are those of one run."""

import json
import sys

import jax
import pytest

from hvd import accelerators
from hvd.errors import UserError
from hvd.train import telemetry
from hvd.train.telemetry import Telemetry
from tests.train import factory
from tests.train.compare import lines, metrics


def make(cfg, tmp_path, start=0, carried=None):
    return Telemetry(cfg, "value", tmp_path / "run", start=start, carried=carried or {}, sizes={}, is_main=True)


def test_mean_over_the_interval_survives_a_restart(tmp_path):
    cfg = factory.experiment(tmp_path)  # a line every 4 steps
    losses = [0.1, 0.7, 0.3, 0.9, 1.3, 2.1, 0.2, 0.4]

    whole = make(cfg, tmp_path / "a")
    for i, loss in enumerate(losses):
        whole.train(i + 1, {"loss": loss}, 0.0)
    whole.close()

    first = make(cfg, tmp_path / "b")
    for i, loss in enumerate(losses[:7]):
        first.train(i + 1, {"loss": loss}, 0.0)
        if i + 1 == 6:
            carried = json.loads(json.dumps(first.state()))
    first.close()  # killed after step 7; the last checkpoint is of step 6
    second = make(cfg, tmp_path / "b", start=6, carried=carried)
    for i in (6, 7):
        second.train(i + 1, {"loss": losses[i]}, 0.0)
    second.close()

    assert metrics(tmp_path / "a/run") == metrics(tmp_path / "b/run")
    assert metrics(tmp_path / "a/run")[1]["loss"] == pytest.approx(sum(losses[4:]) / 4)
    assert lines(tmp_path / "b/run/metrics.jsonl")[-1]["time/restarts"] == 1


def test_validation_after_the_restored_step_is_done_again(tmp_path):
    cfg = factory.experiment(tmp_path)
    first = make(cfg, tmp_path)
    for step in (4, 6, 8):
        first.train(step, {"loss": 1.0}, 0.0)
        first.validation(step, {"loss": 2.0})
    first.close()
    make(cfg, tmp_path, start=6).close()
    assert [(line["step"], line["split"]) for line in metrics(tmp_path / "run")] == [(4, "train"), (4, "val")]


def test_rates(tmp_path, monkeypatch):
    cfg = factory.experiment(tmp_path)
    counted = {"start": 0, "carried": {}, "sizes": {}, "is_main": True, "model_flops": 8 * 10**9}

    def line(folder):
        run = Telemetry(cfg, "value", folder, **counted)
        for step in range(1, 5):
            run.train(step, {"loss": 1.0}, 0.0)
        run.close()
        started = lines(folder / "events.jsonl")[0]
        assert started["model_flops"] == 8 * 10**9 and started["deterministic"] is False
        return lines(folder / "metrics.jsonl")[0]

    found = line(tmp_path / "a")
    rate = 8e9 / jax.device_count() / found["time/step_s"]
    assert found["time/tflops_per_device"] == pytest.approx(rate / 1e12) and "time/mfu" not in found
    monkeypatch.setattr(telemetry.accelerators, "of_kind", lambda kind: accelerators.get("h100-80gb"))
    found = line(tmp_path / "b")
    assert found["time/mfu"] == pytest.approx(found["time/tflops_per_device"] / 989.4)


def test_other_processes_write_nothing(tmp_path):
    silent = Telemetry(
        factory.experiment(tmp_path), "value", tmp_path / "run", start=0, carried={}, sizes={}, is_main=False
    )
    silent.train(4, {"loss": 1.0}, 0.0)
    silent.validation(4, {"loss": 1.0})
    silent.event("stop")
    silent.close()
    assert not (tmp_path / "run").exists()


def test_wandb_is_asked_for_but_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    cfg = factory.experiment(tmp_path, wandb=True)
    with pytest.raises(UserError, match=r"the package wandb is not installed: install hvd\[wandb\]"):
        make(cfg, tmp_path)


class Unreachable:
    """A package wandb whose server is away; what is logged offline."""

    def __init__(self, offline: bool):
        self.offline, self.logged, self.id = offline, [], "abc"

    def init(self, *, mode: str = "online", **_):
        if mode == "online" or not self.offline:
            raise ConnectionError("Network error (ConnectionRefused),\nentering retry loop")
        return self

    def log(self, metrics, step):
        self.logged.append(step)

    def finish(self):
        pass


@pytest.fixture
def away(monkeypatch):
    def install(offline=True):
        package = Unreachable(offline)
        monkeypatch.setitem(sys.modules, "wandb", package)
        monkeypatch.setattr(telemetry.importlib.util, "find_spec", lambda name: package)
        return package

    return install


def test_a_run_whose_wandb_cannot_be_reached_does_not_start(tmp_path, away):
    away()
    with pytest.raises(UserError, match=r"W&B cannot be used \(Network error.*\): log in .* WANDB_MODE=offline"):
        make(factory.experiment(tmp_path, wandb=True), tmp_path)


@pytest.mark.parametrize("offline", [True, False])
def test_a_run_that_goes_on_trains_without_wandb(tmp_path, away, capsys, offline):
    make(factory.experiment(tmp_path), tmp_path).close()
    package = away(offline)
    run = make(factory.experiment(tmp_path, wandb=True), tmp_path)
    run.validation(1, {"loss": 1.0})
    run.close()
    said = capsys.readouterr().out
    assert said.count("warning: W&B cannot be used") == 1 and "the training goes on" in said
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]
    assert package.logged == ([1] if offline else [])


def test_torch_is_not_loaded_for_tensorboard(tmp_path, monkeypatch):
    """Where it is installed: seconds of every start, and 300 MB of every process."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    asked: list[str] = []

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            asked.append(name)

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    make(factory.experiment(tmp_path), tmp_path).close()
    assert "tensorboardX" in asked and "torch" not in asked and "torch" not in sys.modules
