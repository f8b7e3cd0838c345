"""The policy stage: pi0 by flow matching, each kinematic level weighted by its advantage (docs/method.md, "Policy
stage"). `hvd train-policy`. With policy.weighting "none" the same code is imitation and needs no value run.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from hvd import mixture
from hvd.configs import Experiment
from hvd.method import advantages, condition, extraction, flow, value_run
from hvd.method.extraction import Extracted
from hvd.models import precision
from hvd.models.augment import augment, draw
from hvd.models.pi0 import Pi0, freeze_filter
from hvd.runtime import preemption, processes
from hvd.train import gradients, inference, state
from hvd.train import optimizer as optim
from hvd.train.mesh import Devices
from hvd.train.program import Batch, Metrics, Program
from hvd.train.stage import run_stage
from hvd.train.stage_data import StageData, Told, Weights, cut_prompts
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
    of_optimal_sets = np.asarray(mixture.imitated(cfg), np.int32)

    # --- loss: L_RL over the rows of mixed and rollouts sets + lambda L_BC over those of optimal sets
    def losses(trained: Tree, frozen: Tree, batch: Batch) -> tuple[jax.Array, gradients.Rows]:
        observation = augment(batch["observation"], batch.get("drawn", {}), own)
        x_t, u = flow.interpolate(batch["noise"], batch["actions"], batch["time"])
        velocity = graph.module(trained, frozen).velocity(observation, x_t, batch["time"])
        errors = flow.level_errors(velocity, u, batch["action_mask"], levels)
        loss, _ = flow.policy_loss(errors, batch["weights"], batch["imitated"], own.bc_lambda, batch["share"])
        return loss, {"errors": errors}

    def measured(batch: Batch, errors: Float[jax.Array, "b l"]) -> Metrics:
        """The metrics of a batch from its rows' errors."""
        loss, metrics = flow.policy_loss(errors, batch["weights"], batch["imitated"], own.bc_lambda, batch["share"])
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
        imitated = jnp.any(batch["source"][:, None] == of_optimal_sets[None], axis=-1)
        made = {"noise": noise, "time": time, "imitated": imitated, "share": flow.shares(imitated)}
        if own.prefix_max:
            given = jax.random.randint(jax.random.fold_in(key, 2), time.shape, 0, own.prefix_max + 1)
            made["time"], made["action_mask"] = flow.after_prefix(time, batch["action_mask"], given)
        return batch | made

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
        value = value_run.check(cfg) if value_run.needed(cfg) else None
        if value is None and cfg.policy.gate == "none" and not extraction.extractor(cfg)[0].labelled:
            return run_stage(cfg, "policy", make_program, overwrite=overwrite)

        def choose_rows(data: StageData, devices: Devices) -> tuple[StageData, Weights]:
            """The rows and weights that the extractor makes of the value run's table."""
            datasets = {name: data.datasets[name] for name in mixture.weighted(cfg)}
            made = advantages.ensured(cfg, devices, value, datasets) if value else None
            outcomes = {name: extraction.Outcomes.of(dataset) for name, dataset in datasets.items()}
            extracted = extraction.extract(cfg, made, outcomes)
            keep = {name: e.keep for name, e in extracted.items() if e.keep is not None}
            return _told(cfg, data, extracted).only(keep), {name: e.weights for name, e in extracted.items()}

        predecessors = {"value": value.digest} if value else {}
        run_stage(cfg, "policy", make_program, overwrite=overwrite, predecessors=predecessors, choose_rows=choose_rows)


def _told(cfg: Experiment, data: StageData, extracted: Mapping[str, Extracted]) -> StageData:
    """The data with words before its prompts, where the extractor says how good each row is."""
    rows = {name: condition.which(cfg, e.good) for name, e in extracted.items() if e.good is not None}
    if not rows:
        return data
    texts = condition.texts(cfg)
    condition.check(cfg, data.transform.tokenizer.encode(texts)[0])
    lines = cut_prompts(data.transform.telling(texts[-1], without=False), data.datasets)
    if not processes.rank():
        print("".join(f"{line}\n" for line in lines), end="", flush=True)
    return dataclasses.replace(data, told=Told(texts, rows, extraction.extractor(cfg)[1]["drop"]))
