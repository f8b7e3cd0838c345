"""One training stage from its config to its complete run: what the value and the policy stage do alike."""

from collections.abc import Callable, Mapping

from hvd.configs import Experiment
from hvd.runtime import records
from hvd.train import claim, flops, loop, mesh, pretrained, stage_data, telemetry
from hvd.train import run_dir as runs
from hvd.train.inputs import check_weights, check_writable
from hvd.train.mesh import Devices
from hvd.train.program import Program
from hvd.train.stage_data import StageData, Weights

type MakeProgram = Callable[[Experiment, Devices, int], Program]
type ChooseRows = Callable[[StageData, Devices], tuple[StageData, Weights]]


def run_stage(
    cfg: Experiment,
    stage: runs.Stage,
    make_program: MakeProgram,
    *,
    overwrite: bool = False,
    predecessors: Mapping[str, str] | None = None,
    choose_rows: ChooseRows = lambda data, devices: (data, {}),
) -> None:
    """Train, or go on training, the stage's run; ends when complete.json is written.

    Args:
        overwrite: delete the run first; not in a job's restart, which goes on with what the job has begun.
        predecessors: name -> digest of the complete runs that the stage builds on (rule 1).
        choose_rows: the data with the rows to train on, and their weights; called once the run may start, by all
            processes together.

    Raises:
        UserError: before anything is written, whatever can be known to be wrong.
    """
    folder = cfg.value_dir if stage == "value" else cfg.policy_dir
    stage_cfg = getattr(cfg, stage)
    predecessors = dict(predecessors or {})
    overwrite = overwrite and not records.has_begun(folder)

    # --- what can be refused before anything heavy
    runs.check_startable(folder, cfg, stage, predecessors, overwrite=overwrite)
    if not overwrite and claim.already_complete(folder, cfg, stage):
        return
    check_writable(folder)
    telemetry.check_wandb(cfg)
    check_weights(cfg, (stage,), overwrite=overwrite)
    devices = mesh.start(cfg)
    devices.check_batch(stage_cfg.batch_size, stage_cfg.grad_accum_steps, stage)

    # --- data, and what becomes of their rows
    data = stage_data.open_data(cfg, stage)
    inputs = data.inputs | predecessors
    runs.check_startable(folder, cfg, stage, inputs, overwrite=overwrite)
    devices.poll("before the first step")
    data, weights = choose_rows(data, devices)

    # --- the run's folder, and the loop
    program = make_program(cfg, devices, data.transform.stats["state"].dim)
    prepare = pretrained.ready(cfg, stage, program.graph, overwrite=overwrite)
    claim.take(data, folder, devices, inputs, overwrite=overwrite)
    loop.run(
        loop.Job(
            cfg=cfg,
            stage=stage,
            folder=folder,
            devices=devices,
            inputs=inputs,
            program=program,
            prepare=prepare,
            model_flops=flops.of_step(make_program, cfg, stage, devices) if devices.is_main else 0,
            loader=lambda start: data.loader(start, devices, weights),
            validation=lambda: data.validation(devices, weights),
        )
    )
