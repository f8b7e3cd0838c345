"""The folder of one training run: how its config is written and read back, and whose folder it is.

    config.yaml        stage, code version, config hash, dataset digests and the whole resolved config; written first
    norm_stats.json    the statistics the run was trained under (inference reads these)
    events.jsonl       starts, stops and the end, one line each
    metrics.jsonl      one line a logged step; tb/ holds the same for TensorBoard
    checkpoints/STEP/  Orbax: params (for inference), train_state, loop
    complete.json      written last (hvd.train.complete)
    owner.json         which job works on it now (hvd.runtime.owner)

Imports no jax: launchers and `hvd verify` read run folders too. Folders may be remote (gs://...): etils.epath.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import yaml
from etils import epath

from hvd import documents, mixture
from hvd.configs import Experiment
from hvd.errors import UserError
from hvd.fields import Mark, from_plain, is_default, marks, to_plain
from hvd.files import write_atomic
from hvd.mixture import Stage
from hvd.runtime.heartbeat import OWNER

CONFIG = "config.yaml"
NORM_STATS = "norm_stats.json"
CHECKPOINTS = "checkpoints"
COMPLETE = "complete.json"


# --------------------------------------------------------------------------------------------------- whose run is it


def identity(cfg: Experiment, stage: Stage) -> dict[str, Any]:
    """Dotted name -> value of every field that makes a run what it is; two runs that agree here compute the same."""
    strange = Mark.POLICY_RUN if stage == "value" else Mark.VALUE_RUN

    def keep(field: dataclasses.Field, value: Any) -> bool:
        about = marks(field)
        return not ({Mark.FREE, strange} & about or (Mark.IF_SET in about and is_default(field, value)))

    parts = to_plain(cfg, keep)
    parts |= {"more_data": dict(parts.get("more_data", {}))}
    for name in cfg.sets().keys() - set(mixture.names(cfg, stage)):
        (parts["more_data"] if name in cfg.more_data else parts).pop(mixture.field(name).removeprefix("more_data."))
    if not parts["more_data"]:
        del parts["more_data"]
    if stage == "value" and cfg.model.value_paligemma_variant:
        parts["model"]["paligemma_variant"] = cfg.model.value_paligemma_variant
    return dict(_flat(parts))


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree


def config_hash(cfg: Experiment, stage: Stage) -> str:
    """sha256 of `identity`."""
    return hashlib.sha256(json.dumps(identity(cfg, stage), sort_keys=True).encode()).hexdigest()


def differing(cfg: Experiment, other: Experiment, stage: Stage) -> list[str]:
    """`field: theirs -> ours` for each identity field in which `other` (theirs) and `cfg` (ours) differ."""
    ours, theirs = identity(cfg, stage), identity(other, stage)
    missing = "(absent)"
    return [
        f"{name}: {theirs.get(name, missing)!r} -> {ours.get(name, missing)!r}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name, missing) != theirs.get(name, missing)
    ]


class _Form(msgspec.Struct):
    stage: Stage
    version: str
    config: dict[str, Any]
    inputs: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Record:
    """What config.yaml says about a run."""

    stage: Stage
    version: str
    config: Experiment
    inputs: dict[str, str]  # digests: dataset role -> digest, "value" -> digest of the value checkpoint


def read(run_dir: os.PathLike | str) -> Record | None:
    """The run's config.yaml, or None where there is none; UserError when the file is not one of ours."""
    path = epath.Path(run_dir) / CONFIG
    try:
        found = documents.read_yaml(path, _Form)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UserError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path} is not the config of a run: {why}") from None
    return Record(found.stage, found.version, from_plain(Experiment, found.config, str(path)), found.inputs)


def has_checkpoint(run_dir: os.PathLike | str) -> bool:
    """The run has something to go on from."""
    folder = epath.Path(run_dir) / CHECKPOINTS
    return folder.exists() and any(path.name.isdigit() for path in folder.iterdir())


def write_config(run_dir: os.PathLike | str, cfg: Experiment, stage: Stage, inputs: Mapping[str, str]) -> None:
    """config.yaml, atomically."""
    data = {
        "stage": stage,
        "version": code_version(),
        "config_hash": config_hash(cfg, stage),
        "inputs": dict(inputs),
        "config": to_plain(cfg),
    }
    write_atomic(epath.Path(run_dir) / CONFIG, yaml.safe_dump(data, sort_keys=False))


_INPUTS = {
    "optimal": "the optimal dataset",
    "suboptimal": "the suboptimal dataset",
    "norm_stats": "the norm stats",
    "value": "the value run",
}


def check_startable(
    run_dir: os.PathLike | str, cfg: Experiment, stage: Stage, inputs: Mapping[str, str], *, overwrite: bool
) -> None:
    """UserError unless the folder is new, holds this very run, or may be deleted by --overwrite. Changes nothing."""
    if overwrite:
        _check_deletable(epath.Path(run_dir))
        return
    record = read(run_dir)
    if record is None:
        return
    if record.stage != stage:
        raise UserError(f"{run_dir} holds a {record.stage} run, not a {stage} run: choose another --exp_name")
    different = differing(cfg, record.config, stage)
    if different:
        raise UserError(
            f"{run_dir} holds a run of another config ({'; '.join(different[:4])}): "
            "choose another --exp_name, or --overwrite to delete that run"
        )
    for name, digest in inputs.items():
        if record.inputs.get(name, digest) != digest:
            what = _INPUTS.get(name, f"the dataset of more_data.{name}")
            raise UserError(f"{run_dir}: {what} changed since this run started: --overwrite to start the run again")


def _check_deletable(path: epath.Path) -> None:
    """--overwrite deletes what is absent, empty, or a run directory, and nothing else."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"{path} is a file, not a run directory: --overwrite does not delete it")
    held = [entry.name for entry in path.iterdir() if OWNER not in entry.name]
    if held and read(path) is None:
        raise UserError(f"{path} is not a run directory (it has no {CONFIG}): --overwrite does not delete it")


def delete(run_dir: os.PathLike | str) -> None:
    """Delete a run directory, config.yaml last: a half-deleted run is still known as one.

    UserError for one with a folder that is a link: a larger disk, or somebody else's.
    """
    path = epath.Path(run_dir)
    _check_deletable(path)
    if not path.exists():
        return
    for entry in path.iterdir():
        if entry.is_dir() and os.path.islink(entry):
            raise UserError(
                f"{entry} is a link to a folder, which --overwrite does not empty: delete what is to go there"
            )
    (path / COMPLETE).unlink(missing_ok=True)
    for entry in path.iterdir():
        if entry.name == CONFIG or OWNER in entry.name:  # who deletes it owns it
            continue
        if entry.is_dir():
            entry.rmtree()
        else:
            entry.unlink(missing_ok=True)
    (path / CONFIG).unlink(missing_ok=True)


def stats_digest(stats: Mapping[str, Any]) -> str:
    """sha256 of the numbers of norm stats (hvd.data.normalize.Stats)."""
    content = {key: value.lists() for key, value in stats.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def running() -> str:
    """The code that this process runs, and its image where that was named by digest."""
    image = os.environ.get("HVD_IMAGE")
    return f"hvd {code_version()}" + (f", image {image}" if image else "")


@functools.cache
def code_version() -> str:
    """Package version, with the git commit where hvd runs from a checkout ("+dirty" when files differ from it)."""
    version = importlib.metadata.version("hvd")
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return version + (f"+{os.environ['HVD_REVISION']}" if os.environ.get("HVD_REVISION") else "")
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version  # no git here, or a checkout of another user: the version alone must do
    return f"{version}+{found}"
