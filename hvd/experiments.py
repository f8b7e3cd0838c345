"""Named experiments: one name -> one complete `Experiment`. Imports no jax: login nodes read it.

A docstring says the command, what it needs and what it gives; the memory figures are those of `hvd plan`.
"""

import dataclasses
from collections.abc import Callable

from hvd.configs import (
    DataConfig,
    EvaluateConfig,
    Experiment,
    KeyMap,
    LrSchedule,
    ModelConfig,
    NormConfig,
    PolicyConfig,
    SimConfig,
    ValueConfig,
)
from hvd.errors import UserError, nearest
from hvd.experiments_r1 import FILTER, R1

_TINY = ModelConfig(
    max_token_len=8,
    vocab_size=512,
    tokenizer="words",
    dtype="float32",
    paligemma_variant="tiny_trunk",
    action_expert_variant="tiny",
    value_expert_variant="tiny",
    siglip_variant="tiny",
    cameras=(),
    image_size=56,
    action_patch=5,
)


def _small_lr(steps: int, peak: float) -> LrSchedule:
    return LrSchedule(warmup_steps=min(100, steps // 10), peak_lr=peak, decay_steps=steps, decay_lr=peak / 20)


def demo() -> Experiment:
    """Simulated R1, state and object pose, tiny models: the whole way on 2 CPU cores, on data where methods differ.

    Five demonstrations, and 240 recordings of operators one of whose levels makes mistakes all the time.

    Command: python launch/submit.py --stage all
    Expected: a table of success rates and runs/demo/report.html.
    """
    state = KeyMap(state=("observation.state", "observation.environment_state"))
    value_steps, policy_steps = 1_500, 3_000
    return Experiment(
        name="demo",
        accelerator="cpu",
        sim=SimConfig(task="tote", operator="bad_level", num_optimal=5, num_mixed=240),
        model=_TINY,
        norm=NormConfig(std_floor=0.02),
        optimal_data=DataConfig(repo_id="demo/optimal", keys=state),
        suboptimal_data=DataConfig(repo_id="demo/mixed", keys=state),
        num_workers=1,
        value=ValueConfig(
            num_train_steps=value_steps,
            batch_size=64,
            lr_schedule=_small_lr(value_steps, 5e-4),
            data="both",
            log_interval=50,
            val_interval=250,
            save_interval=500,
            keep_period=0,
        ),
        policy=PolicyConfig(
            num_train_steps=policy_steps,
            batch_size=32,
            lr_schedule=_small_lr(policy_steps, 1e-3),
            ema_decay=0.99,
            suboptimal_share=0.5,
            **FILTER,
            log_interval=50,
            val_interval=250,
            save_interval=500,
            keep_period=0,
        ),
        evaluate=EvaluateConfig(baselines=True),
    )


def g1() -> Experiment:
    """A real Unitree G1 with Inspire hands (26 joints, one camera), ten episodes of one task, tiny models.

    Eight training episodes are soon overfitted, so both stages train with much noise on the state and strong crops
    (BENCHMARKS.md has the figures without).

    Command: python launch/submit.py --stage all --config g1 --data PATH
    Expected: on held-out episodes an action error well below "hold the current pose"; V rises along an episode.
    """
    keys = KeyMap(images={"base_0_rgb": "observation.images.cam_high"})
    data = DataConfig(repo_id="g1_bottle", keys=keys, reward="success_at_end")
    value_steps, policy_steps = 1_000, 2_500
    return Experiment(
        name="g1",
        accelerator="cpu",
        robot="g1",
        # 60 actions are 2 s at 30 Hz, as 20 are for the R1 at 10 Hz
        model=dataclasses.replace(_TINY, cameras=("base_0_rgb",), action_horizon=60, max_token_len=16),
        norm=NormConfig(std_floor=0.01, delta_actions=True),
        optimal_data=data,
        suboptimal_data=data,
        num_workers=2,
        image_cache=True,
        value=ValueConfig(
            num_train_steps=value_steps,
            batch_size=32,
            lr_schedule=_small_lr(value_steps, 5e-4),
            log_interval=50,
            val_interval=250,
            save_interval=500,
            keep_period=0,
            gamma=0.9967,  # per second what 0.99 is at 10 Hz
            target_ema=0.02,
            state_noise=0.3,
            crop=0.75,
            rotation=10.0,
        ),
        policy=PolicyConfig(
            num_train_steps=policy_steps,
            batch_size=32,
            lr_schedule=_small_lr(policy_steps, 1e-3),
            ema_decay=0.99,
            log_interval=50,
            val_interval=250,
            save_interval=500,
            keep_period=0,
            state_noise=0.7,
            crop=0.75,
            rotation=10.0,
        ),
        evaluate=EvaluateConfig(val_fraction=0.2),
    )


CONFIGS: dict[str, Callable[[], Experiment]] = {build.__name__: build for build in (demo, g1, *R1)}


def get_config(name: str) -> Experiment:
    """The experiment called `name`, before overrides; a UserError that offers the nearest names otherwise."""
    if name not in CONFIGS:
        raise UserError(f"unknown config {name!r}{nearest(name, CONFIGS)}")
    return CONFIGS[name]()
