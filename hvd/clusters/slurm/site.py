"""What jobs ask a Slurm site for: slurm/site.toml, then the team's file, the user's own, and the flags."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvd import overrides
from hvd.accelerators import get as get_accelerator
from hvd.clusters import base
from hvd.errors import UserError
from hvd.fields import AT_LEAST_1, NOT_NEGATIVE, check_rules, from_plain, option, to_plain
from hvd.site import files

SITE_FILE = Path("slurm") / "site.toml"  # of the working directory, which is the checkout
JOBS_DIR = Path("slurm") / "jobs"

# A #SBATCH line is no shell text: & | ( ) [ ] of constraints are themselves. An option may quote what has spaces.
_DIRECTIVE = re.compile(r"[^\s'\"`$;<>\\#]*")
_OPTION = re.compile(r"-[^\s'\"`$;<>\\#]*(\"[^\"`$\\\n]*\"|'[^'`$\\\n]*')?")
_SHELL_WORD = re.compile(r"[^\s'\"`$;&|<>()\\]*")


@dataclass(frozen=True)
class Site:
    """The fields of site.toml; slurm/site.toml says what each means and has the same defaults (a test compares)."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    exclude: str = ""
    clusters: str = ""
    time: str = "1-00:00:00"
    exclusive: bool = False
    requeue: bool = True
    gpus_per_node: int = option(8, NOT_NEGATIVE)
    gpus_as: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    gres_type: str = ""
    gpu: str = ""
    tasks_per_node: int = option(1, AT_LEAST_1)
    cpus_per_gpu: int = option(12, AT_LEAST_1)
    mem_per_gpu: str = "100G"
    mem_per_cpu: str = ""
    cpus: int = option(2, AT_LEAST_1)
    mem: str = "6G"
    grace: int = option(300, NOT_NEGATIVE)
    node_failures: int = option(3, NOT_NEGATIVE)
    container: Literal["pyxis", "apptainer", "none"] = "none"
    image: str = ""
    mounts: tuple[str, ...] = ()
    command: str = ""
    setup: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    test: bool = True


@dataclass(frozen=True)
class _Flags:
    """What the settings are called on the command line: --slurm.NAME."""

    slurm: Site


def load(flags: Sequence[overrides.Flag] = ()) -> Site:
    """The site's settings. `flags`: the user's, those of fields `slurm.NAME`.

    Raises:
        UserError: a file that cannot be read, an unknown name, a value of a wrong kind or one that makes no sense.
    """
    site = Site()
    own = [(SITE_FILE, files.read(SITE_FILE))] if SITE_FILE.is_file() else []
    for path, data in [*own, *files.all_files()]:
        settings = {name: value for name, value in data.items() if name not in base.names()}
        site = from_plain(Site, {**to_plain(site), **settings}, str(path))
    site = overrides.apply(_Flags(site), flags).slurm
    check(site)
    return site


def check(site: Site) -> None:
    """Raise UserError for a setting that no cluster could mean."""
    check_rules(site, "slurm.{}".format)
    for name in ("mem", "mem_per_gpu", "mem_per_cpu"):
        if not re.fullmatch(r"(\d+[KMGT]?)?", getattr(site, name)):
            raise UserError(f"slurm.{name} {getattr(site, name)!r} is not a size such as 64G")
    if site.gpus_per_node and site.gpus_per_node % site.tasks_per_node:
        raise UserError(
            f"slurm.tasks_per_node {site.tasks_per_node} does not divide slurm.gpus_per_node {site.gpus_per_node}"
        )
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED", site.time):
        raise UserError(f"slurm.time {site.time!r} is not a time such as 4:00:00 or 2-12:00:00")
    limit = seconds(site.time)
    if limit is not None and site.grace >= limit:
        raise UserError(f"slurm.grace {site.grace} s is not less than slurm.time {site.time}")
    if site.container != "none" and not site.image:
        raise UserError(f"slurm.container {site.container} needs slurm.image")
    if site.gpu:
        get_accelerator(site.gpu)
    for name in (f.name for f in dataclasses.fields(site) if f.type is str and f.name not in ("command", "image")):
        _check_words(name, [getattr(site, name)], _DIRECTIVE)
    _check_words("extra", site.extra, _OPTION)
    _check_words("image", [site.image], _SHELL_WORD)
    _check_words("mounts", site.mounts, _SHELL_WORD)
    for text in (site.command, *site.setup):
        if "\n" in text:
            raise UserError(f"slurm settings: {text!r} is more than one line")


def _check_words(name: str, words: Sequence[str], takes: re.Pattern[str]) -> None:
    for text in words:
        if not takes.fullmatch(text):
            rule = "is no option (--name=value), or " if takes is _OPTION else ""
            raise UserError(f"slurm.{name}: {text!r} {rule}holds a character that a batch script does not take")


def seconds(time: str) -> int | None:
    """Of Slurm's time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]; None = none."""
    if time == "UNLIMITED":
        return None
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, secs = parts
    else:
        hours, minutes, secs = 0, *[*parts, 0][:2]
    return int(days or 0) * 86_400 + hours * 3_600 + minutes * 60 + secs
