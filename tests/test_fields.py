"""What each field of a config declares, and values of its type from text, JSON, TOML and YAML."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from hvd.configs import Experiment, PolicyConfig, StageConfig, ValueConfig
from hvd.errors import UserError
from hvd.experiments import get_config
from hvd.fields import Mark, between, check_rules, from_plain, from_words, leaves, marks, one_of, option, replaced
from hvd.train import run_dir
from tests import config_docs

HASHES = {
    "value": "046e70c487fe2f5c42d10e777d3153708f418bf3793c73122fcad74a78ab8424",
    "policy": "9204f9faa8dfc5b98e5a10aa797295db1c28bccceb0941db76e47a24c4ec3962",
}
FIELDS = list(leaves(Experiment).values())


def declared(kind: Any) -> Iterator[tuple[Any, dataclasses.Field]]:
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        yield kind, field
        if dataclasses.is_dataclass(hint):
            yield from declared(hint)


def test_every_field_declares_what_it_belongs_to():
    """`option` and `group` are the only ways: a plain default would be a field of which nothing is said."""
    bare = {f"{kind.__name__}.{field.name}" for kind, field in declared(Experiment) if "marks" not in field.metadata}
    assert not bare


@pytest.mark.parametrize("leaf", FIELDS, ids=lambda leaf: leaf.name)
def test_every_number_has_a_rule(leaf):
    assert leaf.rule is not None or leaf.kind not in (int, float)


def test_a_stage_does_not_change_what_its_fields_belong_to():
    """A stage that gives a field of both another default says its rule and marks again."""
    for kind in (ValueConfig, PolicyConfig):
        ours = {field.name: field for field in dataclasses.fields(kind)}
        for field in dataclasses.fields(StageConfig):
            assert marks(ours[field.name]) == marks(field), field.name
            assert ours[field.name].metadata["rule"] is field.metadata["rule"], field.name


def another(kind: Any, value: Any) -> Any:
    """A value of the kind that is not `value`."""
    if typing.get_origin(kind) is Literal:
        return next(choice for choice in typing.get_args(kind) if choice != value)
    if kind is bool:
        return not value
    match value:
        case dict():
            return {**value, "x": "y" if typing.get_args(kind)[1] is str else 0.5}
        case tuple():
            return (*value, "x" if typing.get_args(kind)[0] is str else (0,))
    return value + ("x" if kind is str else 1)


@pytest.mark.parametrize("stage", ["value", "policy"])
def test_a_field_is_part_of_a_run_unless_it_says_that_it_is_not(stage):
    """Each field by itself: changing it changes the run's identity, or the field is marked."""
    cfg = replaced(get_config("demo"), "value.data", "both")
    cfg = replaced(cfg, "policy.suboptimal_share", 0.5)
    other = {Mark.FREE, Mark.POLICY_RUN if stage == "value" else Mark.VALUE_RUN}
    for leaf in FIELDS:
        if leaf.name == "more_data":  # which of its sets a stage takes: tests/test_mixture.py
            continue
        changed = another(leaf.kind, leaf.of(cfg))
        if leaf.name in ("policy.suboptimal_share", "value.data"):  # they choose the datasets too
            changed = 0.25 if leaf.kind is float else "optimal"
        different = run_dir.differing(replaced(cfg, leaf.name, changed), cfg, stage)
        if leaf.name == "model.value_paligemma_variant":
            assert bool(different) == (stage == "value"), leaf.name
        else:
            assert bool(different) == (not other & leaf.marks), leaf.name


@pytest.mark.parametrize("stage", ["value", "policy"])
def test_a_run_of_the_first_version_has_its_hash_still(stage):
    """config_hash as hvd 0.1.0 of November 2026 computed it; complete.json of old runs holds it."""
    cfg = get_config("pi0_r1_lora")
    assert run_dir.config_hash(cfg, stage) == HASHES[stage]


def test_rules_name_the_field():
    @dataclasses.dataclass(frozen=True)
    class Own:
        port: int = option(8000, between(0, 65_535), "where it listens")

    check_rules(Own())
    with pytest.raises(UserError, match=r"^--port 70000 is not between 0 and 65535$"):
        check_rules(Own(70_000), lambda name: "--" + name)
    with pytest.raises(UserError, match=r"^value.gamma nan is not a finite number$"):
        check_rules(replaced(get_config("demo"), "value.gamma", float("nan")))


def test_a_name_in_a_table_is_looked_up_when_it_is_checked():
    table = ["tote"]

    @dataclasses.dataclass(frozen=True)
    class Own:
        task: str = option("tote", one_of(lambda: table))

    with pytest.raises(UserError, match=r"^task 'pikc' is unknown; known: tote$"):
        check_rules(Own("pikc"))
    table.append("pick")
    with pytest.raises(UserError, match=r"^task 'pikc' is unknown; nearest: pick$"):
        check_rules(Own("pikc"))
    check_rules(Own("pick"))


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    share: float = 0.0
    on: bool = False
    parts: tuple[str, ...] = ()
    levels: tuple[tuple[int, ...], ...] = ()
    sets: dict[str, Inner] = dataclasses.field(default_factory=dict)


def test_a_tree_from_plain_data():
    data = {"name": "x", "share": 1, "on": True, "parts": ["a"], "levels": [[1], []], "sets": {"s": {"size": 3}}}
    expected = Outer("x", 1.0, True, ("a",), ((1,), ()), {"s": Inner(3)})
    assert from_plain(Outer, data, "file") == expected
    assert type(from_plain(Outer, data, "file").share) is float


@pytest.mark.parametrize(
    "data, line",
    [
        ({"nme": "x"}, "file: unknown field 'nme'; nearest: name"),
        ({}, "file: field 'name' is missing"),
        ({"name": 3}, "file: name: 3 is not a text"),
        ({"name": "x", "share": True}, "file: share: True is not a number"),
        ({"name": "x", "on": 1}, "file: on: 1 is not true or false"),
        ({"name": "x", "parts": "a"}, "file: parts: 'a' is not a list of texts"),
        ({"name": "x", "levels": [1]}, "file: levels[0]: 1 is not a list of whole numbers"),
        ({"name": "x", "sets": {"s": {"size": 1.5}}}, "file: sets: s: size: 1.5 is not a whole number"),
        ({"name": "x", "sets": {"s": {"size": 1, "kind": "c"}}}, "file: sets: s: kind: 'c' is not one of a, b"),
        ({"name": "x", "sets": {"s": 1}}, "file: sets: s: 1 is not a group of fields"),
    ],
)
def test_data_of_another_kind_is_one_line(data, line):
    with pytest.raises(UserError) as error:
        from_plain(Outer, data, "file")
    assert str(error.value).startswith(line)


def test_words_are_values():
    assert from_words(Literal["a", "b"], ["b"], "--x") == "b"
    assert from_words(float, ["1e-3"], "--x") == 1e-3
    assert from_words(dict[str, float], ["p", "1"], "--x") == {"p": 1.0}
    with pytest.raises(UserError, match=r"^--x: '7 8' is not a JSON list of lists of whole numbers$"):
        from_words(tuple[tuple[int, ...], ...], ["7", "8"], "--x")


def test_the_page_of_the_fields_is_up_to_date():
    assert config_docs.PATH.read_text() == config_docs.page(), "python -m tests.config_docs writes it"
