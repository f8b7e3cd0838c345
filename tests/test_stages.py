"""Which steps a stage has."""

import pytest

from hvd import cli, overrides, stages
from hvd.errors import UserError
from hvd.method import extraction

BASELINES = ["published-hvd", "level-by-level", "imitation-expert", "imitation-mixed", "imitation-success"]


def plan(stage, *options, config="demo", together=True, **more):
    cfg = overrides.experiment(["--config", config, *options])
    parts = stages.parts(cfg, stage, together=together, **more)
    return [group for groups in parts.values() for group in groups]


def names(groups):
    return [[step.name for step in group] for group in groups]


def test_all_of_the_demo():
    assert names(plan("all", "--evaluate.baselines", "true")) == [
        ["prepare"],
        ["train-value"],
        ["advantages"],
        ["policy", *BASELINES],
        *([f"evaluate-{name}"] for name in ("policy", *BASELINES)),
        ["report"],
    ]


def test_where_the_stages_are_jobs_the_baselines_are_trained_after_the_policy():
    both = [names(plan("all", "--evaluate.baselines", "true", together=together)) for together in (True, False)]
    assert both[1][3:9] == [["policy"], *([name] for name in BASELINES)]
    assert {name for group in both[0] for name in group} == {name for group in both[1] for name in group}


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
            for one in group:
                step, *args = one.words(["--config", config, *options])
                assert step in cli.STEPS
                if not cli.STEPS[step].own_flags:
                    rest, _ = overrides.take_overwrite(args)
                    overrides.experiment(rest)


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ((), ["filter ratio joint, reward only", "hvd", "filter ratio, reward only"]),
        (("--policy.score_levels", "own"), ["filter ratio, reward only", "hvd", "filter ratio joint, reward only"]),
        (("--policy.extractor", "weighted", "--policy.extractor_params", "{}", "--policy.gate", "none"), ["hvd"]),
    ],
)
def test_baselines_differ_from_the_policy_in_weights_and_data_only(options, labels):
    found = {}
    for group in plan("policy", "--evaluate.baselines", "true", *options):
        for step in group:
            if step.step == "train-policy":
                found[step.name] = overrides.experiment(["--config", "demo", *options, *step.extra])
    assert [extraction.label(cfg) for cfg in found.values()] == [*labels, "none", "none", "none"]
    assert found["imitation-expert"].policy.suboptimal_share == 0
    assert found["imitation-success"].suboptimal_data.success_only
    assert not found["imitation-mixed"].suboptimal_data.success_only
    assert {cfg.policy_dir for cfg in found.values()} == {f"runs/demo/{name}" for name in found}
    assert len({cfg.value_dir for cfg in found.values()}) == 1


def test_overwrite_goes_to_the_trainings():
    for group in plan("all", overwrite=True):
        for step in group:
            assert ("--overwrite" in step.extra) == (step.step in ("train-value", "train-policy"))


def test_only_what_jax_distributes_is_spread():
    spread = {step.step for group in plan("all") for step in group if step.spread}
    assert spread == {"train-value", "advantages", "train-policy"}


def test_an_unknown_stage_is_named():
    with pytest.raises(UserError, match="--stage 'polcy' is not one of all, value, policy"):
        plan("polcy")
