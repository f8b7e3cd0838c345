"""Both stages: what a run leaves behind, that a resumed one is the same run, and what is refused."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hvd import export
from hvd.errors import Failed, Stopped, UserError
from hvd.method import policy, value
from hvd.models.pi0 import Pi0
from hvd.train import complete, stage_data
from hvd.train import run_dir as runs
from tests.train.compare import assert_same_run, lines, metrics

STAGES = {"value": value, "policy": policy}


def folder(cfg, stage: str) -> str:
    return cfg.value_dir if stage == "value" else cfg.policy_dir


def signalled(number):
    def do(batch):
        os.kill(os.getpid(), number)
        return batch

    return do


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_run_leaves(trained, stage):
    root = Path(folder(trained, stage))
    files = {"config.yaml", "norm_stats.json", "metrics.jsonl", "samples.jsonl", "events.jsonl", "complete.json"}
    assert {p.name for p in root.iterdir()} == files | {"tb", "checkpoints"}
    assert [p.name for p in (root / "checkpoints").iterdir()] == ["12"]
    assert sorted(p.name for p in (root / "checkpoints/12").iterdir() if p.is_dir()) == [
        "loop",
        "params",
        "train_state",
    ]
    found = metrics(root)
    assert [(line["step"], line["split"]) for line in found] == [
        (4, "train"), (6, "val"), (8, "train"), (12, "train"), (12, "val"),
    ]  # fmt: skip
    assert all(np.isfinite(v) for line in found for v in line.values() if not isinstance(v, str))
    record = runs.read(root)
    assert record is not None and record.stage == stage and record.config == trained
    timed = lines(root / "metrics.jsonl")[0]
    assert timed["time/tflops_per_device"] > 0
    assert timed["time/samples_per_s"] > 0 and timed["time/data_wait_s"] >= 0 and timed["memory/rss_mb"] > 50
    assert [line["event"] for line in lines(root / "events.jsonl")] == ["start", "first_step", "complete"]


def test_metrics_of_the_stages(trained):
    levels = ("base", "torso", "arms")
    found = metrics(trained.value_dir)[0].keys()
    assert found >= {"loss", "loss_q", "loss_v", "v_mean", "v_std", "grad_norm", "lr"}
    assert found >= {f"q/{level}" for level in levels} | {f"advantage/{level}" for level in levels}
    found = metrics(trained.policy_dir)[0].keys()
    assert found >= {"loss", "loss_rl", "loss_bc", "grad_norm"} | {f"weight/{level}" for level in levels}


@pytest.mark.parametrize(
    "stage, number, where",
    [
        ("value", signal.SIGTERM, 6),
        pytest.param("value", signal.SIGUSR1, 11, marks=pytest.mark.slow),
        ("policy", signal.SIGUSR2, 0),
    ],
)
def test_stopped_and_resumed_is_the_same_run(trained, copied, at_step, monkeypatch, stage, number, where):
    cfg = copied
    runs.delete(folder(cfg, stage))
    before = signal.getsignal(signal.SIGTERM)
    at_step(where, signalled(number))
    with pytest.raises(Stopped, match=rf"by {number.name} at step {where + 1}|{where + 2}"):
        STAGES[stage].main(cfg)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not Path(folder(cfg, stage), "complete.json").exists()
    saved = [int(p.name) for p in Path(folder(cfg, stage), "checkpoints").iterdir()]
    assert max(saved) in (where + 1, where + 2), "saved within one step"

    monkeypatch.undo()
    STAGES[stage].main(cfg)
    assert_same_run(folder(cfg, stage), folder(trained, stage), 12)
    complete.check_complete(folder(cfg, stage), stage=stage, cfg=cfg)
    events = [line["event"] for line in lines(Path(folder(cfg, stage), "events.jsonl"))]
    assert events.count("start") == 2 and events.count("stop") == 1


@pytest.mark.slow
def test_signal_during_validation(trained, copied, monkeypatch):
    """The validation is cut short, the state saved, and the validation done again by the resumed run."""
    cfg = copied
    runs.delete(cfg.value_dir)
    original = stage_data.StageData.validation

    def validation(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(stage_data.StageData, "validation", validation)
    with pytest.raises(Stopped, match="at step 6"):
        value.main(cfg)
    assert not any(line["split"] == "val" for line in metrics(cfg.value_dir))
    monkeypatch.undo()
    value.main(cfg)
    assert_same_run(cfg.value_dir, trained.value_dir, 12)


def test_a_complete_run_is_left_alone(copied, capsys):
    before = {p: p.stat().st_mtime_ns for p in Path(copied.exp_dir).rglob("*")}
    value.main(copied)
    policy.main(copied)
    assert capsys.readouterr().out.count("complete at step 12, nothing to do") == 2
    assert {p: p.stat().st_mtime_ns for p in Path(copied.exp_dir).rglob("*")} == before


def test_a_longer_run_goes_on(copied):
    """num_train_steps may be raised: the run goes on from its end, and is not complete meanwhile."""
    longer = dataclasses.replace(copied, value=dataclasses.replace(copied.value, num_train_steps=14))
    with pytest.raises(UserError, match="complete at step 12, but the config asks for 14"):
        complete.check_complete(longer.value_dir, stage="value", cfg=longer)
    value.main(longer)
    assert complete.check_complete(longer.value_dir, stage="value", cfg=longer).step == 14
    with pytest.raises(UserError, match="complete at step 14, but the config asks for 12"):
        value.main(copied)


def test_a_longer_run_does_not_go_on_from_a_damaged_one(copied):
    """complete.json says what every byte was: a flipped one is not certified by the next complete.json."""
    files = [p for p in Path(copied.value_dir, "checkpoints/12").rglob("*") if p.is_file()]
    path = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    longer = dataclasses.replace(copied, value=dataclasses.replace(copied.value, num_train_steps=14))
    with pytest.raises(UserError, match=r"is corrupted: its sha256 is not the one in complete\.json"):
        value.main(longer)
    assert {p.name for p in Path(copied.value_dir, "checkpoints").iterdir()} == {"12"}


def test_a_damaged_checkpoint_is_left_aside(trained, copied, capsys):
    """The run goes on from the one before it, and ends as if nothing had happened."""
    cfg = dataclasses.replace(copied, value=dataclasses.replace(copied.value, save_interval=4, keep_period=4))
    runs.delete(cfg.value_dir)
    value.main(cfg)
    root = Path(cfg.value_dir)
    (root / "complete.json").unlink()
    (root / "checkpoints/12/loop/metadata").unlink()
    shutil.rmtree(root / "checkpoints/8/train_state")
    capsys.readouterr()
    value.main(cfg)
    said = capsys.readouterr().out
    assert "warning: checkpoint 12: " in said and "warning: checkpoint 8: " in said
    assert {p.name for p in (root / "checkpoints").iterdir()} >= {"4", "8", "12", "8.broken", "12.broken"}
    assert_same_run(cfg.value_dir, trained.value_dir, 12)


def test_a_folder_that_cannot_be_written_is_said_first(fresh, monkeypatch):
    cfg = fresh()
    Path(cfg.exp_dir).mkdir(parents=True)
    Path(cfg.value_dir).write_text("")

    def heavy(*_, **__):
        raise AssertionError("something heavy was begun")

    monkeypatch.setattr(stage_data, "open_data", heavy)
    with pytest.raises(UserError, match=r"value.* set --runs_dir"):
        value.main(cfg)


def test_overwrite_starts_again(trained, copied):
    other = dataclasses.replace(copied, seed=1)
    with pytest.raises(UserError, match=r"run of another config \(seed: 0 -> 1\)"):
        value.main(other)
    value.main(copied, overwrite=True)
    assert len(lines(Path(copied.value_dir, "events.jsonl"))) == 3
    assert_same_run(copied.value_dir, trained.value_dir, 12)


def test_non_finite_loss_stops_the_run(fresh, at_step):
    cfg = fresh()

    def poison(batch):
        return batch | {"reward": batch["reward"].at[3].set(np.nan)}

    at_step(7, poison)
    with pytest.raises(Failed, match=r"training at step 8: .* is nan"):
        value.main(cfg)
    assert not Path(cfg.value_dir, "complete.json").exists()
    assert [p.name for p in Path(cfg.value_dir, "checkpoints").iterdir()] == ["5"], "no checkpoint holds the bad step"
    with pytest.raises(UserError, match=r"is not complete: .*last checkpoint is at step 5"):
        policy.main(cfg)
    assert not Path(cfg.policy_dir).exists()


def test_imitation_needs_no_value_run(fresh, monkeypatch, tmp_path):
    """Here with given actions: an error of 1e3 for each, and of 10 times their number for a further one."""

    def velocity(self, observation, x_t, time):
        given = time == 0
        errors = jnp.where(given, 1e3, 10.0 * given.sum(axis=1, keepdims=True))
        return jnp.broadcast_to(errors[..., None], x_t.shape)

    monkeypatch.setattr(Pi0, "velocity", velocity)
    cfg = fresh(policy={"weighting": "none", "run_name": "imitation", "prefix_max": 3})
    policy.main(cfg)
    assert Path(cfg.policy_dir).name == "imitation" and not Path(cfg.advantages_dir).exists()
    assert complete.check_complete(cfg.policy_dir, stage="policy", cfg=cfg).inputs.keys() == {
        "optimal", "suboptimal", "norm_stats",
    }  # fmt: skip
    for line in metrics(cfg.policy_dir):
        assert line["weight/base"] == 1.0
        assert 100 < line["flow_error"] < 1_000  # the mean of 0, 100, 400 and 900 is 350: given actions cost nothing
    to = export.export(cfg, export.Export(to=str(tmp_path / "out")))
    assert json.loads((to / export.MARK).read_text())["prefix_max"] == 3


def test_policy_refuses_a_value_run_of_another_config(copied):
    cfg = dataclasses.replace(copied, model=dataclasses.replace(copied.model, alpha=2.0))
    runs.delete(cfg.policy_dir)
    with pytest.raises(UserError, match=r"trained with another config \(model\.alpha: 1\.0 -> 2\.0\)"):
        policy.main(cfg)
    assert not Path(cfg.policy_dir, "config.yaml").exists()


def test_batch_too_small_for_the_datasets(fresh):
    cfg = fresh(value={"batch_size": 1})
    with pytest.raises(UserError, match="batch_size 1 is too small for 2 datasets"):
        value.main(cfg)
    assert not Path(cfg.runs_dir).exists()


def test_a_task_that_is_cut_is_said_once_before_training(trained, capsys):
    cfg = dataclasses.replace(trained, model=dataclasses.replace(trained.model, max_token_len=3))
    stage_data.open_data(cfg, "value")
    said = capsys.readouterr().out
    assert said.count("prompt 'carry the tote' has 4 tokens and is cut to the first 3") == 1
    stage_data.open_data(trained, "value")
    assert "tokens" not in capsys.readouterr().out
