"""Command lines: `--dotted.field value` -> a changed dataclass. Each command's options are a dataclass; imports no jax.

    --model.network-type q, --model.network_type q, --model.network_type=q
    --wandb, --no-wandb, --wandb true, --policy.augment_images False
    --model.cameras base_0_rgb left_wrist_0_rgb, --model.cameras (no value: none), --model.cameras '[]'
    --model.hierarchical_actions '[[7,8,9],[17,18,19,20]]'     lists of lists as JSON
    --optimal_data.keys.images base_0_rgb observation.images.head     pairs, or a JSON object
    --optimal_data.keys.images.base_0_rgb observation.images.head     one entry of a mapping

Help pages are tyro's. Values are read by hvd.fields, as those of files are: tyro's parser prints its errors into a box,
does not take the forms above, and needs a tenth of a second for each command line.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd.configs import DataConfig, Experiment
from hvd.errors import UserError
from hvd.experiments import get_config
from hvd.fields import Leaf, check_rules, from_plain, from_words, leaves, option, replaced


@dataclass(frozen=True)
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


def joined(flags: Sequence[Flag]) -> list[str]:
    """The inverse of `split_flags`."""
    return [arg for flag in flags for arg in (flag.token, *flag.values)]


def take[T](options: T, argv: Sequence[str]) -> tuple[T, list[str]]:
    """A command's own options with what `argv` says, and the other arguments as they were.

    Raises:
        UserError: a value that does not fit or breaks its field's rule.
    """
    known = leaves(type(options))
    flags = split_flags(argv)
    ours = [flag for flag in flags if flag.field in known or flag.field.removeprefix("no_") in known]
    options = apply(options, ours)
    check_rules(options, lambda name: "--" + name.replace("_", "-"))
    return options, joined([flag for flag in flags if flag not in ours])


def parse[T](options: T, argv: Sequence[str], positional: str = "", short: Mapping[str, str] | None = None) -> T:
    """A command's options where there are no others.

    Args:
        positional: the field that a word takes which belongs to no option.
        short: "-n" -> "--lines".
    """
    words = [(short or {}).get(arg, arg) for arg in argv]
    if positional:
        known = leaves(type(options))
        for place, word in enumerate(words):
            before = words[place - 1][2:].replace("-", "_") if place else ""
            takes = before in known and known[before].kind is not bool and words[place - 1].startswith("--")
            if not word.startswith("--") and not takes:
                words = [f"--{positional}={word}", *words[:place], *words[place + 1 :]]
                break
    options = apply(options, split_flags(words))
    check_rules(options, lambda name: "--" + name.replace("_", "-"))
    return options


def apply[T](config: T, flags: Sequence[Flag]) -> T:
    """The config with the flags' values; of one field named twice the later. UserError: unknown field, bad value."""
    for flag in flags:
        config = replaced(config, *_resolve(flag, flag.field, config))
    return config


def _resolve(flag: Flag, name: str, config: Any) -> tuple[str, Any]:
    """(dotted name, value) of the field `name` of `config`, which the flag names."""
    known = leaves(type(config))
    if name == "name" and isinstance(config, Experiment):
        raise UserError(f"{flag.token}: the config's name is fixed; --exp_name names a run of it")
    if name in known:
        kind = known[name].kind
        return name, True if kind is bool and not flag.values else from_words(kind, flag.values, flag.token)
    head, dot, last = name.rpartition(".")
    positive = head + dot + last.removeprefix("no_")
    if last.startswith("no_") and positive in known and known[positive].kind is bool:
        if flag.values:
            raise UserError(f"{flag.token} takes no value, got {' '.join(flag.values)!r}")
        return positive, False
    for leaf in known.values():
        if name.startswith(f"{leaf.name}.") and typing.get_origin(leaf.kind) is dict:
            return leaf.name, _entry(flag, name.removeprefix(f"{leaf.name}."), leaf, leaf.of(config))
    inner = [field for field in known if field.startswith(name + ".")]
    prefix = flag.field.removesuffix(name)
    if inner:
        raise UserError(f"{flag.token} is a group of fields, for example --{prefix}{inner[0]}")
    raise UserError(f"unknown field {flag.token}{_nearest_field(name, known, prefix)}")


def _entry(flag: Flag, rest: str, leaf: Leaf, entries: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with one entry changed: `rest` is KEY, or KEY.FIELD where the values are dataclasses."""
    kind = typing.get_args(leaf.kind)[1]
    written = flag.token[2:][-len(rest) :]  # with the key's own hyphens
    if not dataclasses.is_dataclass(kind):
        return {**entries, written: from_words(kind, flag.values, flag.token)}
    key, field = written.partition(".")[0], rest.partition(".")[2]
    value = entries.get(key) or typing.cast(type, kind)()
    return {**entries, key: replaced(value, *_resolve(flag, field, value))}


def _nearest_field(name: str, known: Mapping[str, Any], prefix: str) -> str:
    """Nearest names: the same last part anywhere first, then similar whole names."""
    last = name.rpartition(".")[2]
    same = [field for field in known if field.rpartition(".")[2] == last]
    similar = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    lasts = difflib.get_close_matches(last, {field.rpartition(".")[2] for field in known}, n=2, cutoff=0.7)
    similar += [field for field in known if field.rpartition(".")[2] in lasts]
    found = list(dict.fromkeys(same + similar))[:3]
    if found:
        return "; nearest: " + ", ".join(f"--{prefix}{field}" for field in found)
    return "; `--help` lists all options"


# --------------------------------------------------------------------------------------------------- the experiment


@dataclass(frozen=True)
class Choice:
    """Which experiment a command is about; its fields are options too."""

    config: str = option("", "name of a config (`hvd configs` lists them)")
    config_file: str = option("", "instead of --config: a config.yaml, of a run or of the launcher")
    data: str = option("", "a LeRobot dataset, or the folder that holds the config's repo_ids")

    def as_flags(self) -> list[str]:
        names = {"--config": self.config, "--config-file": self.config_file, "--data": self.data}
        return [word for name, value in names.items() if value for word in (name, value)]


def experiment(argv: Sequence[str], default_config: str = "", *, here: bool = True) -> Experiment:
    """`--config NAME [--data PATH] [--dotted.field value]...` -> the experiment, its simulated folders filled in.

    Args:
        here: --data is a folder of this machine; else nobody looks into it.
    """
    choice, rest = take(Choice(), argv)
    return apply(chosen(choice, default_config, here=here), split_flags(rest)).resolved()


def chosen(choice: Choice, default: str = "", *, here: bool = True) -> Experiment:
    """The experiment that was chosen, before its fields are changed; `here` as in `experiment`."""
    if choice.config and choice.config_file:
        raise UserError("--config and --config-file contradict each other; give one")
    if choice.config_file:
        config = read(choice.config_file)
    elif choice.config or default:
        config = get_config(choice.config or default)
    else:
        raise UserError("--config NAME is missing; `hvd configs` lists the names")
    return with_data(config, choice.data, here=here) if choice.data else config


def read(path: str) -> Experiment:
    """The config of a config.yaml: the file of a run, or a tree of fields alone."""
    import yaml

    try:
        if "://" in path:
            from etils import epath

            text = epath.Path(path).read_text()
        else:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config-file {path}: {error}") from None
    tree = data.get("config", data) if isinstance(data, dict) else data
    return from_plain(Experiment, tree, path)


def with_data(config: Experiment, folder: str, *, here: bool = True) -> Experiment:
    """The experiment with its datasets at `folder`: the folder is one dataset, or holds <repo_id> of each.

    Args:
        here: the folder is on this machine; else it is taken for a dataset unseen.
    """
    if config.sim.task:
        raise UserError(f"--data: config {config.name} simulates its own data; --data is for configs such as g1")
    changed: dict[str, DataConfig] = {}
    for name, data in config.sets().items():
        if not data.repo_id:
            continue
        places = (Path(folder), Path(folder) / data.repo_id)
        found = [path for path in places if not here or (path / "meta" / "info.json").is_file()]
        if not found:
            raise UserError(
                f"--data {folder}: no LeRobot dataset there (no meta/info.json), nor in its sub-folder {data.repo_id}"
            )
        changed[name] = dataclasses.replace(data, root=str(found[0]))
    if not changed:
        raise UserError(f"--data: config {config.name} names no dataset; set --optimal_data.repo_id")
    more = {name: changed.pop(name, data) for name, data in config.more_data.items()}
    return dataclasses.replace(config, more_data=more, **{f"{name}_data": data for name, data in changed.items()})


@dataclass(frozen=True)
class RunDirectory:
    """What a step that trains does with the folder of its run."""

    resume: bool = option(False, "go on where the run stopped, which happens anyway")
    overwrite: bool = option(False, "delete this run directory and start again")


def take_overwrite(argv: Sequence[str]) -> tuple[list[str], bool]:
    """The arguments without --resume and --overwrite, and whether --overwrite was among them."""
    asked, rest = take(RunDirectory(), argv)
    if asked.overwrite and asked.resume:
        raise UserError("--resume and --overwrite contradict each other; give one")
    return rest, asked.overwrite


# --------------------------------------------------------------------------------------------------------- help pages


def asks_help(argv: Sequence[str]) -> bool:
    return "-h" in argv or "--help" in argv


def print_help(usage: str, about: str, *parts: Any) -> None:
    """Print a help page: `usage` without its options, `about`, the fields of `parts` with the values they have."""
    import tyro

    members = []
    for part in parts:
        hints = typing.get_type_hints(type(part))
        for field in dataclasses.fields(part):
            if not (field.name == "name" and isinstance(part, Experiment)):
                value = getattr(part, field.name)
                default = dataclasses.field(default_factory=lambda value=value: value, metadata=field.metadata)
                members.append((field.name, hints[field.name], default))
    page = dataclasses.make_dataclass("options", members)
    try:
        tyro.cli(page, prog=usage, description=about, args=["--help"])
    except SystemExit:
        return
