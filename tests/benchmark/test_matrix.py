"""A matrix as items: what policies share is made once, what they do not share lies apart."""

from pathlib import Path

import pytest

from hvd.benchmark import matrix
from hvd.checks import check_config
from hvd.errors import UserError

FILE = Path(__file__).with_name("matrix.toml")


def read(tmp_path, text: str = "") -> matrix.Matrix:
    path = tmp_path / "m.toml"
    path.write_text(FILE.read_text() + text)
    return matrix.read(str(path))


def test_items_share_data_value_runs_and_tables(tmp_path):
    items = {item.name: item for item in matrix.items(read(tmp_path))}
    of_one = {name.removeprefix("tote-1-"): item for name, item in items.items() if name.startswith("tote-1-")}
    assert list(of_one) == [
        *("data", "mixed", "value", "table", "td", "ratio"),
        *("awr-table", "awr", "flat-value", "flat-table", "flat"),
    ]
    assert len(items) == 4 * len(of_one)
    seen: set[str] = set()
    for item in items.values():  # in an order that works
        assert seen.issuperset(item.needs)
        seen.add(item.name)
    assert of_one["mixed"].needs == ("tote-1-data",)
    assert of_one["td"].needs == of_one["ratio"].needs == ("tote-1-table",)
    assert of_one["table"].cfg.policy.score == "ratio"  # one table for both, with what one of them needs
    assert of_one["td"].cfg.advantages_dir == of_one["ratio"].cfg.advantages_dir == of_one["table"].cfg.advantages_dir
    assert of_one["awr"].cfg.advantages_dir != of_one["td"].cfg.advantages_dir
    assert of_one["awr"].cfg.value_run_dir == of_one["td"].cfg.value_run_dir == of_one["value"].cfg.value_dir
    assert of_one["flat"].cfg.value_run_dir == of_one["flat-value"].cfg.value_dir
    assert {item.cfg.optimal_data.path() for item in of_one.values()} == {Path("runs/tote-1/datasets/optimal")}
    assert len({item.cfg.policy_dir for item in items.values() if item.cell}) == 20
    # norm stats lie in each experiment's folder: the first item there makes them
    began: dict[str, tuple[str, ...]] = {}
    for item in items.values():
        began.setdefault(item.cfg.exp_name, item.steps)
    assert {steps[0] for steps in began.values()} == {"prepare", "norm-stats"}
    assert of_one["flat-value"].steps == ("norm-stats", "train-value")
    assert of_one["awr-table"].steps == ("norm-stats", "advantages")


def test_data_and_training_seeds(tmp_path):
    items = {i.name: i for i in matrix.items(read(tmp_path).__class__(**{**_fields(tmp_path), "policy_seeds": [0, 3]}))}
    assert {i.cfg.sim.seed for name, i in items.items() if name.startswith("pick-2-")} == {2}
    again, first = items["tote-1-td-r3"], items["tote-1-td"]
    assert again.cfg.seed != first.cfg.seed and again.cfg.value_run_dir == first.cfg.value_run_dir
    assert again.cfg.policy_dir != first.cfg.policy_dir and again.cell.policy_seed == 3
    noise = {name: item.cfg.sim.operator_noise for name, item in items.items()}
    assert (noise["pick-1-td"], noise["pick-1-data"], noise["tote-1-td"]) == ("steady", "steady", "clumsy")
    assert (first.cfg.evaluate.seed, first.cfg.evaluate.num_rollouts) == (500, 4)


def _fields(tmp_path) -> dict:
    found = read(tmp_path)
    return {name: getattr(found, name) for name in found.__struct_fields__}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("config =", "confg ="), "missing required field `config`|unknown field `confg`"),
        (('"pick"]', '"pikc"]'), "unknown task 'pikc'.*pick"),
        (("of_task.pick", "of_task.pikc"), "of_task: 'pikc' is not one of tasks.*pick"),
        (("[1, 2]", "[1, 1]"), "data_seeds: one of them stands there twice"),
        (("[1, 2]", "[-1]"), "Expected `int` >= 0"),
        (('than = "mixed"', 'than = "mixd"'), "unknown policy 'mixd'.*mixed"),
        (("[policies.td]", "[policies.'../td']"), "Expected `str` matching regex"),
        (("title", "= title"), "Invalid|invalid"),
        (("[policies.td]", "[policies.value]"), "'value' cannot name a policy"),
        (('"policy.score"', '"policy.scroe"'), "policies.ratio: unknown field --policy.scroe; nearest: --policy.score"),
        (('"policy.score"', '"model.tau"'), "policies.ratio"),
        (('"policy.extractor" = "filter"\n"policy.score" = "ratio"', '"value.gamma" = 0.5'), "value.gamma is not the"),
        (("[policies.td]", "[policies.flat-value]"), "two things of the matrix would be called tote-1-flat-value"),
        (('value = "flat"', 'value = "falt"'), "policies.flat: unknown value run 'falt'.*flat"),
    ],
)
def test_a_file_that_is_no_matrix_is_refused(tmp_path, change, line):
    path = tmp_path / "m.toml"
    path.write_text(FILE.read_text().replace(*change).replace('"td"', '"mixed"'))
    with pytest.raises(UserError, match=line):
        matrix.items(matrix.read(str(path)))


def test_chunks_shorter_than_what_is_executed_by_default(tmp_path):
    """What policies share does not depend on how they act, and is accepted by `hvd` all the same."""
    text = FILE.read_text().replace("first_start", '"common"."model.action_horizon" = 5\nfirst_start')
    path = tmp_path / "m.toml"
    path.write_text(text.replace('common."sim', '"common"."evaluate.execute_steps" = 5\ncommon."sim'))
    for item in matrix.items(matrix.read(str(path))):
        check_config(item.cfg)
        assert item.cfg.evaluate.execute_steps == 5
