"""complete.json: the proof that a training run is complete, and the one function that every launcher asks.

It is written last and atomically, and lists every file of the final checkpoint with its length and sha256, so that a
run that was cut short, or whose checkpoint lost a file or a byte afterwards, is never taken for a whole one.
Imports no jax: login nodes, gates and `hvd verify` call it.
"""

import concurrent.futures
import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Mapping

from etils import epath

from hvd.configs import Experiment
from hvd.errors import UserError
from hvd.files import is_local, write_atomic
from hvd.train import run_dir as runs

_CHUNK = 4 << 20
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Complete:
    """What complete.json says.

    Attributes:
        step: number of training steps done.
        digest: sha256 over the manifest: names the parameters that later stages depend on.
        files: path relative to the run folder -> (bytes, sha256).
        inputs: digests of what the run was trained on (datasets, the value run).
    """

    stage: str
    step: int
    config_hash: str
    version: str
    finite: bool
    digest: str
    files: dict[str, tuple[int, str]]
    inputs: dict[str, str]

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


def write_complete(
    run_dir: os.PathLike | str,
    *,
    stage: str,
    step: int,
    config_hash: str,
    inputs: Mapping[str, str],
    finite: bool,
) -> Complete:
    """Hash the checkpoint of `step` and write complete.json; by one process, once the checkpoint is on disk."""
    root = epath.Path(run_dir)
    folder = root / runs.CHECKPOINTS / str(step)
    names = sorted(os.path.relpath(os.fspath(p), os.fspath(root)) for p in _walk(folder))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        files = dict(zip(names, pool.map(lambda name: _hash(root / name), names), strict=True))
    record = {
        "format": _FORMAT,
        "stage": stage,
        "step": step,
        "finite": finite,
        "config_hash": config_hash,
        "version": runs.code_version(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": dict(inputs),
        "digest": _digest(files),
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()},
    }
    write_atomic(root / runs.COMPLETE, json.dumps(record, indent=1))
    return Complete(stage, step, config_hash, record["version"], finite, record["digest"], files, dict(inputs))


def read_complete(run_dir: os.PathLike | str) -> Complete:
    """complete.json as it stands, nothing checked against the disk; UserError when it is missing or not readable."""
    path = epath.Path(run_dir) / runs.COMPLETE
    if not path.exists():
        raise UserError(f"{run_dir} is not complete: {_why_incomplete(epath.Path(run_dir))}")
    try:
        data = json.loads(path.read_text())
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in data["files"].items()}
        found = Complete(
            stage=data["stage"],
            step=int(data["step"]),
            config_hash=data["config_hash"],
            version=data["version"],
            finite=data["finite"] is True,
            digest=data["digest"],
            files=files,
            inputs=dict(data["inputs"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): train the run again") from error
    if not files or _digest(files) != found.digest:
        raise UserError(f"{path} is damaged: its list of files does not have the digest that it states")
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
        digests: also read every file of the checkpoint and compare its sha256 (otherwise presence and length only);
            once a process, as long as complete.json and the files' lengths and times stay what they were.
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
    seen = found.digest, tuple(_check_present(root / name, size) for name, (size, _) in found.files.items())
    if digests and _verified.get(os.fspath(root)) != seen:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            hashes = pool.map(lambda name: _hash(root / name), found.files)
            for (name, (_, expected)), (_, digest) in zip(found.files.items(), hashes, strict=True):
                if digest != expected:
                    raise UserError(f"{root / name} is corrupted: its sha256 is not the one in {runs.COMPLETE}")
        _verified[os.fspath(root)] = seen
    return found


_verified: dict[str, tuple] = {}  # run -> what check_complete saw when it had read every byte


def _check_present(path: epath.Path, size: int) -> tuple[int, float]:
    """The file is there with its length; its length and the time of its last change."""
    if not path.exists():
        raise UserError(f"{path} is missing: the checkpoint is not whole, train the run again")
    stat = path.stat()
    if stat.length != size:
        raise UserError(f"{path} has {stat.length} bytes instead of {size}: the checkpoint is damaged")
    changed = os.stat(path).st_mtime_ns if is_local(path) else stat.mtime
    return stat.length, changed


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


def _runs(cfg: Experiment) -> Iterable[tuple[epath.Path, runs.Stage, Experiment]]:
    """(folder, stage, the config it must have) of the experiment's runs: ours by `cfg`, others by their own."""
    root = epath.Path(cfg.exp_dir)
    if not root.exists():
        return
    ours = {os.fspath(epath.Path(cfg.value_dir)), os.fspath(epath.Path(cfg.policy_dir))}
    for path in sorted(root.iterdir()):
        record = runs.read(path) if path.is_dir() else None
        if record is not None:
            yield path, record.stage, cfg if os.fspath(path) in ours else record.config


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


def _walk(folder: epath.Path) -> Iterable[epath.Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry


def _hash(path: epath.Path) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def _digest(files: Mapping[str, tuple[int, str]]) -> str:
    lines = "".join(f"{name} {size} {digest}\n" for name, (size, digest) in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
