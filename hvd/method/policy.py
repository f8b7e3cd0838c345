"""The policy stage: pi0 by flow matching, each kinematic level weighted by its advantage (docs/method.md).
`hvd train-policy`. With policy.weighting "none" the same code is imitation and needs no value run.
"""

import jax
import numpy as np
from jaxtyping import Float, Float32

from hvd.checks import check_weights
from hvd.configs import Experiment
from hvd.method import advantage_table, advantages, flow
from hvd.models import precision
from hvd.models.augment import augment, draw
from hvd.models.pi0 import Pi0, freeze_filter
from hvd.runtime import preemption, records
from hvd.train import complete, flops, gradients, inference, loop, mesh, pretrained, stage_data, state
from hvd.train import optimizer as optim
from hvd.train import run_dir as runs
from hvd.train.mesh import Devices
from hvd.train.program import Batch, Metrics, Program
from hvd.train.state import Graph, TrainState, Tree


def make_graph(cfg: Experiment) -> Graph:
    """pi0 and which of its parameters are trained."""
    own = cfg.policy
    frozen = None if own.freeze_filter == "none" else freeze_filter(cfg.model, kind=own.freeze_filter)
    options = {"remat": own.remat, "frozen_trunk": own.freeze_filter == "trunk"}
    return Graph(lambda rngs: Pi0(cfg.model, rngs, **options), frozen, precision.training(cfg.model.dtype))


def make_program(cfg: Experiment, devices: Devices, state_dims: int) -> Program:
    """The stage's step on a mesh. `state_dims`: dims of the robot's state, before padding."""
    own = cfg.policy
    graph = make_graph(cfg)
    schedule = optim.learning_rate(own.lr_schedule)
    optimizer = optim.make_optimizer(own.optimizer, schedule)
    init = state.make_init(graph, optimizer, ema=own.ema_decay > 0, target=False)
    levels, real_dims = cfg.levels(), inference.pad_mask(cfg)

    # --- loss: L_RL over the suboptimal rows + lambda L_BC over the optimal rows of a batch
    def losses(trained: Tree, frozen: Tree, batch: Batch) -> tuple[jax.Array, gradients.Rows]:
        observation = augment(batch["observation"], batch.get("drawn", {}), own)
        x_t, u = flow.interpolate(batch["noise"], batch["actions"], batch["time"])
        velocity = graph.module(trained, frozen).velocity(observation, x_t, batch["time"])
        errors = flow.level_errors(velocity, u, batch["action_mask"], levels)
        loss, _ = flow.policy_loss(errors, batch["weights"], batch["source"], own.bc_lambda, batch["share"])
        return loss, {"errors": errors}

    def measured(batch: Batch, errors: Float[jax.Array, "b l"]) -> Metrics:
        """The metrics of a batch from its rows' errors."""
        loss, metrics = flow.policy_loss(errors, batch["weights"], batch["source"], own.bc_lambda, batch["share"])
        metrics = metrics | {"loss": loss, "flow_error": errors.sum(axis=-1).mean()}
        for i, name in enumerate(cfg.level_names()):
            metrics[f"flow_error/{name}"] = errors[:, i].mean()
            metrics[f"weight/{name}"] = batch["weights"][:, i].mean()
        return metrics

    def whole(batch: Batch, key: jax.Array) -> Batch:
        """The batch with the flow's noise and times, and what its rows count."""
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, batch["actions"].shape) * real_dims[None, None]
        # Whole on every device: its loop of rejections would ask all devices in each round
        time = flow.sample_time(time_key, batch["actions"].shape[0])
        time = jax.lax.with_sharding_constraint(time, devices.replicated)
        return batch | {"noise": noise, "time": time, "share": flow.shares(batch["source"])}

    # --- one step
    def step(s: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key, augment_key = jax.random.split(jax.random.fold_in(jax.random.key(cfg.seed), s.step))
        batch = whole(batch, key) | {"drawn": draw(augment_key, batch["observation"], own, state_dims)}
        grads, rows = gradients.accumulate(
            lambda trained, part: losses(trained, s.frozen, part), s.trained, batch, own.grad_accum_steps, devices
        )
        new, norm = state.advance(s, grads, optimizer, own)
        return new, measured(batch, rows["errors"]) | {"grad_norm": norm, "lr": schedule(s.step)}

    def evaluate(s: TrainState, batch: Batch, key: jax.Array) -> Metrics:
        batch, averaged = whole(batch, key), s.ema or s.trained
        rows = gradients.evaluate(
            lambda trained, part: losses(trained, s.frozen, part), averaged, batch, own.grad_accum_steps, devices
        )
        return measured(batch, rows["errors"])

    return Program(graph, init, devices.ambient(step), devices.ambient(evaluate))


def main(cfg: Experiment, overwrite: bool = False) -> None:
    """Train, or go on training, the policy run of the experiment; ends when complete.json is written."""
    with preemption.catch():
        _main(cfg, overwrite)


def _main(cfg: Experiment, overwrite: bool) -> None:
    folder, own = cfg.policy_dir, cfg.policy
    overwrite = overwrite and not records.has_begun(folder)

    # --- what can be refused before anything heavy; rule 1: only on a complete value run
    weighted = own.weighting != "none"
    value = complete.check_complete(cfg.value_dir, stage="value", cfg=cfg) if weighted else None
    of_value = {"value": value.digest} if value else {}
    runs.check_startable(folder, cfg, "policy", of_value, overwrite=overwrite)
    if not overwrite and loop.already_complete(folder, cfg, "policy"):
        return
    check_weights(cfg, ("policy",), overwrite=overwrite)
    devices = mesh.start(cfg)
    devices.check_batch(own.batch_size, own.grad_accum_steps, "policy")

    # --- data, and the weights of its rows
    data = stage_data.open_data(cfg, "policy")
    inputs = data.inputs | of_value
    runs.check_startable(folder, cfg, "policy", inputs, overwrite=overwrite)
    devices.poll("before the first step")
    weights: dict[str, Float32[np.ndarray, "_ l"]] = {}
    if value is not None:
        datasets = {role: data.datasets[role] for role in advantages.weighted_roles(cfg)}
        advantages.ensure(cfg, devices, value, datasets)
        weights = advantage_table.read_weights(cfg.advantages_dir, datasets)

    # --- the run's folder, and the loop
    program = make_program(cfg, devices, data.transform.stats["state"].dim)
    prepare = pretrained.ready(cfg, "policy", program.graph, overwrite=overwrite)
    loop.claim(data, folder, devices, inputs, overwrite=overwrite)
    loop.run(
        loop.Job(
            cfg=cfg,
            stage="policy",
            folder=folder,
            devices=devices,
            inputs=inputs,
            program=program,
            prepare=prepare,
            model_flops=flops.of_step(make_program, cfg, "policy", devices),
            loader=lambda start: data.loader(start, devices, weights),
            validation=lambda: data.validation(devices, weights),
        )
    )
