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
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from etils import epath

from hvd.configs import Experiment
from hvd.errors import UserError

Stage = Literal["value", "policy"]

CONFIG = "config.yaml"
NORM_STATS = "norm_stats.json"
CHECKPOINTS = "checkpoints"
COMPLETE = "complete.json"
OWNER = "owner.json"

# Fields of a stage that may change while it is the same run: how long, how often, what is written.
_LOOSE_STAGE = {
    "num_train_steps",
    "log_interval",
    "val_interval",
    "val_batches",
    "save_interval",
    "keep_period",
    "trace_samples",
    "run_name",
    "num_flow_steps",
    "grad_accum_steps",
    "remat",
}
# Where a dataset lies may change; what it holds is compared by digest.
_LOOSE_DATA = {"root", "labels_dir"}
# Fields of the model that only the other stage reads.
_OTHERS_MODEL = {
    "value": {"action_expert_variant", "attention"},
    "policy": {"value_expert_variant", "value_paligemma_variant", "action_patch", "attention"},
}


# ---------------------------------------------------------------------------------------------------- config <-> yaml


def to_dict(value: Any) -> Any:
    """A config tree as plain dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_dict(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_dict(v) for v in value]
    return value


def from_dict[T](kind: type[T], data: Mapping[str, Any], where: str) -> T:
    """The config tree of class `kind` from `to_dict`'s form; UserError naming `where` and a field that does not fit."""
    known = {f.name for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    unknown = sorted(set(data) - known)
    if unknown:
        raise UserError(f"{where}: unknown field {unknown[0]!r}: written by another version of hvd")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _typed(hints[name], value, f"{where}: {name}") for name, value in data.items()})


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if origin is tuple:
        inner = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        return tuple(_typed(inner or args[i], v, where) for i, v in enumerate(value))
    if origin is dict:
        return {k: _typed(args[1], v, where) for k, v in value.items()}
    if origin in (typing.Union, types.UnionType, Literal):
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and not isinstance(value, hint):
        raise UserError(f"{where}: {value!r} is not a {hint.__name__}")
    return value


# --------------------------------------------------------------------------------------------------- whose run is it


def identity(cfg: Experiment, stage: Stage) -> dict[str, Any]:
    """Dotted name -> value of every field that makes a run what it is; two runs that agree here compute the same."""
    stage_cfg = getattr(cfg, stage)
    model = {k: v for k, v in to_dict(cfg.model).items() if k not in _OTHERS_MODEL[stage]}
    if stage == "value":
        model["paligemma_variant"] = model.pop("value_paligemma_variant") or model["paligemma_variant"]
    parts: dict[str, Any] = {
        "robot": cfg.robot,
        "seed": cfg.seed,
        "model": model,
        "norm": to_dict(cfg.norm),
        "evaluate.val_fraction": cfg.evaluate.val_fraction,
        stage: {k: v for k, v in to_dict(stage_cfg).items() if k not in _LOOSE_STAGE},
    }
    for role in roles(cfg, stage):
        data = to_dict(getattr(cfg, f"{role}_data"))
        parts[f"{role}_data"] = {k: v for k, v in data.items() if k not in _LOOSE_DATA}
    return dict(_flat(parts))


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, tree


def roles(cfg: Experiment, stage: Stage) -> tuple[str, ...]:
    """Which of the datasets "optimal" and "suboptimal" the stage trains on."""
    if stage == "value":
        return {"optimal": ("optimal",), "mixed": ("suboptimal",), "both": ("optimal", "suboptimal")}[cfg.value.data]
    share = cfg.policy.suboptimal_share
    if not 0.0 <= share <= 1.0:
        raise UserError(f"policy.suboptimal_share {share} is not between 0 and 1")
    return tuple(role for role, part in (("optimal", 1.0 - share), ("suboptimal", share)) if part > 0)


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
    if not path.exists():
        return None
    try:
        data = yaml.safe_load(path.read_text())
        stage, version, config, inputs = data["stage"], data["version"], data["config"], data["inputs"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the config of a run: {error}") from error
    return Record(stage, version, from_dict(Experiment, config, str(path)), dict(inputs))


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
        "config": to_dict(cfg),
    }
    write_atomic(epath.Path(run_dir) / CONFIG, yaml.safe_dump(data, sort_keys=False).encode())


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
            what = _INPUTS.get(name, name)
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
    """Delete a run directory, config.yaml last: a half-deleted run is still known as one."""
    path = epath.Path(run_dir)
    _check_deletable(path)
    if not path.exists():
        return
    (path / COMPLETE).unlink(missing_ok=True)
    for entry in path.iterdir():
        if entry.name == CONFIG or OWNER in entry.name:  # who deletes it owns it
            continue
        if entry.is_dir():
            entry.rmtree()
        else:
            entry.unlink(missing_ok=True)
    (path / CONFIG).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------- files


def write_atomic(path: epath.PathLike, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one, never a part."""
    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if is_local(target):
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def is_local(path: epath.PathLike) -> bool:
    return "://" not in os.fspath(path)


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
