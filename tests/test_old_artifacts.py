"""What version 0.1.0 wrote (tests/artifacts/README.md) opens in this one, and its runs go on with the same numbers."""

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from hvd import cli
from hvd.data import normalize
from hvd.evaluate import command as evaluate
from hvd.method import advantages, policy, value
from hvd.models import gemma
from hvd.report import command as report
from hvd.train import complete, stage_data
from hvd.train import run_dir as runs
from hvd.train.inference import load_policy, load_value
from tests.train import factory

pytestmark = pytest.mark.optimised

ARCHIVE = Path(__file__).parent / "artifacts" / "v0_1_0.tar.xz"
MINI = ("paligemma_variant", "action_expert_variant", "value_expert_variant")


@pytest.fixture
def cfg(tmp_path, monkeypatch):
    """Today's experiment of the old folders, which are the working directory."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    mini = dataclasses.replace(gemma.VARIANTS["dummy"], depth=2, width=16, mlp_dim=32)
    monkeypatch.setitem(gemma.VARIANTS, "mini", mini)
    return factory.experiment(Path(""), model=factory.model(**dict.fromkeys(MINI, "mini")))


def lines(path: Path | str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_datasets_and_norm_stats(cfg):
    for role, frames, episodes in (("optimal", 88, 4), ("suboptimal", 129, 6)):
        # once through the columns that the old version left in .hvd_cache, once without them
        for cached in (True, False):
            if not cached:
                shutil.rmtree(f"data/{role}/.hvd_cache")
            dataset = stage_data.open_dataset(cfg, role)
            assert (dataset.num_frames, len(dataset.all_episodes)) == (frames, episodes)
            assert dataset.digest == runs.read("runs/tiny/value").inputs[role]
    stats = normalize.load_shared(cfg)
    assert stats["state"].mean.shape == (factory.STATE,)


def test_runs_are_complete(cfg, capsys):
    complete.main(cfg)
    said = capsys.readouterr().out
    assert said.count("complete  ") == 2 and "BAD" not in said
    for stage in ("value", "policy"):
        record = runs.read(f"runs/tiny/{stage}")
        assert record is not None and runs.differing(cfg, record.config, stage) == []


def test_a_complete_run_is_not_trained_again(cfg, capsys):
    before = Path("runs/tiny/policy/complete.json").read_bytes()
    policy.main(cfg)
    assert "complete" in capsys.readouterr().out
    assert Path("runs/tiny/policy/complete.json").read_bytes() == before


def test_the_models_answer_as_they_did(cfg):
    answers = np.load("answers.npz")
    rng = np.random.default_rng(0)
    state = rng.normal(size=(3, factory.STATE)).astype(np.float32)
    np.testing.assert_array_equal(state, answers["state"])
    prompts = ["carry the tote"] * 3
    acting = load_policy(cfg)
    actions = acting.act(state, {}, prompts, jax.random.key(0))
    np.testing.assert_allclose(actions, answers["actions"], rtol=1e-6, atol=1e-6)
    observation = acting.transform.observation(state, {}, prompts)
    chunk = rng.normal(size=(3, 4, cfg.model.action_dim)).astype(np.float32)
    v, q = load_value(cfg)(observation, chunk, np.ones((3, 4), bool))
    np.testing.assert_allclose(v, answers["v"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(q, answers["q"], rtol=1e-6, atol=1e-6)


def test_the_advantage_table_is_not_stale(cfg, capsys):
    before = Path("runs/tiny/advantages/advantages.parquet").read_bytes()
    advantages.main(cfg)
    assert "up to date, 129 frames" in capsys.readouterr().out
    assert Path("runs/tiny/advantages/advantages.parquet").read_bytes() == before


@pytest.mark.slow
def test_evaluation_and_report(cfg, capsys):
    before = json.loads(Path("runs/tiny/evaluation/policy/results.json").read_text())
    Path("runs/tiny/report.html").unlink()
    report.main(cfg)
    assert Path("runs/tiny/report.html").stat().st_size > 10_000
    evaluate.main(cfg)
    after = json.loads(Path("runs/tiny/evaluation/policy/results.json").read_text())
    assert after.keys() == before.keys()


@pytest.mark.slow
def test_a_run_goes_on_with_the_same_samples_and_numbers(cfg):
    value.main(dataclasses.replace(cfg, value=dataclasses.replace(cfg.value, num_train_steps=16)))
    expected, got = lines("value_to_16.metrics.jsonl"), lines("runs/tiny/value/metrics.jsonl")
    assert [line.keys() for line in got] == [line.keys() for line in expected]
    for old, new in zip(expected, got, strict=True):
        numbers = [name for name in old if name != "split" and not name.startswith(("time/", "memory/"))]
        assert new["split"] == old["split"]
        for name in numbers:
            np.testing.assert_allclose(new[name], old[name], rtol=2e-5, atol=1e-6, err_msg=f"{old['step']}: {name}")
    assert lines("runs/tiny/value/samples.jsonl") == lines("value_to_16.samples.jsonl")


def test_jobs_are_listed(cfg, capsys, monkeypatch):
    monkeypatch.delenv("HVD_JOBS_DIR", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert cli.main(["jobs", "list", "--all", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["id"], row["stage"], row["experiment"]) == ("41", "value", "runs/tiny/value")
    assert (row["state"], row["step"], row["total"], row["causes"]) == ("COMPLETED", 12, 12, {"preempted": 1})
