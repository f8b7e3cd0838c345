"""What is said about a config before anything runs."""

import dataclasses

import pytest

from hvd import checks, overrides
from hvd.configs import DataConfig
from hvd.errors import UserError
from hvd.experiments import CONFIGS, get_config
from hvd.train import inputs


def parse(text: str, config: str = "demo"):
    return overrides.experiment(["--config", config, *text.split()])


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_named_configs_are_right(name):
    cfg = get_config(name).resolved()
    checks.check_config(cfg)
    checks.check_devices(cfg, max(1, cfg.fsdp_devices))


@pytest.mark.parametrize(
    "text, line",
    [
        ("--value.batch_size 0", "value.batch_size 0 must be at least 1"),
        ("--value.gamma 1.5", "value.gamma 1.5 must be more than 0 and at most 1"),
        ("--value.gamma nan", "value.gamma nan is not a finite number"),
        ("--policy.lr_schedule.peak_lr -1", "policy.lr_schedule.peak_lr -1.0 must be positive"),
        ("--model.tau 1", "model.tau 1.0 must be between 0 and 1"),
        ("--model.method expo", "model.method 'expo' is not one of exponential, expectile, quantile; nearest: expo"),
        ("--policy.weighting softplus", "policy.weighting 'softplus' is not one of hvd, awr, none; known: awr"),
        ("--model.method_params.kappa 1", "model.method_params.kappa: objective 'exponential' has no such parameter"),
        ("--policy.weighting_params.p 1", "policy.weighting_params.p: weighting 'hvd' has no such parameter"),
        ("--more_data.day3.share 0.2", "more_data.day3 names no dataset; set --more_data.day3.repo_id"),
        ("--more_data.value.repo_id x", "more_data.value: 'value' cannot be the name of a set"),
        ("--more_data.day3.repo_id x --more_data.day3.share 2", "more_data.day3.share 2.0 must be from 0 to 1"),
        ("--more_data.day3.repo_id x --more_data.day3.share 1", "more_data.day3.share 1.0: more than a batch"),
        ("--policy.suboptimal_share 2", "policy.suboptimal_share 2.0 must be from 0 to 1"),
        ("--evaluate.val_fraction 1", "evaluate.val_fraction 1.0 must be from 0 to less than 1"),
        ("--model.action_patch 3", "model.action_patch 3 does not divide model.action_horizon 20"),
        ("--model.action_dim 7", "model.action_dim 7 is smaller than robot r1's 21"),
        ("--evaluate.execute_steps 21", "evaluate.execute_steps 21 and delay 0 are more than the 20 actions"),
        ("--evaluate.delay 11", "evaluate.execute_steps 10 and delay 11 are more than the 20 actions"),
        ("--evaluate.delay 3 --evaluate.execute_steps 2", "evaluate.delay 3 is more than execute_steps 2"),
        ("--policy.prefix_max 20", "policy.prefix_max 20 must be less than model.action_horizon 20"),
        (
            "--evaluate.chunking prefix",
            "evaluate.chunking prefix: policy.prefix_max 0 must be 1 or more (evaluate.delay)",
        ),
        (
            "--evaluate.chunking prefix --policy.prefix_max 2 --evaluate.delay 3",
            "evaluate.chunking prefix: policy.prefix_max 2 must be 3 or more",
        ),
        ("--robot r2", "unknown robot 'r2'; nearest: r1"),
        ("--model.hierarchical_actions [[0,1,99]]", "model.hierarchical_actions: robot r1 has no action 99"),
        ("--model.hierarchical_actions [[0,1],[1]]", "model.hierarchical_actions: action 1 stands in it twice"),
        ("--model.hierarchical_actions [[0,1],[2]]", "model.hierarchical_actions: robot r1's action(s) [3, 4, 5"),
        ("--model.cameras base_0_rbg", "model.cameras: 'base_0_rbg' is in no dataset's keys.images; nearest: base_0"),
        ("--fsdp_devices 3", "value.batch_size 64 is not divisible by fsdp_devices 3"),
        ("--fsdp_devices -1", "fsdp_devices -1 must not be negative"),
        ("--value.grad_accum_steps 0", "value.grad_accum_steps 0 must be at least 1"),
        ("--policy.grad_accum_steps 3", "policy.grad_accum_steps 3 does not divide policy.batch_size 32"),
        ("--policy.run_name value", "policy.run_name 'value' is taken by another part"),
        ("--policy.run_name a/b", "policy.run_name 'a/b' is not the name of a folder"),
        ("--exp_name ../up", "exp_name '../up' is not the name of a folder"),
        ("--exp_name /up", "exp_name '/up' is not the name of a folder"),
    ],
)
def test_a_contradiction_is_one_line(text, line):
    with pytest.raises(UserError) as error:
        checks.check_config(parse(text))
    assert str(error.value).startswith(line)


@pytest.mark.parametrize(
    "text, devices, processes, line",
    [
        ("", 3, 1, "value.batch_size 64 is not divisible by the 3 devices"),
        ("--value.batch_size 60", 8, 1, "value.batch_size 60 is not divisible by the 8 devices"),
        ("--policy.batch_size 66", 4, 2, "policy.batch_size 66 is not divisible by the 4 devices"),
        ("--fsdp_devices 4", 2, 1, "fsdp_devices 4 does not divide the 2 device(s)"),
        ("--policy.grad_accum_steps 8", 8, 1, "policy.grad_accum_steps 8 leaves micro-batches of 4 rows"),
        ("", 3, 2, "3 devices cannot be divided over 2 processes"),
    ],
)
def test_batches_are_divided_over_devices(text, devices, processes, line):
    with pytest.raises(UserError) as error:
        checks.check_devices(parse(text), devices, processes)
    assert str(error.value).startswith(line)


def test_the_sets_that_are_asked_for_must_be_named():
    cfg = get_config("demo")
    with pytest.raises(UserError, match="has no optimal set"):
        checks.check_config(dataclasses.replace(cfg, optimal_data=DataConfig()))
    with pytest.raises(UserError, match=r"policy.suboptimal_share 0.5 needs a suboptimal set"):
        checks.check_config(dataclasses.replace(cfg, suboptimal_data=DataConfig()))
    alone = dataclasses.replace(cfg, suboptimal_data=DataConfig())
    alone = dataclasses.replace(alone, policy=dataclasses.replace(cfg.policy, suboptimal_share=0.0))
    with pytest.raises(UserError, match=r"value.data 'both' needs a suboptimal set"):
        checks.check_config(alone)
    checks.check_config(dataclasses.replace(alone, value=dataclasses.replace(cfg.value, data="optimal")))


def test_a_dataset_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"optimal_data: no LeRobot dataset at {tmp_path / 'g1_bottle'}"):
        inputs.check_datasets(get_config("g1"))
    inputs.check_datasets(get_config("demo"))  # makes its own


def test_a_tokenizer_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"model.tokenizer_path 'nowhere' is no file"):
        inputs.check_datasets(parse("--model.tokenizer paligemma --model.tokenizer_path nowhere"))


def test_weights_that_are_not_there_are_named(tmp_path, monkeypatch):
    """A local path, a URL, a network that must not be asked; of a run that goes on nothing is asked."""
    monkeypatch.setenv("HVD_CACHE", str(tmp_path / "cache"))
    runs = f"--runs_dir {tmp_path}/runs --policy.weight_loader"
    with pytest.raises(UserError, match=r"^policy.weight_loader \S+nowhere: no Orbax checkpoint there"):
        inputs.check_weights(parse(f"{runs} {tmp_path}/nowhere"), ("value", "policy"))
    inputs.check_weights(parse(f"{runs} {tmp_path}/nowhere"), ("value",))
    (tmp_path / "here" / "params").mkdir(parents=True)
    (tmp_path / "here" / "params" / "_METADATA").write_text("{}")
    for path in ("here", "here/params"):
        inputs.check_weights(parse(f"{runs} {tmp_path}/{path}"), ("policy",))
    monkeypatch.setenv("HVD_OFFLINE", "1")
    url = "s3://openpi-assets/checkpoints/pi0_base/params"
    with pytest.raises(UserError, match=rf"^policy.weight_loader {url}: HVD_OFFLINE is set"):
        inputs.check_weights(parse(f"{runs} {url}"), ("policy",))
    (tmp_path / "runs" / "demo" / "policy" / "checkpoints" / "5").mkdir(parents=True)
    inputs.check_weights(parse(f"{runs} {url}"), ("policy",))
    with pytest.raises(UserError, match="HVD_OFFLINE"):
        inputs.check_weights(parse(f"{runs} {url}"), ("policy",), overwrite=True)


def test_the_public_tokenizer_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HVD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HVD_OFFLINE", "1")
    with pytest.raises(UserError, match=r"gs://big_vision/paligemma_tokenizer.model: .* --model.tokenizer_path FILE"):
        inputs.check_datasets(parse("--model.tokenizer paligemma"))


@pytest.mark.parametrize("flag", ["--value.num_train_steps", "--policy.batch_size", "--seed", "--num_workers"])
def test_a_whole_number_that_no_array_holds_is_named(flag):
    with pytest.raises(UserError, match=f"{flag[2:]} 9999999999 is out of range"):
        checks.check_config(parse(f"{flag} 9999999999"))


def test_a_folder_that_the_system_makes_nothing_in_is_named(tmp_path):
    with pytest.raises(UserError, match=r"/proc/nowhere/demo cannot be written .*; set --runs_dir"):
        inputs.check_writable("/proc/nowhere/demo")


def test_a_runs_dir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="is no folder; set --runs_dir"):
        inputs.check_writable(str(tmp_path / "runs" / "demo"))
    inputs.check_writable(str(tmp_path / "new" / "demo"))
    assert not (tmp_path / "new").exists(), "asking changes nothing"
    inputs.check_writable("gs://bucket/demo")
