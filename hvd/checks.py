"""What can be said to be wrong with a config by itself, and with its batches on given devices.

The command line calls it before every step and the launcher before every job, so that a mistake costs no queue and
leaves nothing behind. It reads no file; hvd.train.inputs looks at what the config names. Imports no jax.
"""

from pathlib import Path

from hvd import mixture
from hvd.configs import Experiment, StageConfig
from hvd.errors import UserError
from hvd.fields import check_rules
from hvd.robots import get_robot

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


def _check_model(cfg: Experiment) -> None:
    model, robot = cfg.model, get_robot(cfg.robot)
    if robot.action_dim > model.action_dim:
        raise UserError(f"model.action_dim {model.action_dim} is smaller than robot {robot.name}'s {robot.action_dim}")
    if model.action_horizon % model.action_patch:
        raise UserError(
            f"model.action_patch {model.action_patch} does not divide model.action_horizon {model.action_horizon}"
        )
    execute, delay = cfg.evaluate.execute_steps, cfg.evaluate.delay
    if execute + delay > model.action_horizon:
        raise UserError(
            f"evaluate.execute_steps {execute} and delay {delay} are more than the {model.action_horizon} actions "
            "of a chunk (model.action_horizon)"
        )
    if delay > execute:
        raise UserError(
            f"evaluate.delay {delay} is more than execute_steps {execute}: one chunk is asked for at a time"
        )
    prefix = cfg.policy.prefix_max
    if prefix >= model.action_horizon:
        raise UserError(f"policy.prefix_max {prefix} must be less than model.action_horizon {model.action_horizon}")
    if cfg.evaluate.chunking == "prefix" and not delay <= prefix > 0:
        raise UserError(
            f"evaluate.chunking prefix: policy.prefix_max {prefix} must be {max(1, delay)} or more (evaluate.delay); "
            "train a policy with it, or choose evaluate.chunking guided"
        )
    if model.spells_state:
        _check_spelled_state(cfg)
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


def _check_spelled_state(cfg: Experiment) -> None:
    """The state stands in the prompt as bins of [-1, 1)."""
    if cfg.norm.mode != "quantile":
        raise UserError(
            f"norm.mode {cfg.norm.mode}: with {cfg.model.family} the state is spelled in the prompt as bins between -1 "
            "and 1, which the quantiles map to; set norm.mode quantile (or model.state_in_prompt no)"
        )
    if cfg.policy.state_noise and cfg.model.family == "pi05":
        raise UserError("policy.state_noise: pi05 reads the state from the prompt only, which gets no noise; set it 0")


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
            raise UserError(f"{name} {value!r} is not the name of a folder below runs_dir")
    if cfg.policy.run_name in RESERVED:
        raise UserError(f"policy.run_name {cfg.policy.run_name!r} is taken by another part of the experiment")
