"""What can be said to be wrong before anything runs: the config by itself, batch divisibility, the paths it names.

The command line calls it before every step and the launcher before every job, so that a mistake costs no queue and
leaves nothing behind. Imports no jax. Every finding is a UserError that names the field.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from hvd import mixture
from hvd.configs import Experiment, StageConfig
from hvd.errors import UserError
from hvd.fields import check_rules
from hvd.robots import get_robot
from hvd.storage import cache as storage

# Folders of an experiment that no policy run may be called.
RESERVED = ("value", "advantages", "recordings", "datasets", "evaluation", "logs")


def check_config(cfg: Experiment) -> None:
    """Raise UserError where the config contradicts itself; reads no file."""
    from hvd.method import objectives, weights  # `hvd --help` does not wait for them

    check_rules(cfg)
    objectives.parameters(cfg)
    weights.parameters(cfg)
    _check_model(cfg)
    _check_run(cfg)
    mixture.check(cfg)


def check_devices(cfg: Experiment, devices: int, processes: int = 1) -> None:
    """Raise UserError where a batch cannot be divided over `devices` (of all processes) or the fsdp axis over them."""
    if devices % processes:
        raise UserError(f"{devices} devices cannot be divided over {processes} processes")
    if cfg.fsdp_devices and devices % cfg.fsdp_devices:
        raise UserError(f"fsdp_devices {cfg.fsdp_devices} does not divide the {devices} device(s) of this run")
    for stage in ("value", "policy"):
        own: StageConfig = getattr(cfg, stage)
        if own.batch_size % devices:
            raise UserError(
                f"{stage}.batch_size {own.batch_size} is not divisible by the {devices} devices of this run"
            )
        micro = own.batch_size // own.grad_accum_steps
        if micro % devices:
            raise UserError(
                f"{stage}.grad_accum_steps {own.grad_accum_steps} leaves micro-batches of {micro} rows, which are not "
                f"divisible by the {devices} devices of this run"
            )


def check_datasets(cfg: Experiment) -> None:
    """Raise UserError where a dataset that the config names is not there; simulated data are made by the run itself."""
    for name, data in cfg.datasets():
        info, field = data.path() / "meta" / "info.json", mixture.field(name)
        if not cfg.sim.task and not info.is_file():
            raise UserError(
                f"{field}: no LeRobot dataset at {data.path()} (no meta/info.json); `hvd convert` makes one "
                f"of recordings, --data PATH or --{field}.root PATH names another folder"
            )
    check_tokenizer(cfg)


def check_tokenizer(cfg: Experiment) -> None:
    """Raise UserError where tokenizer "paligemma" has no file and cannot fetch it; asks the network at most once."""
    if cfg.model.tokenizer != "paligemma":
        return
    path = cfg.model.tokenizer_path or storage.PALIGEMMA_TOKENIZER
    if storage.is_url(path):
        try:
            storage.check(path, "model.tokenizer_path")
        except UserError as error:
            raise UserError(f"{error}; {storage.TOKENIZER_ADVICE}") from error
    elif not Path(path).expanduser().is_file():
        raise UserError(f"model.tokenizer_path {path!r} is no file; leave it empty to fetch PaliGemma's once")


def check_weights(cfg: Experiment, stages: Sequence[str], *, overwrite: bool = False) -> None:
    """Raise UserError where a stage would start from weights that are not there; a run that goes on needs none.

    Asks the network once for a URL that is not cached. What is in the checkpoint is compared when it is opened.
    """
    for stage in stages:
        path, field = getattr(cfg, stage).weight_loader, f"{stage}.weight_loader"
        if not path or (not overwrite and _goes_on(cfg, stage)):
            continue
        if storage.is_url(path):
            storage.check(path, field)
            continue
        root = Path(path).expanduser()
        if not any((folder / "_METADATA").is_file() for folder in (root, root / "params")):
            raise UserError(
                f"{field} {path}: no Orbax checkpoint there (no _METADATA); give the folder of its `params`, or a URL "
                "such as gs://openpi-assets/checkpoints/pi0_base/params"
            )


def _goes_on(cfg: Experiment, stage: str) -> bool:
    from hvd.train.run_dir import has_checkpoint  # etils.epath: a tenth of a second of the launcher's start

    return has_checkpoint(getattr(cfg, f"{stage}_dir"))


def check_writable(folder: str) -> None:
    """Raise UserError where `folder`, or the nearest existing folder above it, cannot be written. Touches nothing."""
    if "://" in folder:
        return
    path = Path(folder).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"{existing} is no folder; set --runs_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} cannot be written; set --runs_dir")


def _check_model(cfg: Experiment) -> None:
    model, robot = cfg.model, get_robot(cfg.robot)
    if robot.action_dim > model.action_dim:
        raise UserError(f"model.action_dim {model.action_dim} is smaller than robot {robot.name}'s {robot.action_dim}")
    if model.action_horizon % model.action_patch:
        raise UserError(
            f"model.action_patch {model.action_patch} does not divide model.action_horizon {model.action_horizon}"
        )
    if cfg.evaluate.execute_steps > model.action_horizon:
        raise UserError(
            f"evaluate.execute_steps {cfg.evaluate.execute_steps} is more than the {model.action_horizon} actions "
            "of a chunk (model.action_horizon)"
        )
    dims = [dim for level in model.hierarchical_actions for dim in level]
    if not dims:
        return
    for dim in dims:
        if not 0 <= dim < robot.action_dim:
            raise UserError(f"model.hierarchical_actions: robot {robot.name} has no action {dim}")
        if dims.count(dim) > 1:
            raise UserError(f"model.hierarchical_actions: action {dim} stands in it twice")
    missing = sorted(set(range(robot.action_dim)) - set(dims))
    if missing:
        raise UserError(f"model.hierarchical_actions: robot {robot.name}'s action(s) {missing} are in no level")


def _check_run(cfg: Experiment) -> None:
    for stage in ("value", "policy"):
        own: StageConfig = getattr(cfg, stage)
        if own.batch_size % own.grad_accum_steps:
            raise UserError(
                f"{stage}.grad_accum_steps {own.grad_accum_steps} does not divide {stage}.batch_size {own.batch_size}"
            )
        if cfg.fsdp_devices and own.batch_size % cfg.fsdp_devices:
            raise UserError(f"{stage}.batch_size {own.batch_size} is not divisible by fsdp_devices {cfg.fsdp_devices}")
    for name, value in (("exp_name", cfg.exp_name or cfg.name), ("policy.run_name", cfg.policy.run_name)):
        parts = Path(value).parts
        if not parts or Path(value).is_absolute() or ".." in parts or (name != "exp_name" and len(parts) > 1):
            raise UserError(f"{name} {value!r} is no name of a folder below runs_dir")
    if cfg.policy.run_name in RESERVED:
        raise UserError(f"policy.run_name {cfg.policy.run_name!r} is taken by another part of the experiment")
