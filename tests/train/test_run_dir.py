"""config.yaml, and whose folder a run directory is."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from hvd import mixture
from hvd.errors import UserError
from hvd.experiments import CONFIGS, get_config
from hvd.fields import from_plain, to_plain
from hvd.train import run_dir as runs
from tests.train import factory


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_config_survives_yaml(name):
    cfg = get_config(name).resolved()
    loaded = yaml.safe_load(yaml.safe_dump(to_plain(cfg)))
    assert from_plain(type(cfg), loaded, "x") == cfg


def test_config_of_another_version():
    cfg = get_config("demo")
    data = to_plain(cfg)
    data["model"]["colour"] = 1
    with pytest.raises(UserError, match="x: model: unknown field 'colour'"):
        from_plain(type(cfg), data, "x")


@pytest.fixture
def started(tmp_path):
    """An experiment whose value run has been started."""
    cfg = factory.experiment(tmp_path)
    runs.write_config(cfg.value_dir, cfg, "value", {"optimal": "abc", "norm_stats": "n"})
    return cfg


def change(cfg, stage=None, **fields):
    if stage is None:
        return dataclasses.replace(cfg, **fields)
    return dataclasses.replace(cfg, **{stage: dataclasses.replace(getattr(cfg, stage), **fields)})


@pytest.mark.parametrize(
    "stage, fields",
    [
        ("value", {"num_train_steps": 99, "log_interval": 1, "save_interval": 2, "keep_period": 7}),
        ("policy", {"weighting": "none", "batch_size": 2}),
        ("evaluate", {"num_rollouts": 3}),
        ("model", {"action_expert_variant": "tiny"}),
        ("optimal_data", {"root": "/elsewhere"}),
        (None, {"num_workers": 9, "fsdp_devices": 2, "exp_name": "moved", "wandb": True}),
    ],
)
def test_same_run(started, stage, fields):
    cfg = change(started, stage, **fields)
    runs.check_startable(started.value_dir, cfg, "value", {"optimal": "abc"}, overwrite=False)
    assert runs.config_hash(cfg, "value") == runs.config_hash(started, "value")


@pytest.mark.parametrize(
    "stage, fields, named",
    [
        ("value", {"gamma": 0.5}, "value.gamma: 0.99 -> 0.5"),
        ("value", {"batch_size": 16}, "value.batch_size: 8 -> 16"),
        ("model", {"tau": 0.9}, "model.tau: 0.7 -> 0.9"),
        ("norm", {"std_floor": 0.5}, "norm.std_floor: 0.01 -> 0.5"),
        ("optimal_data", {"success_only": True}, "optimal_data.success_only: False -> True"),
        ("evaluate", {"val_fraction": 0.5}, "evaluate.val_fraction"),
        (None, {"seed": 3}, "seed: 0 -> 3"),
        (None, {"robot": "r1_pro"}, "robot: 'r1' -> 'r1_pro'"),
    ],
)
def test_another_run_is_refused_by_field(started, stage, fields, named):
    with pytest.raises(UserError, match="holds a run of another config") as error:
        runs.check_startable(started.value_dir, change(started, stage, **fields), "value", {}, overwrite=False)
    assert named in str(error.value) and started.value_dir in str(error.value)


def test_another_stage_is_refused(started):
    with pytest.raises(UserError, match="holds a value run, not a policy run"):
        runs.check_startable(started.value_dir, started, "policy", {}, overwrite=False)


@pytest.mark.parametrize("name, text", [("optimal", "the optimal dataset"), ("norm_stats", "the norm stats")])
def test_changed_input_is_refused(started, name, text):
    with pytest.raises(UserError, match=f"{text} changed since this run started"):
        runs.check_startable(started.value_dir, started, "value", {name: "other"}, overwrite=False)


def test_unused_dataset_is_no_part_of_the_run(started):
    only = change(change(started, "value", data="optimal"), "suboptimal_data", success_only=True)
    assert not any(name.startswith("suboptimal") for name in runs.identity(only, "value"))
    assert mixture.names(change(started, "policy", suboptimal_share=1.0), "policy") == ("suboptimal",)


def test_overwrite_deletes_a_run_and_nothing_else(started, tmp_path):
    (Path(started.value_dir) / "checkpoints/5").mkdir(parents=True)
    (Path(started.value_dir) / "checkpoints/5/data").write_text("x")
    runs.check_startable(started.value_dir, change(started, seed=3), "value", {}, overwrite=True)
    runs.delete(started.value_dir)
    assert list(Path(started.value_dir).iterdir()) == []
    runs.delete(started.value_dir)

    other = tmp_path / "photos"
    other.mkdir()
    (other / "a.jpg").write_text("x")
    with pytest.raises(UserError, match=r"is not a run directory.*--overwrite does not delete it"):
        runs.check_startable(other, started, "value", {}, overwrite=True)
    with pytest.raises(UserError, match="is not a run directory"):
        runs.delete(other)
    assert (other / "a.jpg").exists()
    with pytest.raises(UserError, match="is a file"):
        runs.delete(other / "a.jpg")


def test_overwrite_touches_nothing_where_a_folder_is_a_link(started, tmp_path):
    run, large = Path(started.value_dir), tmp_path / "larger-disk"
    (large / "5").mkdir(parents=True)
    (run / "checkpoints").symlink_to(large)
    before = sorted(run.iterdir())
    with pytest.raises(UserError, match=r"checkpoints is a link to a folder, which --overwrite does not empty: delete"):
        runs.delete(run)
    assert sorted(run.iterdir()) == before and (large / "5").is_dir()


def test_foreign_config_yaml_is_no_run(tmp_path):
    (tmp_path / "config.yaml").write_text("colour: red\n")
    with pytest.raises(UserError, match=r"config\.yaml is not the config of a run"):
        runs.delete(tmp_path)
    assert (tmp_path / "config.yaml").exists()
