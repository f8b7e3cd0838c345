"""Which sets a stage trains on, in which role, and their shares; two sets are what they always were."""

import pytest

from hvd import checks, mixture, overrides
from hvd.errors import UserError
from hvd.train import run_dir

DAY3 = "--more_data.day3.repo_id my/day3"
EXPERT = "--more_data.expert2.repo_id my/expert2 --more_data.expert2.role optimal"
FRAMES = {"optimal": 100, "suboptimal": 300, "day3": 100, "expert2": 300}


def parse(text: str):
    cfg = overrides.experiment(["--config", "pi0_r1", *text.split()])
    checks.check_config(cfg)
    return cfg


def parts(cfg, stage):
    shares = mixture.parts(cfg, stage, {name: FRAMES[name] for name in mixture.names(cfg, stage)})
    return {name: round(share / sum(shares.values()), 4) for name, share in shares.items()}


def test_two_sets():
    cfg = parse("--policy.suboptimal_share 0.3")
    assert mixture.names(cfg, "value") == ("optimal",) and mixture.names(cfg, "policy") == ("optimal", "suboptimal")
    assert mixture.parts(cfg, "policy", {"optimal": 7, "suboptimal": 9}) == {"optimal": 1 - 0.3, "suboptimal": 0.3}
    both = parse("--value.data both")
    assert mixture.parts(both, "value", {"optimal": 7, "suboptimal": 9}) == {"optimal": 7.0, "suboptimal": 9.0}
    assert mixture.names(parse("--value.data mixed"), "value") == ("suboptimal",)
    assert mixture.names(parse("--policy.suboptimal_share 1"), "policy") == ("suboptimal",)
    assert [mixture.number(cfg, name) for name in ("optimal", "suboptimal")] == [0, 1]


def test_further_sets_join_their_side():
    cfg = parse(f"{DAY3} {EXPERT} --value.data both")
    assert mixture.names(cfg, "policy") == ("optimal", "suboptimal", "day3", "expert2")
    assert mixture.weighted(cfg) == ("suboptimal", "day3") and mixture.imitated(cfg) == (0, 3)
    assert parts(cfg, "policy") == {"optimal": 0.125, "suboptimal": 0.375, "day3": 0.125, "expert2": 0.375}
    assert parts(cfg, "value") == {"optimal": 0.125, "suboptimal": 0.375, "day3": 0.125, "expert2": 0.375}
    assert mixture.names(parse(f"{DAY3} {EXPERT}"), "value") == ("optimal", "expert2")


def test_a_share_is_of_each_batch_in_both_stages():
    cfg = parse(f"{DAY3} --more_data.day3.share 0.2 --value.data both --policy.suboptimal_share 0.25")
    assert parts(cfg, "policy") == {"optimal": 0.6, "suboptimal": 0.2, "day3": 0.2}
    assert parts(cfg, "value") == {"optimal": 0.2, "suboptimal": 0.6, "day3": 0.2}


def test_rollouts_stand_in_for_the_suboptimal_set():
    cfg = parse(f"{DAY3} --suboptimal_data.repo_id= --value.data both")
    assert mixture.names(cfg, "policy") == ("optimal", "day3") == mixture.names(cfg, "value")
    assert parts(cfg, "policy") == {"optimal": 0.5, "day3": 0.5}


@pytest.mark.parametrize(
    "text, line",
    [
        (f"{DAY3} --more_data.day3.rol x", "unknown field --more_data.day3.rol; nearest: --more_data.day3.role"),
        (f"{DAY3} --more_data.day3.role expert", "--more_data.day3.role: 'expert' is not one of"),
        (f"{DAY3} --more_data.day3.share 0.6 --optimal_data.share 0.6", "optimal_data.share 0.6, more_data.day3.share"),
        ("--suboptimal_data.repo_id=", "policy.suboptimal_share 0.5 needs a suboptimal set"),
    ],
)
def test_a_wrong_set_is_one_line(text, line):
    with pytest.raises(UserError) as error:
        parse(text)
    assert str(error.value).startswith(line)


def test_a_set_is_part_of_the_run_that_trains_on_it():
    plain, more = parse(""), parse(DAY3)
    assert run_dir.config_hash(plain, "value") == run_dir.config_hash(more, "value")  # value.data optimal
    assert run_dir.config_hash(plain, "policy") != run_dir.config_hash(more, "policy")
    assert "more_data.day3.repo_id" in run_dir.identity(more, "policy")
    lies_elsewhere = parse(f"{DAY3} --more_data.day3.root /elsewhere")
    assert run_dir.config_hash(lies_elsewhere, "policy") == run_dir.config_hash(more, "policy")
