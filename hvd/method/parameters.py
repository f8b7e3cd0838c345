"""Numbers that entries of the method's tables declare for themselves, and how a config sets them. Imports no jax."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

from hvd.configs import Experiment
from hvd.errors import UserError, nearest
from hvd.fields import Rule

type Parameters = Mapping[str, float]


@dataclass(frozen=True)
class Parameter:
    """One number of an objective, a weighting or an extractor.

    Attributes:
        default: its value where the config does not set it.
        rule: what its value must be, beside finite.
        field: a config field that holds it ("model.alpha"); "" = it is set by name, in the table's dict of parameters.
    """

    default: float = math.nan
    rule: Rule | None = None
    field: str = ""


def choose[T](table: Mapping[str, T], name: str, field: str) -> T:
    """The entry called `name`; UserError that names `field` and the nearest names."""
    if name not in table:
        raise UserError(f"{field} {name!r} is not one of {', '.join(table)}{nearest(name, table)}")
    return table[name]


def resolve(
    declared: Mapping[str, Parameter], given: Parameters, cfg: Experiment, field: str, entry: str
) -> dict[str, float]:
    """The value of each declared parameter: its config field's, the one of `given` (the dict `field`), or the default.

    Raises:
        UserError: `given` has a name that is not declared, or a value that its rule refuses.
    """
    settable = [name for name, parameter in declared.items() if not parameter.field]
    for name in given:
        if name not in settable:
            known = nearest(name, settable) if settable else "; it has none that are set there"
            raise UserError(f"{field}.{name}: {entry} has no such parameter{known}")
    values = {}
    for name, parameter in declared.items():
        value = attrgetter(parameter.field)(cfg) if parameter.field else given.get(name, parameter.default)
        where = parameter.field or f"{field}.{name}"
        if not math.isfinite(value):
            raise UserError(f"{where} {value} is not a finite number")
        if parameter.rule and not parameter.rule.holds(value):
            raise UserError(f"{where} {value} {parameter.rule.text}")
        values[name] = float(value)
    return values
