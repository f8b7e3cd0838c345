"""What a config's field declares beside its type and default, and values of its type from text, JSON, TOML and YAML.

    batch_size: int = option(16, AT_LEAST_1, "over all devices of all nodes")

says the rule that the number keeps, marks (what the field belongs to) and the help text, in any order. A field without
a mark is part of what makes a run what it is, and of what `hvd plan` measures.
"""

import contextlib
import dataclasses
import enum
import functools
import json
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from hvd.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value must be, as a test and in words; `names`: the names that a text is one of."""

    holds: Callable[[Any], bool]
    text: str
    names: Callable[[], Iterable[str]] = tuple


LARGEST = 2**31 - 1  # whole number of a field: arrays and libraries have 32 bits for it

AT_LEAST_1 = Rule(lambda x: x >= 1, "must be at least 1")
NOT_NEGATIVE = Rule(lambda x: x >= 0, "must not be negative")
POSITIVE = Rule(lambda x: x > 0, "must be positive")
SHARE = Rule(lambda x: 0 <= x <= 1, "must be from 0 to 1")
SIZE = Rule(lambda x: 0 < x <= 1, "must be more than 0 and at most 1")
DECAY = Rule(lambda x: 0 <= x < 1, "must be from 0 to less than 1")
INSIDE = Rule(lambda x: 0 < x < 1, "must be between 0 and 1")


def between(low: float, high: float) -> Rule:
    return Rule(lambda x: low <= x <= high, f"is not between {low} and {high}")


def one_of(names: Callable[[], Iterable[str]]) -> Rule:
    """A text that is a name in a table; the table is looked up when a config is checked."""
    return Rule(lambda x: x in names(), "is unknown", names)


class Mark(enum.Enum):
    """What a field, or all fields of a group, belong to."""

    FREE = "may change while it is the same run"
    VALUE_RUN = "part of a value run only"
    POLICY_RUN = "part of a policy run only"
    IF_SET = "part of a run once it is not the default (the field is younger than the runs that must go on)"
    NO_MEMORY = "changes nothing of what a training step keeps in memory"
    IN_TABLE = "part of the advantage table's key"


FREE, VALUE_RUN, POLICY_RUN, IF_SET, NO_MEMORY, IN_TABLE = Mark


def option[T](default: T, *about: Rule | Mark | str) -> T:
    """A field of a config: its default, rule, marks and help text. A dict is copied for each config."""
    if isinstance(default, dict):
        return _field(about, default_factory=default.copy, hash=False)
    return _field(about, default=default)


def group[T](kind: type[T], *about: Mark | str) -> T:
    """A field that is a group of fields itself."""
    return _field(about, default_factory=kind)


def _field(about: Sequence[Rule | Mark | str], **default: Any) -> Any:
    rules = [part for part in about if isinstance(part, Rule)]
    metadata = {
        "help": " ".join(part for part in about if isinstance(part, str)),
        "rule": rules[0] if rules else None,
        "marks": frozenset(part for part in about if isinstance(part, Mark)),
    }
    return dataclasses.field(**default, metadata=metadata)


def marks(field: dataclasses.Field) -> frozenset[Mark]:
    return field.metadata.get("marks", frozenset())


# ------------------------------------------------------------------------------------------------- the tree of fields


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One field that is no group: its dotted name, type, and what it declares with the groups it is in."""

    name: str
    kind: Any
    help: str
    rule: Rule | None
    marks: frozenset[Mark]

    def of(self, config: Any) -> Any:
        """Its value in `config`."""
        return functools.reduce(getattr, self.name.split("."), config)


@functools.cache
def leaves(kind: type) -> Mapping[str, Leaf]:
    """Dotted name -> leaf, of all fields of a dataclass, in their order."""
    return {leaf.name: leaf for leaf in _leaves(kind, "", frozenset())}


def _leaves(kind: Any, prefix: str, above: frozenset[Mark]) -> Iterator[Leaf]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name, hint, own = prefix + field.name, hints[field.name], above | marks(field)
        if dataclasses.is_dataclass(hint):
            yield from _leaves(hint, f"{name}.", own)
        else:
            yield Leaf(name, hint, field.metadata.get("help", ""), field.metadata.get("rule"), own)


def replaced(config: Any, name: str, value: Any) -> Any:
    """`config` with the value in the field of that dotted name."""
    first, _, rest = name.partition(".")
    return dataclasses.replace(config, **{first: replaced(getattr(config, first), rest, value) if rest else value})


def check_rules(config: Any, spelled: Callable[[str], str] = str) -> None:
    """Raise UserError for a value that breaks its field's rule, or a number that is not finite."""
    for leaf in leaves(type(config)).values():
        value, rule = leaf.of(config), leaf.rule
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{spelled(leaf.name)} {value} is not a finite number")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UserError(f"{spelled(leaf.name)} {value} is out of range: {LARGEST} at most")
        if rule is not None and not rule.holds(value):
            known = nearest(str(value), rule.names()) if rule.names is not tuple else ""
            raise UserError(f"{spelled(leaf.name)} {value!r} {rule.text}{known}")


def to_plain(value: Any, keep: Callable[[dataclasses.Field, Any], bool] = lambda field, value: True) -> Any:
    """A config tree as plain dicts, lists and scalars, without the fields that `keep` refuses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: to_plain(content, keep) for field, content in pairs if keep(field, content)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(content, keep) for key, content in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item, keep) for item in value]
    return value


def is_default(field: dataclasses.Field, value: Any) -> bool:
    factory = field.default_factory
    return value == (field.default if factory is dataclasses.MISSING else factory())


# ------------------------------------------------------------------------------------------------ values of a type

_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_NAMES = {int: "whole number", float: "number", str: "text", dict: "object", list: "list"}


def needs(kind: Any) -> str:
    """The type in words, for an error line: "a whole number"."""
    if kind is bool:
        return "true or false"
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return ("an " if kind is dict else "a ") + _name(kind)


def _name(kind: Any, plural: str = "") -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return f"list{plural} of {_name(inner[0], 's')}"
    if origin is dict:
        return f"mapping{plural} of texts to {_name(inner[1], 's')}"
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind))) + plural


_BRIEF = reprlib.Repr(maxlevel=3, maxstring=300, maxother=300)  # YAML can name a list of many gigabytes


def _wrong(kind: Any, value: Any, where: str) -> UserError:
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    shown = _BRIEF.repr(value)
    hint = nearest(str(value) if isinstance(value, str) else shown, map(str, choices))
    # where none is near, it lists what `needs` has listed
    return UserError(f"{where}: {shown} is not {needs(kind)}{hint if 'nearest' in hint else ''}")


def from_plain(kind: Any, data: Any, where: str) -> Any:
    """`data`, as JSON, TOML or YAML have it, as a value of `kind` (lists as tuples, mappings as dataclasses).

    Args:
        where: begins the error line: the file and field.

    Raises:
        UserError: `data` does not fit; the line names the field.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, where)
    if origin is tuple and isinstance(data, list | tuple):
        return tuple(from_plain(inner[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict and isinstance(data, Mapping):
        return {str(key): from_plain(inner[1], item, f"{where}: {key}") for key, item in data.items()}
    if origin in (typing.Union, types.UnionType):  # optional: it is left out, not null
        return from_plain(inner[0], data, where)
    if origin is Literal and data in inner:
        return data
    if kind is float and (isinstance(data, float) or (type(data) is int and abs(data) < 2**1023)):
        return float(data)
    if origin is None and type(data) is kind:
        return _home(str(data)) if kind is str else data
    raise _wrong(kind, data, where)


def _home(text: str) -> str:
    """A path below a home folder, "~/data" or "~user/data", in full: shells leave it as it is in `--root=~/data`."""
    with contextlib.suppress(RuntimeError, KeyError):
        return os.path.expanduser(text) if re.match(r"~[\w.-]*(/|$)", text) else text
    return text


def _dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: {_BRIEF.repr(data)} is not a group of fields")
    hints = typing.get_type_hints(kind)
    for name in data:
        if name not in hints:
            raise UserError(f"{where}: unknown field {name!r}{nearest(str(name), hints)}")
    for field in dataclasses.fields(kind):
        if field.name not in data and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}: field {field.name!r} is missing")
    return kind(**{name: from_plain(hints[name], value, f"{where}: {name}") for name, value in data.items()})


def from_words(kind: Any, words: Sequence[str], where: str) -> Any:
    """The words behind an option of a command line as a value of `kind`. UserError, as `from_plain`.

    A list is words or one JSON list, a mapping is pairs of words or one JSON object.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (tuple, dict):
        if len(words) == 1 and words[0].lstrip()[:1] in ("[", "{"):
            return from_plain(kind, _json(words[0], where), where)
        if words and any(typing.get_origin(part) for part in inner):  # a list of lists
            raise UserError(f"{where}: {' '.join(words)!r} is not a JSON {_name(kind)}")
        if origin is tuple:
            return tuple(from_words(inner[0], [word], where) for word in words)
        if len(words) % 2:
            raise UserError(f"{where}: {' '.join(words)!r} is not pairs: key value key value")
        return {key: from_words(inner[1], [word], where) for key, word in zip(words[::2], words[1::2], strict=True)}
    word = one(words, where, needs(kind))
    if kind is bool and word.lower() in _WORDS:
        return _WORDS[word.lower()]
    if kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            raise _wrong(kind, word, where) from None
    return from_plain(kind, word, where)


def one(words: Sequence[str], where: str, needed: str) -> str:
    """The only word; a UserError that says what is `needed` otherwise."""
    match list(words):
        case [word]:
            return word
        case []:
            raise UserError(f"{where}: the value is missing; needs {needed}")
    raise UserError(f"{where}: {' '.join(words)!r} are {len(words)} values; needs {needed}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: {text!r} is not JSON ({error.msg} at character {error.pos + 1})") from None
