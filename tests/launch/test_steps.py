"""Which steps a stage has."""

import pytest

from hvd import cli, overrides
from hvd.errors import UserError
from hvd.launch import steps


def plan(stage, *options, config="demo", **more):
    given = ["--config", config, *options]
    return steps.plan(overrides.experiment(given), stage, given, **more)


def names(groups):
    return [[task.name for task in group] for group in groups]


def test_all_of_the_demo():
    assert names(plan("all", "--evaluate.baselines", "true")) == [
        ["simulate"],
        ["convert-optimal"],
        ["convert-mixed"],
        ["norm-stats"],
        ["train-value"],
        ["advantages"],
        ["policy", "imitation-expert", "imitation-mixed", "imitation-success"],
        ["evaluate-policy"],
        ["evaluate-imitation-expert"],
        ["evaluate-imitation-mixed"],
        ["evaluate-imitation-success"],
        ["report"],
    ]


def test_all_with_the_user_s_own_data():
    assert names(plan("all", config="g1")) == [
        ["norm-stats"],
        ["train-value"],
        ["advantages"],
        ["policy"],
        ["evaluate-policy"],
        ["report"],
    ]


def test_the_two_stages_are_what_all_trains():
    value, policy, everything = (names(plan(stage)) for stage in ("value", "policy", "all"))
    assert value[-1] == ["train-value"]
    assert policy[0] == ["advantages"]
    assert everything[: len(value) + len(policy)] == value + policy


def test_imitation_needs_no_value_run():
    assert names(plan("policy", "--policy.weighting", "none", config="g1")) == [["policy"]]


def test_every_command_line_is_understood():
    for config, options in (("demo", ["--evaluate.baselines", "true"]), ("g1", ["--exp-name", "x"])):
        for group in plan("all", *options, config=config):
            for task in group:
                step, *args = task.args
                assert step in cli.STEPS
                if not cli.STEPS[step].own_flags:
                    rest, _ = overrides.take_overwrite(args)
                    overrides.experiment(rest)


def test_baselines_differ_from_the_policy_in_weights_and_data_only():
    found = {}
    for group in plan("policy", "--evaluate.baselines", "true"):
        for task in group:
            if task.args[0] == "train-policy":
                found[task.name] = overrides.experiment(list(task.args[1:]))
    weights = {name: cfg.policy.weighting for name, cfg in found.items()}
    assert weights == {
        "policy": "hvd",
        "imitation-expert": "none",
        "imitation-mixed": "none",
        "imitation-success": "none",
    }
    assert found["imitation-expert"].policy.suboptimal_share == 0
    assert found["imitation-success"].suboptimal_data.success_only
    assert not found["imitation-mixed"].suboptimal_data.success_only
    assert {cfg.policy_dir for cfg in found.values()} == {f"runs/demo/{name}" for name in found}
    assert len({cfg.value_dir for cfg in found.values()}) == 1


def test_overwrite_goes_to_the_trainings():
    for group in plan("all", overwrite=True):
        for task in group:
            assert ("--overwrite" in task.args) == (task.args[0] in ("train-value", "train-policy"))


def test_only_what_jax_distributes_is_spread():
    spread = {task.args[0] for group in plan("all") for task in group if task.spread}
    assert spread == {"train-value", "advantages", "train-policy"}


def test_an_unknown_stage_is_named():
    with pytest.raises(UserError, match="--stage 'polcy' is not one of all, value, policy"):
        plan("polcy")
