"""complete.json: the proof that a training run is complete, and the one function that every launcher asks.

It is written last and atomically, and lists every file of the final checkpoint, config.yaml and norm_stats.json with
their lengths and sha256, so that a run that was cut short, or in which a file or a byte is another one since, is never
taken for a whole one.
Imports no jax: login nodes, gates and `hvd verify` call it.
"""

import dataclasses
import datetime
import json
import os
from collections.abc import Iterable, Mapping

import msgspec
from etils import epath

from hvd import documents
from hvd.configs import Experiment
from hvd.errors import UserError
from hvd.files import write_atomic
from hvd.train import manifest
from hvd.train import run_dir as runs

_FORMAT = 1
_SETTINGS = (runs.CONFIG, runs.NORM_STATS)  # what says how the parameters are to be used


@dataclasses.dataclass(frozen=True)
class Complete:
    """What complete.json says.

    Attributes:
        step: number of training steps done.
        digest: sha256 over the manifest: names the parameters that later stages depend on.
        files: path relative to the run folder -> (bytes, sha256).
        inputs: digests of what the run was trained on (datasets, the value run).
        settings: config.yaml and norm_stats.json, as `files`; {} in a run of an older version.
    """

    stage: runs.Stage
    step: int
    config_hash: str
    version: str
    finite: bool
    digest: str
    files: dict[str, tuple[int, str]]
    inputs: dict[str, str]
    settings: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


class _Form(msgspec.Struct):
    stage: runs.Stage
    step: documents.Count
    config_hash: str
    version: str
    digest: str
    files: dict[str, manifest.File]
    inputs: dict[str, str]
    finite: bool | None = None
    settings: dict[str, manifest.File] = {}


def write_complete(
    run_dir: os.PathLike | str,
    *,
    stage: runs.Stage,
    step: int,
    config_hash: str,
    inputs: Mapping[str, str],
    finite: bool,
) -> Complete:
    """complete.json for the checkpoint of `step`; by one process, once the checkpoint is on disk.

    The digests are those that were made when it was saved: what has changed since is found by `check_complete`.
    """
    root = epath.Path(run_dir)
    folder = root / runs.CHECKPOINTS / str(step)
    saved = dict(manifest.read(folder) or {})
    saved |= manifest.hashed(folder, manifest.names(folder) - saved.keys())
    files = {f"{runs.CHECKPOINTS}/{step}/{name}": saved[name] for name in sorted(saved)}
    settings = manifest.hashed(root, _SETTINGS)
    found = Complete(
        stage, step, config_hash, runs.code_version(), finite, manifest.digest(files), files, dict(inputs), settings
    )
    record = {
        "format": _FORMAT,
        "stage": stage,
        "step": step,
        "finite": finite,
        "config_hash": config_hash,
        "version": found.version,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": dict(inputs),
        "digest": found.digest,
        "settings": manifest.to_plain(settings),
        "files": manifest.to_plain(files),
    }
    write_atomic(root / runs.COMPLETE, json.dumps(record, indent=1))
    return found


def read_complete(run_dir: os.PathLike | str) -> Complete:
    """complete.json as it stands, nothing checked against the disk; UserError when it is missing or not readable."""
    path = epath.Path(run_dir) / runs.COMPLETE
    try:
        data = documents.decode(documents.read_bytes(path), _Form, f"{path} is damaged")
    except FileNotFoundError:
        raise UserError(f"{run_dir} is not complete: {_why_incomplete(epath.Path(run_dir))}") from None
    fields = {f.name: getattr(data, f.name) for f in dataclasses.fields(Complete)}
    files, settings = (manifest.from_plain(part, f"{path} is damaged") for part in (data.files, data.settings))
    found = Complete(**fields | {"finite": data.finite is True, "files": files, "settings": settings})
    if not files or manifest.digest(files) != found.digest:
        raise UserError(f"{path} is damaged: its list of files does not have the digest that it states")
    if settings and settings.keys() != set(_SETTINGS):
        raise UserError(f"{path} is damaged: its settings are not {' and '.join(_SETTINGS)}")
    return found


def check_complete(
    run_dir: os.PathLike | str,
    *,
    stage: runs.Stage | None = None,
    cfg: Experiment | None = None,
    step: int | None = None,
    digests: bool = True,
) -> Complete:
    """Rule 1 of the house: raise a UserError that says what is wrong unless the run is complete and undamaged.

    Args:
        stage: the stage that it must be of.
        cfg: with `stage`: the config it must have been trained with; its number of steps is then expected.
        step: the expected number of steps, when there is no `cfg`.
        digests: also read every file of the checkpoint and compare its sha256 (otherwise presence and length only;
            config.yaml and norm_stats.json are always read); once a process, as long as complete.json and the files'
            lengths and times stay what they were.
    """
    root = epath.Path(run_dir)
    if not root.exists():
        raise UserError(f"no run at {root}: train it first" + (f" (hvd train-{stage})" if stage else ""))
    found = read_complete(root)
    if stage is not None and found.stage != stage:
        raise UserError(f"{root} holds a {found.stage} run, not a {stage} run")
    if not found.finite:
        raise UserError(f"{root / runs.COMPLETE}: the parameters are not finite: train the run again")
    if cfg is not None and stage is not None:
        step = getattr(cfg, stage).num_train_steps
        _check_config(root, found, cfg, stage)
    if step is not None and found.step != step:
        raise UserError(f"{root} is complete at step {found.step}, but the config asks for {step} steps")
    if not any(name.startswith(f"{runs.CHECKPOINTS}/{found.step}/params/") for name in found.files):
        raise UserError(f"{root / runs.COMPLETE} is damaged: it lists no parameters of step {found.step}")
    _check_settings(root, found)
    seen = found.digest, _present(root, found.files)
    if digests and _verified.get(os.fspath(root)) != seen:
        manifest.check_digests(root, found.files, runs.COMPLETE)
        _verified[os.fspath(root)] = seen
    return found


_verified: dict[str, tuple] = {}  # run -> what check_complete saw when it had read every byte


def _present(root: epath.Path, files: manifest.Files) -> tuple[tuple[int, float], ...]:
    try:
        return manifest.check_present(root, files)
    except UserError as error:
        raise UserError(f"{error}; the run is not whole, train it again") from None


def _check_settings(root: epath.Path, found: Complete) -> None:
    """UserError unless config.yaml and norm_stats.json are those that the run was trained with."""
    for name in _SETTINGS:
        if not (root / name).exists():
            raise UserError(f"{root / name} is missing: the run is not whole; delete {root} and train it again")
    if found.settings:
        _present(root, found.settings)
        manifest.check_digests(root, found.settings, runs.COMPLETE)
        return
    from hvd.data import normalize

    record = runs.read(root)
    if record is None or runs.config_hash(record.config, found.stage) != found.config_hash:
        raise UserError(f"{root / runs.CONFIG} is not the config that the run was trained with ({runs.COMPLETE})")
    stats = runs.stats_digest(normalize.load(root / runs.NORM_STATS))
    if found.inputs.get("norm_stats", stats) != stats:
        raise UserError(f"{root / runs.NORM_STATS} is not what the run was trained with ({runs.COMPLETE})")


def main(cfg: Experiment) -> None:
    """`hvd verify`: one line for each run of the experiment; UserError (exit code 2) if one of them is not complete."""
    found = list(_runs(cfg))
    if not found:
        raise UserError(f"no run in {cfg.exp_dir}")
    problems = []
    for path, stage, expected in found:
        try:
            run = check_complete(path, stage=stage, cfg=expected)
        except UserError as error:
            problems.append(str(error))
            print(f"BAD       {path}: {error}", flush=True)
        else:
            size = f"{len(run.files)} files, {run.bytes / 1e6:.1f} MB"
            print(f"complete  {path}: {run.stage}, step {run.step}, {size}, digest {run.digest[:16]}", flush=True)
    if problems:
        raise UserError(problems[0])


def _runs(cfg: Experiment) -> Iterable[tuple[epath.Path, runs.Stage | None, Experiment | None]]:
    """(folder, stage, the config it must have) of the experiment's runs: ours by `cfg`, others by their own.

    A run that has lost its config.yaml has neither.
    """
    root = epath.Path(cfg.exp_dir)
    if not root.exists():
        return
    ours = {os.fspath(epath.Path(cfg.value_dir)), os.fspath(epath.Path(cfg.policy_dir))}
    for path in sorted(root.iterdir()):
        record = runs.read(path) if path.is_dir() else None
        if record is not None:
            yield path, record.stage, cfg if os.fspath(path) in ours else record.config
        elif (path / runs.COMPLETE).exists():
            yield path, None, None


def _check_config(root: epath.Path, found: Complete, cfg: Experiment, stage: runs.Stage) -> None:
    if found.config_hash == runs.config_hash(cfg, stage):
        return
    record = runs.read(root)
    different = runs.differing(cfg, record.config, stage) if record else []
    detail = "; ".join(different[:4]) or "fields of another version of hvd"
    raise UserError(
        f"{root} was trained with another config ({detail}): use that config or train the {stage} run again"
    )


def _why_incomplete(root: epath.Path) -> str:
    folder = root / runs.CHECKPOINTS
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    at = f"its last checkpoint is at step {max(steps)}" if steps else "it has no checkpoint"
    return f"there is no {runs.COMPLETE}, {at}; run the stage again, it goes on from there"
