"""The value stage: V(s) and one Q per kinematic level (docs/method.md, "Value stage"). `hvd train-value`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hvd.configs import Experiment
from hvd.method import objectives, weights
from hvd.models import precision
from hvd.models.augment import augment, draw
from hvd.models.pi0 import freeze_filter
from hvd.models.value import ValueModel, trunk_variant
from hvd.runtime import preemption
from hvd.train import gradients, state
from hvd.train import optimizer as optim
from hvd.train.mesh import Devices
from hvd.train.program import Batch, Metrics, Program
from hvd.train.stage import run_stage
from hvd.train.state import Graph, TrainState, Tree


def make_graph(cfg: Experiment) -> Graph:
    """The value model and which of its parameters are trained."""
    own, model = cfg.value, cfg.model
    variants = {"expert_variant": model.value_expert_variant, "trunk_variant": trunk_variant(model)}
    frozen = None if own.freeze_filter == "none" else freeze_filter(model, kind=own.freeze_filter, **variants)
    return Graph(lambda rngs: ValueModel(model, cfg.levels(), rngs, own.remat), frozen, precision.training(model.dtype))


def make_program(cfg: Experiment, devices: Devices, state_dims: int) -> Program:
    """The stage's step on a mesh. `state_dims`: dims of the robot's state, before padding."""
    own = cfg.value
    graph = make_graph(cfg)
    schedule = optim.learning_rate(own.lr_schedule)
    optimizer = optim.make_optimizer(own.optimizer, schedule)
    init = state.make_init(graph, optimizer, ema=own.ema_decay > 0, target=True)
    f, _ = objectives.objective(cfg)

    # --- losses: y from the online V, L_Q over all levels, L_V against the target network's Q
    def losses(trained: Tree, s: TrainState, batch: Batch) -> tuple[jax.Array, gradients.Rows]:
        batch = batch | {name: augment(batch[name], drawn, own) for name, drawn in batch.get("drawn", {}).items()}
        online, still, target = (
            graph.module(params, s.frozen) for params in (trained, jax.lax.stop_gradient(trained), s.target)
        )
        now, after = batch["observation"], batch["next_observation"]
        # A frozen trunk is the same in all three: images and prompts go through it once, outside of the gradient
        prefixes = still.encode(now, after) if own.freeze_filter == "trunk" else (None, None)
        y = objectives.td_target(batch["reward"], batch["discount"], still.state_value(after, prefixes[1]))
        v, q = online(now, batch["actions"], batch["action_mask"], prefixes[0])
        _, target_q = target(now, batch["actions"], batch["action_mask"], prefixes[0])
        loss = objectives.q_loss(q, y) + objectives.v_loss(v, target_q, f)
        return loss, {"v": v, "q": q, "y": y, "target_q": target_q}

    # --- one step
    def step(s: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(cfg.seed), s.step))
        names = ("observation", "next_observation")
        drawn = {name: draw(key, batch[name], own, state_dims) for key, name in zip(keys, names, strict=True)}
        grads, rows = gradients.accumulate(
            lambda trained, part: losses(trained, s, part),
            s.trained,
            batch | {"drawn": drawn},
            own.grad_accum_steps,
            devices,
        )
        new, norm = state.advance(s, grads, optimizer, own, target_share=own.target_ema)
        return new, measured(rows, f, cfg.level_names()) | {"grad_norm": norm, "lr": schedule(s.step)}

    def evaluate(s: TrainState, batch: Batch, key: jax.Array) -> Metrics:
        averaged = s.ema or s.trained
        rows = gradients.evaluate(
            lambda trained, part: losses(trained, s, part), averaged, batch, own.grad_accum_steps, devices
        )
        return measured(rows, f, cfg.level_names())

    return Program(graph, init, devices.ambient(step), devices.ambient(evaluate))


def measured(rows: gradients.Rows, f: Callable[[Any], Any], level_names: tuple[str, ...]) -> Metrics:
    """The metrics of a batch from its rows' numbers."""
    v, q, y = rows["v"], rows["q"], rows["y"]
    loss_q = objectives.q_loss(q, y)
    loss_v = objectives.v_loss(v, rows["target_q"], f)
    advantages = weights.advantages(v, q)
    metrics = {
        "loss": loss_q + loss_v,
        "loss_q": loss_q,
        "loss_v": loss_v,
        "v_mean": jnp.mean(v),
        "v_std": jnp.std(v),
        "td_target": jnp.mean(y),
    }
    for i, name in enumerate(level_names):
        metrics[f"q/{name}"] = jnp.mean(q[:, i])
        metrics[f"advantage/{name}"] = jnp.mean(advantages[:, i])
        metrics[f"advantage_std/{name}"] = jnp.std(advantages[:, i])
    return metrics


def main(cfg: Experiment, overwrite: bool = False) -> None:
    """Train, or go on training, the value run of the experiment; ends when complete.json is written."""
    with preemption.catch():
        run_stage(cfg, "value", make_program, overwrite=overwrite)
