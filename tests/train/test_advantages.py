"""The advantages pass: right numbers for the right rows, resumable, never stale, never of a damaged value run."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from hvd.data.dataset import split_episodes
from hvd.data.labels import Labels, Mistake, Waiting, episode_path, write_labels
from hvd.data.loader import Batcher, SampleSpec, Source
from hvd.errors import Lost, Stopped, UserError
from hvd.method import advantages, condition, extraction, policy, ratio, weights
from hvd.method.table import Advantages
from hvd.train import complete, inference, mesh, stage_data, value_pass
from hvd.train import run_dir as runs
from hvd.train.mesh import Devices


def with_policy(cfg, **fields):
    return dataclasses.replace(cfg, policy=dataclasses.replace(cfg.policy, **fields))


def values_computed(monkeypatch) -> list[int]:
    """Collects the number of rows of each shard that is computed rather than read."""
    seen = []
    original = value_pass._shard

    def counting(size, devices, model, batcher, rows, *args):
        seen.append(len(rows))
        return original(size, devices, model, batcher, rows, *args)

    monkeypatch.setattr(value_pass, "_shard", counting)
    return seen


def test_table_holds_the_value_models_numbers(trained):
    table = Advantages.read(trained.advantages_dir)
    data = stage_data.open_dataset(trained, "suboptimal")
    assert table.levels == trained.level_names() and table.row.tolist() == data.rows().tolist()
    assert set(table.dataset) == {"suboptimal"}
    held_out = split_episodes(data, trained.evaluate.val_fraction, trained.seed)[1]
    assert np.flatnonzero(table.split == "val").tolist() == held_out.tolist()
    starts = np.array([e.start for e in data.episodes])
    assert np.array_equal(starts[table.episode] + table.frame, table.row)

    model = inference.load_value(trained)
    some = np.array([0, 17, 40, 128])
    batch = Batcher([Source(data, table.row, 0)], SampleSpec(model.transform, num_levels=3)).batch(
        np.zeros(4, int), some
    )
    v, q = model(batch["observation"], batch["actions"], batch["action_mask"])
    np.testing.assert_allclose(table.v[some], v, atol=1e-5)
    np.testing.assert_allclose(table.q[some], q, atol=1e-5)
    np.testing.assert_allclose(table.a, table.q - table.v[:, None], atol=1e-6)
    np.testing.assert_allclose(table.omega, weights.omega(jnp.asarray(table.a), trained), rtol=1e-5)


def test_weights_of_a_batch_are_those_of_its_rows(trained):
    data = stage_data.open_data(trained, "policy")
    table = Advantages.read(trained.advantages_dir)
    outcomes = {"suboptimal": extraction.Outcomes.of(data.datasets["suboptimal"])}
    omega = extraction.extract(trained, table, outcomes)["suboptimal"].weights
    batches = data.loader(0, mesh.make_devices(1), {"suboptimal": omega})
    _, batch = next(batches)
    batches.close()
    source, index = np.asarray(batch["source"]), np.asarray(batch["index"])
    assert source.tolist() == [0] * 4 + [1] * 4
    np.testing.assert_array_equal(batch["weights"][4:], omega[index[4:]])
    assert np.all(batch["weights"][:4] == 1.0)
    assert np.isfinite(omega[data.train["suboptimal"]]).all()


def test_up_to_date_table_is_used(copied, capsys, monkeypatch):
    seen = values_computed(monkeypatch)
    advantages.main(copied)
    assert "up to date, 129 frames" in capsys.readouterr().out and not seen


def test_other_weighting_needs_no_network(copied, monkeypatch):
    seen = values_computed(monkeypatch)
    awr = with_policy(copied, weighting="awr")
    advantages.main(awr)
    assert not seen
    table = Advantages.read(copied.advantages_dir)
    np.testing.assert_allclose(table.omega, np.exp(3.0 * table.a), rtol=1e-5)
    advantages.main(with_policy(copied, advantage="marginal"))
    table = Advantages.read(copied.advantages_dir)
    np.testing.assert_allclose(table.a[:, 1], table.q[:, 1] - table.q[:, 0], atol=1e-6)


def test_stopped_pass_goes_on(trained, copied, monkeypatch):
    runs_folder = Path(copied.advantages_dir)
    for path in sorted(runs_folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    monkeypatch.setattr(value_pass, "SHARD_ROWS", 64)  # 129 rows: three shards, of two batches
    seen = values_computed(monkeypatch)
    original = inference.ValueFunction.evaluate
    batches = []

    def evaluate(self, batch, flags):
        batches.append(1)
        if len(batches) == 3:  # the first batch of the second shard
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, batch, flags)

    monkeypatch.setattr(inference.ValueFunction, "evaluate", evaluate)
    with pytest.raises(Stopped, match=r"by SIGUSR1 in the advantages pass; \d+ of 129 frames done"):
        advantages.main(copied)
    assert not (runs_folder / "meta.json").exists() and len(list(runs_folder.rglob("*.npz"))) == 1
    monkeypatch.setattr(inference.ValueFunction, "evaluate", original)
    advantages.main(copied)
    assert seen == [64, 64, 64, 1]
    ours, theirs = (Advantages.read(c.advantages_dir) for c in (copied, trained))
    for name in ("row", "v", "q", "omega"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-6)


@pytest.mark.parametrize(
    "batch, parts, devices, most, rows",
    [(16, 1, 8, 2048, 64), (16, 1, 8, 20, 24), (8, 8, 1, 2048, 4), (6, 1, 4, 2048, 24), (2, 1, 16, 5, 16)],
)
def test_rows_of_a_batch(trained, batch, parts, devices, most, rows):
    own = dataclasses.replace(trained.value, batch_size=batch, grad_accum_steps=parts)
    placed = Devices(AbstractMesh((devices, 1), ("data", "fsdp")))  # pyright: ignore[reportArgumentType]
    assert value_pass.batch_rows(dataclasses.replace(trained, value=own), placed, most) == rows


def test_torn_shard_is_computed_again(copied, monkeypatch):
    (Path(copied.advantages_dir) / "meta.json").unlink()
    shard = next(Path(copied.advantages_dir).rglob("*.npz"))
    shard.write_bytes(shard.read_bytes()[:100])
    seen = values_computed(monkeypatch)
    advantages.main(copied)
    assert seen == [129]


def test_damaged_table(copied):
    path = Path(copied.advantages_dir) / "advantages.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    runs.delete(copied.policy_dir)
    with pytest.raises(UserError, match=r"advantages\.parquet is corrupted"):
        policy.main(copied)
    assert not Path(copied.policy_dir, "config.yaml").exists()


def test_key_follows_value_run_and_data(trained):
    data = {"suboptimal": stage_data.open_dataset(trained, "suboptimal")}
    rows = {"suboptimal": data["suboptimal"].rows()}
    other_data = {"suboptimal": dataclasses.replace(data["suboptimal"], digest="other")}
    fewer = {"suboptimal": rows["suboptimal"][1:]}
    keys = {
        advantages.values_key("a", data, rows),
        advantages.values_key("b", data, rows),
        advantages.values_key("a", other_data, rows),
        advantages.values_key("a", data, fewer),
    }
    assert len(keys) == 4


def test_refuses_an_incomplete_value_run(copied):
    Path(copied.value_dir, "complete.json").unlink()
    for step in (advantages, policy):
        with pytest.raises(UserError, match="value is not complete"):
            step.main(copied)


def test_refuses_other_norm_stats(copied):
    path = Path(copied.value_dir, "complete.json")
    record = json.loads(path.read_text())
    record["inputs"]["norm_stats"] = "other"
    path.write_text(json.dumps(record))
    Path(copied.advantages_dir, "meta.json").unlink()
    with pytest.raises(UserError, match="the norm stats changed since"):
        advantages.main(copied)


def test_imitation_has_none(trained, capsys):
    advantages.main(with_policy(trained, weighting="none"))
    assert "imitation needs no advantages" in capsys.readouterr().out


SECOND_RUN = """
import sys, json
from pathlib import Path
from tests.train import factory
from hvd.method import advantages
cfg = factory.experiment(Path(sys.argv[1]), runs_dir=sys.argv[2], policy={"weight_clip": 0.9})
print("here", flush=True)
advantages.main(cfg)
"""


def test_two_runs_that_share_the_table_have_each_its_own_weights(copied, data_folder, monkeypatch):
    """While one run has not read its table yet, another one with another weighting waits."""
    alone = Advantages.read(copied.advantages_dir)
    read, second = Advantages.read, []

    def while_another_starts(folder):
        if not second:
            command = [sys.executable, "-c", SECOND_RUN, str(data_folder), copied.runs_dir]
            second.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
            assert second[0].stdout.readline() == "here\n"
            seen = iter(second[0].stdout.readline, "")
            assert any("waiting for another run of this experiment" in line for line in seen)
        return read(folder)

    monkeypatch.setattr(Advantages, "read", while_another_starts)
    data = {"suboptimal": stage_data.open_dataset(copied, "suboptimal")}
    value = complete.check_complete(copied.value_dir, stage="value", cfg=copied)
    found = advantages.ensured(copied, mesh.make_devices(1), value, data)
    np.testing.assert_array_equal(found.omega, alone.omega)
    with second[0]:
        assert second[0].wait(120) == 0, second[0].stdout.read()
    assert float(read(copied.advantages_dir).omega.max()) <= 0.9 < float(alone.omega.max())


def test_a_table_that_another_run_has_written_all_the_same_is_not_used(copied, monkeypatch):
    """Storage without locks: the run ends with a code that is tried again, and not with another's weights."""
    other = with_policy(copied, weight_clip=0.9)
    data = {"suboptimal": stage_data.open_dataset(copied, "suboptimal")}
    value = complete.check_complete(copied.value_dir, stage="value", cfg=copied)
    ensure = advantages.ensure

    def both(cfg, *args):
        meta = ensure(cfg, *args)
        ensure(other, *args)
        return meta

    monkeypatch.setattr(advantages, "ensure", both)
    with pytest.raises(Lost, match="has written its own advantages"):
        advantages.ensured(copied, mesh.make_devices(1), value, data)


def test_what_a_killed_pass_left_is_removed(copied):
    folder = Path(copied.advantages_dir)
    (folder / "meta.json").unlink()
    (folder / ".advantages.parquet.0123456789abcdef.tmp").write_text("half")
    (folder / ".advantages.parquet.notes").write_text("mine")
    advantages.main(copied)
    assert {p.name for p in folder.iterdir()} == {
        "advantages.parquet",
        "meta.json",
        "shards",
        ".advantages.parquet.notes",
    }


def test_the_outcomes_of_a_datasets_frames(trained):
    data = stage_data.open_dataset(trained, "suboptimal")
    found = extraction.Outcomes.of(data)
    for episode in data.all_episodes:
        span = slice(episode.start, episode.stop)
        assert (found.success[span] == episode.success).all()
        rewards = data.rewards[span]
        assert found.rewarded[span].tolist() == [bool((rewards[i:] > 0).any()) for i in range(len(rewards))]


def test_a_policy_filtered_by_the_expert_ratio(copied, monkeypatch, capsys):
    """The table gains the ratio without another pass of the value model, and the policy sees only the rows kept."""
    monkeypatch.setattr(ratio, "_STEPS", 20)
    computed = values_computed(monkeypatch)
    cfg = with_policy(
        copied, extractor="filter", score="ratio", score_levels="joint", gate="success", run_name="filtered"
    )
    before = Advantages.read(copied.advantages_dir)
    policy.main(cfg)
    table, data = Advantages.read(cfg.advantages_dir), stage_data.open_data(cfg, "policy")
    assert computed == [] and table.ratio is not None and np.isfinite(table.ratio).all()
    np.testing.assert_array_equal(table.v, before.v)
    kept = extraction.extract(cfg, table, {"suboptimal": extraction.Outcomes.of(data.datasets["suboptimal"])})
    keep = kept["suboptimal"].keep
    success = extraction.Outcomes.of(data.datasets["suboptimal"]).success
    assert keep is not None and not keep[~success].any() and keep.sum() == -(-success[table.row].sum() // 2)
    _, batch = next(data.only({"suboptimal": keep}).loader(0, mesh.make_devices(1), {}))
    index = np.asarray(batch["index"])[np.asarray(batch["source"]) == 1]
    assert len(index) and keep[index].all()
    assert "frames of experts" in capsys.readouterr().out
    # asked again, it is up to date; the published weighting takes the same table
    advantages.main(cfg)
    advantages.main(copied)
    assert capsys.readouterr().out.count("up to date") == 2


def test_a_conditioned_policy_reads_how_good_each_chunk_is(copied, monkeypatch):
    """Its own text stands before a row's task, that of good ones in the demonstrations; a share lacks it."""
    cfg = with_policy(copied, extractor="condition", score_levels="joint", extractor_params={"drop": 0.25})
    started = {}
    monkeypatch.setattr(policy, "run_stage", lambda *args, **named: started.update(named))
    policy.main(cfg)
    data, weights = started["choose_rows"](stage_data.open_data(cfg, "policy"), mesh.make_devices(1))
    scores, texts = Advantages.read(cfg.advantages_dir), condition.texts(cfg)
    mixed = scores.of("suboptimal")
    score = extraction.score(cfg, mixed)[:, 0]
    good = dict(zip(mixed.row.tolist(), score >= np.quantile(score, 0.7), strict=True))
    dropped = []
    with data.loader(0, mesh.make_devices(1), weights) as loader:
        for _, batch in itertools.islice(loader, 40):
            rows = zip(*(np.asarray(batch[name]).tolist() for name in ("source", "index")), strict=True)
            for (source, row), tokens in zip(rows, np.asarray(batch["observation"]["tokenized_prompt"]), strict=True):
                task = data.datasets["suboptimal" if source else "optimal"].tasks[0]
                told = texts[1 + good[row]] if source else texts[2]
                spoken, _ = data.transform.tokenizer.encode([told + task, task])
                dropped.append(np.array_equal(tokens, spoken[1]))
                assert dropped[-1] or np.array_equal(tokens, spoken[0])
    assert abs(np.mean(dropped) - 0.25) < 4 * np.sqrt(0.25 * 0.75 / len(dropped))


def test_the_oracle_needs_labels_and_no_value_run(copied, monkeypatch):
    """It trains on the rows that the label files call right, before any value run is there."""
    data = stage_data.open_data(copied, "policy")
    mixed = data.datasets["suboptimal"]
    cfg = with_policy(copied, extractor="oracle", score_levels="joint", value_run="nowhere")
    started = {}
    monkeypatch.setattr(policy, "run_stage", lambda *args, **named: started.update(named))
    policy.main(cfg)
    with pytest.raises(UserError, match="names no mistakes: only simulated"):
        started["choose_rows"](data, mesh.make_devices(1))
    labels_dir = Path(copied.runs_dir) / "labels"
    labels_dir.mkdir(parents=True)
    for episode in mixed.all_episodes:
        mistakes, waiting = (Mistake("base", 0, 4, "x"),), (Waiting("arms", 4, 8),)
        labels = Labels("x", True, mistakes=mistakes, waiting=waiting)
        write_labels(episode_path(labels_dir, episode.index), labels)
    labelled = dataclasses.replace(mixed, labels_dir=labels_dir)
    data = dataclasses.replace(data, datasets={**data.datasets, "suboptimal": labelled})
    chosen, weights = started["choose_rows"](data, mesh.make_devices(1))
    first = {e.start + i for e in mixed.all_episodes for i in range(4)}
    assert first and not first & set(chosen.train["suboptimal"].tolist())
    assert set(chosen.train["suboptimal"]) == set(data.train["suboptimal"]) - first
    assert (weights["suboptimal"][sorted(first)] == 0).all() and started["predecessors"] == {}
    horizon = cfg.model.action_horizon
    with_waiting = labelled.wrong_shares(("base", "torso", "arms"), horizon, True)
    start = mixed.all_episodes[0].start
    assert (
        with_waiting[start + 4, 2] > 0 == labelled.wrong_shares(("base", "torso", "arms"), horizon, False)[:, 2].max()
    )
