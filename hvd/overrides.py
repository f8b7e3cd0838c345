"""`--dotted.field value` on a command line -> a changed experiment. The user's mistakes are one line. Imports no jax.

tyro parses the values; this module finds the field first, so that an unknown name can offer the nearest ones, and turns
whatever tyro would print in a box into one line. Beside tyro's own syntax it takes

    --model.network-type q, --model.network_type q, --model.network_type=q
    --wandb, --no-wandb, --wandb true, --policy.augment_images False
    --model.cameras base_0_rgb left_wrist_0_rgb, --model.cameras (no value: none), --model.cameras '[]'
    --model.hierarchical_actions '[[7,8,9],[17,18,19,20]]'     lists of lists as JSON
    --optimal_data.keys.images base_0_rgb observation.images.head     pairs, or a JSON object
"""

import contextlib
import dataclasses
import difflib
import functools
import io
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hvd.configs import Experiment
from hvd.errors import UserError, nearest
from hvd.experiments import get_config

_BOOLS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One option as the user wrote it (`token`), its dotted field and its values."""

    token: str
    field: str
    values: tuple[str, ...]


def split_flags(argv: Sequence[str]) -> list[Flag]:
    """Options with the values that follow them. A value that stands before every option is an error."""
    flags: list[Flag] = []
    for arg in argv:
        if arg.startswith("--") and len(arg) > 2:
            token, equals, value = arg.partition("=")
            flags.append(Flag(token, token[2:].replace("-", "_"), (value,) if equals else ()))
        elif not flags:
            raise UserError(f"{arg!r} stands alone; options are written --field value")
        else:
            flags[-1] = dataclasses.replace(flags[-1], values=(*flags[-1].values, arg))
    return flags


def take_config(argv: Sequence[str], default: str | None = None) -> tuple[str, list[str]]:
    """The value of --config, and the other arguments as they were."""
    flags = split_flags(argv)
    chosen = [flag for flag in flags if flag.field == "config"]
    if not chosen and default is None:
        raise UserError("--config NAME is missing; `hvd configs` lists the names")
    name = default
    for flag in chosen:
        name = one_value(flag, "the name of a config; `hvd configs` lists them")
    rest = [arg for flag in flags if flag.field != "config" for arg in (flag.token, *flag.values)]
    return str(name), rest


def one_value(flag: Flag, needs: str) -> str:
    """The flag's only value; a UserError that says what it `needs` otherwise."""
    match flag.values:
        case (value,):
            return value
        case ():
            raise UserError(f"{flag.token}: the value is missing; needs {needs}")
    raise UserError(f"{flag.token}: {' '.join(flag.values)!r} are {len(flag.values)} values; needs {needs}")


def experiment(argv: Sequence[str], default_config: str | None = None) -> Experiment:
    """`--config NAME [--data PATH] [--dotted.field value]...` -> the experiment, its simulated folders filled in."""
    name, rest = take_config(argv, default_config)
    config = get_config(name)
    flags = split_flags(rest)
    for flag in flags:
        if flag.field == "data":
            config = with_data(config, one_value(flag, "a folder with a LeRobot dataset"))
    return apply(config, [flag for flag in flags if flag.field != "data"]).resolved()


def with_data(config: Experiment, folder: str) -> Experiment:
    """The experiment with its datasets at `folder`: the folder is one dataset, or holds <repo_id> of each."""
    if config.sim.task:
        raise UserError(f"--data: config {config.name} simulates its own data; --data is for configs such as g1")
    changed = {}
    for name in ("optimal_data", "suboptimal_data"):
        data = getattr(config, name)
        if not data.repo_id:
            continue
        found = [
            path for path in (Path(folder), Path(folder) / data.repo_id) if (path / "meta" / "info.json").is_file()
        ]
        if not found:
            raise UserError(
                f"--data {folder}: no LeRobot dataset there (no meta/info.json), nor in its sub-folder {data.repo_id}"
            )
        changed[name] = dataclasses.replace(data, root=str(found[0]))
    if not changed:
        raise UserError(f"--data: config {config.name} names no dataset; set --optimal_data.repo_id")
    return dataclasses.replace(config, **changed)


@functools.cache
def leaves(kind: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> annotation of every field that is no dataclass itself."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        annotation = hints[field.name]
        if dataclasses.is_dataclass(annotation):
            found.update(leaves(typing.cast(type, annotation), f"{prefix}{field.name}."))
        else:
            found[prefix + field.name] = annotation
    return found


@dataclasses.dataclass(frozen=True)
class _Parsed:
    """A value that is parsed already (it may itself be a list)."""

    value: Any


def apply[T](config: T, flags: Sequence[Flag]) -> T:
    """The config with the flags' values; of one field named twice the later. UserError: unknown field, bad value."""
    known = leaves(type(config))
    chosen: dict[str, tuple[Flag, list[str] | _Parsed]] = {}
    for flag in flags:
        name, value = _resolve(flag, known)
        if name == "name":
            raise UserError(f"{flag.token}: the config's name is fixed; --exp_name names a run of it")
        chosen[name] = (flag, value)
    for_tyro = {name: value for name, (_, value) in chosen.items() if isinstance(value, list)}
    try:
        if for_tyro:
            config = _tyro(config, [arg for args in for_tyro.values() for arg in args])
    except SystemExit:
        for name, args in for_tyro.items():  # which one was it
            try:
                _tyro(config, args)
            except SystemExit:
                raise UserError(_bad_value(chosen[name][0], known[name])) from None
        raise
    for name, (_, value) in chosen.items():
        if isinstance(value, _Parsed):
            config = _replace(config, name.split("."), value.value)
    return config


def _resolve(flag: Flag, known: dict[str, Any]) -> tuple[str, "list[str] | _Parsed"]:
    """(dotted name, tyro's arguments for it or the value itself)."""
    name = flag.field
    if name not in known:
        head, dot, last = name.rpartition(".")
        positive = head + dot + last.removeprefix("no_")
        if last.startswith("no_") and known.get(positive) is bool:
            if flag.values:
                raise UserError(f"{flag.token} takes no value, got {' '.join(flag.values)!r}")
            return positive, [_bool_token(positive, False)]
        inner = [field for field in known if field.startswith(name + ".")]
        if inner:
            raise UserError(f"{flag.token} is a group of fields, for example --{inner[0]}")
        raise UserError(f"unknown field {flag.token}{_nearest_field(name, known)}")
    kind = known[name]
    if kind is bool:
        value = one_value(flag, _needs(kind)).lower() if flag.values else "true"
        if value not in _BOOLS:
            raise UserError(_bad_value(flag, kind))
        return name, [_bool_token(name, _BOOLS[value])]
    container = typing.get_origin(kind) in (tuple, dict)
    if container and len(flag.values) == 1 and flag.values[0].lstrip()[:1] in ("[", "{"):
        return name, _Parsed(_from_json(flag, kind))
    if typing.get_origin(kind) is dict:
        if len(flag.values) % 2:
            raise UserError(_bad_value(flag, kind))
        return name, _Parsed(dict(zip(flag.values[::2], flag.values[1::2], strict=True)))
    if not container:
        one_value(flag, _needs(kind))
    return name, ["--" + name.replace("_", "-"), *flag.values]


def _bool_token(name: str, value: bool) -> str:
    head, _, last = name.replace("_", "-").rpartition(".")
    return "--" + (head + "." if head else "") + ("" if value else "no-") + last


def _nearest_field(name: str, known: dict[str, Any]) -> str:
    """Nearest names: the same last part anywhere first, then similar whole names."""
    last = name.rpartition(".")[2]
    same = [field for field in known if field.rpartition(".")[2] == last]
    similar = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    lasts = difflib.get_close_matches(last, {field.rpartition(".")[2] for field in known}, n=2, cutoff=0.7)
    similar += [field for field in known if field.rpartition(".")[2] in lasts]
    found = list(dict.fromkeys(same + similar))[:3]
    if found:
        return "; nearest: " + ", ".join("--" + field for field in found)
    return "; `hvd train-policy --help` lists all fields"


def _needs(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is dict:
        return "pairs: key value key value"
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return "a JSON list of lists" if typing.get_origin(inner) is tuple else f"a list of {_needs(inner)}"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(kind, str(kind))


def _bad_value(flag: Flag, kind: Any) -> str:
    got = " ".join(flag.values)
    if typing.get_origin(kind) is Literal:
        return f"{flag.token}: {got!r} is not {_needs(kind)}{nearest(got, map(str, typing.get_args(kind)))}"
    return f"{flag.token}: {got!r} is not {_needs(kind)}"


def _tyro[T](config: T, args: list[str]) -> T:
    import tyro

    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return tyro.cli(type(config), default=config, args=args)


def _from_json(flag: Flag, kind: Any) -> Any:
    text = flag.values[0]
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{flag.token}: {text!r} is not JSON ({error.msg} at character {error.pos + 1})") from None
    try:
        return _convert(value, kind)
    except (TypeError, ValueError):
        raise UserError(_bad_value(flag, kind)) from None


def _convert(value: Any, kind: Any) -> Any:
    """A JSON value as `kind` wants it (lists as tuples). TypeError or ValueError where it does not fit."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(item, inner[0]) for item in value)
    if origin is dict and isinstance(value, dict):
        return {_convert(key, inner[0]): _convert(item, inner[1]) for key, item in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and not isinstance(kind, types.GenericAlias) and type(value) is kind:
        return value
    raise TypeError(f"{value!r} is not {kind}")


def _replace(config: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        return dataclasses.replace(config, **{path[0]: _replace(getattr(config, path[0]), path[1:], value)})
    return dataclasses.replace(config, **{path[0]: value})
