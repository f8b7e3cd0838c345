"""The commands that are killed: how each runs in a world, and whether what it left there is whole.

A world is a folder with the tests' tiny experiment: two datasets, recordings, and what the commands make of them.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import tests.compilation  # noqa: F401 - where compiled programs lie, before jax is imported

os.environ |= {"JAX_PLATFORMS": "cpu", "TQDM_DISABLE": "1"}  # before these are imported, too
STEPS = 12
CONFIG = ("--config", "tiny", "--evaluate.execute-steps", "4")
# What is only there while a command runs
TEMPORARY = re.compile(r"\.tmp$|\.partial$|orbax-checkpoint-tmp|\.lock$|^owner\.json")
PRELOAD = ["tests.kills.commands", "tests.train.factory", "tests.train.compare", "tests.data.joylo", "hvd.cli"]
PRELOAD += ["hvd.method.value", "hvd.method.policy", "hvd.method.advantages", "hvd.data.convert", "hvd.export.params"]
PRELOAD += ["hvd.report.command", "hvd.storage.cache", "tensorboardX", "google.cloud.storage.transfer_manager"]


@dataclasses.dataclass(frozen=True)
class Command:
    """`hvd ARGV`, and what it makes, below the world.

    `differs(ours, theirs, ended)` says how what is made differs from what an undisturbed command made, "" for not at
    all. Before the command has `ended` something may be missing, but nothing may be there that is not whole.
    """

    name: str
    argv: tuple[str, ...]
    made: str
    differs: Callable[[Path, Path, bool], str]


def make_world(world: Path) -> None:
    from tests.data import joylo
    from tests.train import factory

    world.mkdir()
    factory.make_data(world)
    shutil.rmtree(world / "assets")
    joylo.write_folder(world / "raw", (9, 7, 8, 6))


def run(argv: tuple[str, ...], world: Path, log: Path) -> None:
    """One command in this process, which becomes a session of its own."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background job ignores it
    os.chdir(world)
    os.environ["HVD_CACHE"] = str(world / "cache")
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from hvd import cli, experiments
    from hvd.train import stage_data, value_pass
    from tests.train import factory

    value_pass.SHARD_ROWS = 16
    factory.slow(stage_data, 0.2)
    sys.modules["tests.kills.fetching"] = Fetching  # pyright: ignore[reportArgumentType]
    cli.STEPS = {**cli.STEPS, "fetch": cli.Step("tests.kills.fetching", "", own_flags=True)}
    stage = {"num_train_steps": STEPS, "save_interval": 3, "val_interval": 6, "log_interval": 4}
    experiments.CONFIGS["tiny"] = lambda: factory.experiment(Path(), value=stage, policy=stage)
    sys.argv = ["hvd", *argv]
    cli.command()


class Fetching:
    """The step `fetch URL`: a download as train-policy makes it, which has no command of its own."""

    @staticmethod
    def main(argv: list[str]) -> int:
        from hvd.storage import cache, download, remote

        remote.PART, download.FILES = 1 << 16, 2
        cache.fetch(argv[0], "policy.weight_loader")
        return 0


def litter(world: Path) -> list[str]:
    """Temporary files that are there after the end."""
    return sorted(str(p.relative_to(world)) for p in world.rglob("*") if TEMPORARY.search(p.name))


# --------------------------------------------------------------------------------------------------- is it the same?


def _lasting(folder: Path) -> dict[str, Path]:
    """Files whose name says that they are whole, by their path."""
    found = {p.relative_to(folder): p for p in folder.rglob("*") if p.is_file()}
    return {str(name): p for name, p in found.items() if not any(TEMPORARY.search(part) for part in name.parts)}


def _files(ours: Path, theirs: Path, ended: bool) -> str:
    """Byte by byte, but for the name of the world, which a dataset holds."""
    a, b = (
        {name: re.sub(rb"/world-\d{4}/", b"/", path.read_bytes()) for name, path in _lasting(folder).items()}
        for folder in (ours, theirs)
    )
    different = sorted(name for name in (a.keys() | b.keys() if ended else a.keys()) if a.get(name) != b.get(name))
    return f"{different[:3]} differ" if different or (ended and not a) else ""


def _run(ours: Path, theirs: Path, ended: bool) -> str:
    from tests.train.compare import assert_same_run

    if not ended and not (ours / "complete.json").exists():
        return _documents(ours)
    try:
        assert_same_run(ours, theirs, STEPS)
    except (AssertionError, OSError, ValueError) as error:
        return f"another run: {type(error).__name__} {error}"[:300]
    return "" if (ours / "complete.json").exists() else "not complete"


def _documents(folder: Path) -> str:
    """What of the files that name themselves whole cannot be read."""
    for name, path in _lasting(folder).items():
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".yaml" and not path.read_text().endswith("\n"):
                raise ValueError("no last line")
            elif path.suffix == ".npz":
                zipfile.ZipFile(path).testzip()
        except (ValueError, zipfile.BadZipFile) as error:
            return f"{name} is half a file: {error}"
    return ""


def _table(ours: Path, theirs: Path, ended: bool) -> str:
    name = "advantages.parquet"
    if not ended and not (ours / name).exists():
        return _documents(ours)
    same = (ours / name).exists() and (ours / name).read_bytes() == (theirs / name).read_bytes()
    return _documents(ours) if same else f"{name} differs"


def _arrays(ours: Path, theirs: Path, ended: bool) -> str:
    import numpy as np
    import orbax.checkpoint as ocp

    from tests.train.compare import _as_numpy, _flat

    def read(folder: Path) -> dict[str, bytes]:
        handler, path = ocp.PyTreeCheckpointHandler(), folder.absolute() / "params"
        wanted = _as_numpy(ocp.checkpoint_utils.construct_restore_args(handler.metadata(path).tree))
        tree = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=wanted))
        return {name: np.asarray(value).tobytes() for name, value in _flat(tree).items()}

    if not ended and not ours.exists():
        return ""
    names = [{name for name in _lasting(folder) if not name.startswith("params/")} for folder in (ours, theirs)]
    return "" if names[0] == names[1] and read(ours) == read(theirs) else "another export"


def _page(ours: Path, theirs: Path, ended: bool) -> str:
    """The report without its date, the world's name and the commit."""
    if not ended and not ours.exists():
        return ""
    a, b = (
        re.sub(r"hvd \d[\w.+-]*|\d{4}-\d\d-\d\d \d\d:\d\d|/world-\d{4}/", "", page.read_text())
        for page in (ours, theirs)
    )
    return "" if a == b and a.endswith("</html>\n") else "another page"


COMMANDS = {
    each.name: each
    for each in (
        Command("norm-stats", ("norm-stats", *CONFIG), "assets", _files),
        Command("convert", ("convert", "--raw-dirs", "raw", "--repo-id", "a/b", "--root", "set"), "set", _files),
        Command("fetch", ("fetch", "gs://models/params"), "cache/gs", _files),
        Command("train-value", ("train-value", *CONFIG), "runs/tiny/value", _run),
        Command("advantages", ("advantages", *CONFIG), "runs/tiny/advantages", _table),
        Command("train-policy", ("train-policy", *CONFIG), "runs/tiny/policy", _run),
        Command("export", ("export", *CONFIG, "--to", "export"), "export", _arrays),
        Command("report", ("report", *CONFIG), "runs/tiny/report.html", _page),
    )
}
