"""Learning-rate schedules, AdamW after clipping by global norm, and moving averages: openpi's arithmetic.

All of it works on plain pytrees of arrays. Frozen parameters are not in those trees (see hvd.models.pi0.freeze_filter),
so they have no gradient, no optimiser state and no share in the global norm.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from hvd.configs import LrSchedule, Optimizer
from hvd.errors import UserError

Params = Any  # a pytree of float arrays
Schedule = Callable[[Any], Float[Array, ""]]  # of a step, an int or an integer scalar array


def learning_rate(cfg: LrSchedule) -> Schedule:
    """The learning rate of the update that follows `step` completed ones.

    Both kinds rise linearly from peak / (warmup_steps + 1) at step 0 to peak at step warmup_steps. "cosine" then falls
    to decay_lr at step decay_steps and stays there; "rsqrt" falls as 1 / sqrt(1 + (step - warmup_steps) / timescale).
    """
    if cfg.warmup_steps < 0:
        raise UserError(f"lr_schedule.warmup_steps {cfg.warmup_steps} must not be negative")
    if cfg.kind == "cosine" and cfg.decay_steps <= cfg.warmup_steps:
        raise UserError(
            f"lr_schedule.decay_steps {cfg.decay_steps} must be larger than lr_schedule.warmup_steps {cfg.warmup_steps}"
        )

    def schedule(step: Any) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        start = cfg.peak_lr / (cfg.warmup_steps + 1)
        warm = start + (cfg.peak_lr - start) * step / max(cfg.warmup_steps, 1)
        after = jnp.maximum(step - cfg.warmup_steps, 0.0)
        if cfg.kind == "cosine":
            progress = jnp.minimum(after / (cfg.decay_steps - cfg.warmup_steps), 1.0)
            decayed = cfg.decay_lr + (cfg.peak_lr - cfg.decay_lr) * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        else:
            decayed = cfg.peak_lr * jax.lax.rsqrt(1.0 + after / cfg.timescale)
        return jnp.where(step < cfg.warmup_steps, warm, decayed)

    return schedule


def make_optimizer(cfg: Optimizer, schedule: Schedule) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW with decoupled weight decay on every leaf it is given."""
    adamw = optax.adamw(schedule, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay)
    return optax.chain(optax.clip_by_global_norm(cfg.clip_gradient_norm), adamw)


def update(
    optimizer: optax.GradientTransformation, grads: Params, state: optax.OptState, params: Params
) -> tuple[Params, optax.OptState, Float[Array, ""]]:
    """One step: the new parameters, the new state, and the gradients' global norm before clipping."""
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, optax.tree.norm(grads)


def moving_average(average: Params, params: Params, decay: float) -> Params:
    """decay * average + (1 - decay) * params, leaf by leaf: the EMA of the trained parameters, the target network.

    A target network that moves by the share `target_ema` each step has decay = 1 - target_ema.
    """
    return jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, average, params)
