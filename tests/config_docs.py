"""docs/configs.md from the dataclasses of hvd/configs.py: `python -m tests.config_docs` writes it."""

import dataclasses
import inspect
import typing
from typing import Any

from hvd.configs import Experiment
from hvd.experiments import CONFIGS
from hvd.fields import FREE, IF_SET, POLICY_RUN, VALUE_RUN, Mark, marks
from tests.folders import ROOT

PATH = ROOT / "docs" / "configs.md"
HEAD = """# Configs and their fields

This page is made from `hvd/configs.py`, `hvd/experiments.py` and `hvd/experiments_r1.py`
(`python -m tests.config_docs`).

`hvd configs` lists the configs. Every field can be changed on the command line of every step by its dotted name
(`--value.batch_size 64`, `--model.cameras base_0_rgb left_wrist_0_rgb`, `--no-wandb`), and
`hvd train-value --help --config NAME` shows its value in a config. `--config-file PATH` takes a config.yaml in place of
`--config NAME`: that of a run, or a YAML file with `name` and the fields that differ from the defaults below.

"free" in the column "same run" means that the field may change while it is the same run: a run that is started again
with another value goes on. All other fields are what makes a run what it is: with another value the step refuses to go
on in that folder. "value" and "policy" are fields that only that stage's runs are compared by, "if set" those that
count once they differ from the default.

"""


def page() -> str:
    lines = ["## Configs", "", "| config | what it is |", "|---|---|"]
    lines += [f"| `{name}` | {(build.__doc__ or '').strip().splitlines()[0]} |" for name, build in CONFIGS.items()]
    return HEAD + "\n".join([*lines, "", *_group(Experiment, "", frozenset())]).rstrip() + "\n"


def _group(kind: Any, prefix: str, above: frozenset[Mark]) -> list[str]:
    hints = typing.get_type_hints(kind)
    title = f"`{prefix[:-1]}`" if prefix else "Top level"
    lines = [f"## {title}", "", inspect.cleandoc(kind.__doc__).split("(self")[0].replace("\n", " "), ""]
    if lines[2].startswith(kind.__name__ + "("):  # dataclass makes a docstring of its signature
        lines = lines[:2]
    lines += ["| field | type | default | rule | same run | what it is |", "|---|---|---|---|---|---|"]
    groups: list[str] = []
    for field in dataclasses.fields(kind):
        hint, name, own = hints[field.name], prefix + field.name, above | marks(field)
        if dataclasses.is_dataclass(hint):
            groups += ["", *_group(hint, f"{name}.", own)]
            continue
        rule = field.metadata.get("rule")
        must = rule.text.removeprefix("must be ").replace("must not be", "not") if rule else ""
        text = field.metadata.get("help", "")
        cells = (f"`{field.name}`", _type(hint), _default(field), must, _same(own), text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines + groups


def _type(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" if choice else '`""`' for choice in typing.get_args(hint))
    return f"`{hint.__name__}`" if typing.get_origin(hint) is None else f"`{hint}`"


def _default(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif field.default is dataclasses.MISSING:
        return "the config's"
    else:
        value = field.default
    return f"`{value!r}`" if not isinstance(value, str) else f"`{value}`" if value else '`""`'


def _same(own: frozenset[Mark]) -> str:
    return {FREE: "free", VALUE_RUN: "value", POLICY_RUN: "policy", IF_SET: "if set"}.get(
        next((mark for mark in (FREE, VALUE_RUN, POLICY_RUN, IF_SET) if mark in own), None), ""
    )


if __name__ == "__main__":
    PATH.write_text(page())
