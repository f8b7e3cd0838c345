"""Named experiments of the Galaxea R1 and R1 Pro at real size, openpi's models. Imports no jax.

A docstring says the command and what it needs; the memory figures are those of `hvd plan`.
"""

from collections.abc import Callable
from typing import Any, Literal

from hvd.configs import (
    DataConfig,
    Experiment,
    LrSchedule,
    ModelConfig,
    NormConfig,
    PolicyConfig,
    ValueConfig,
)

# The chunks of the mixed set that look most like the demonstrations, of those that a reward follows (docs/evidence.md).
FILTER: dict[str, Any] = {
    "extractor": "filter",
    "extractor_params": {"quantile": 0.6},
    "score": "ratio",
    "score_levels": "joint",
    "gate": "reward",
}

# public, 13 GB in float32 each
BASE = {family: f"gs://openpi-assets/checkpoints/{family}_base/params" for family in ("pi0", "pi05")}


def _r1(
    name: str,
    experiment: str,
    *,
    family: Literal["pi0", "pi05"] = "pi0",
    robot: str = "r1",
    lora: bool = True,
    fsdp: int = 0,
    **policy,
) -> Experiment:
    """The Galaxea R1 at real size. Configs of one `experiment` share its value run: all but the policy is the same."""
    flat = experiment.endswith("_flat")
    model = ModelConfig(
        family=family,
        max_token_len=200 if family == "pi05" else 48,
        paligemma_variant="gemma_2b_lora" if lora else "gemma_2b",
        action_expert_variant="gemma_300m_lora" if lora else "gemma_300m",
        value_paligemma_variant="gemma_2b",
        network_type="q" if flat else "hierarchical_q",
    )
    steps = 30_000
    return Experiment(
        name=name,
        exp_name=experiment,
        fsdp_devices=fsdp,
        num_workers=8,
        robot=robot,
        model=model,
        norm=NormConfig("quantile" if family == "pi05" else "z_score"),
        optimal_data=DataConfig(repo_id=f"{robot}/optimal"),
        suboptimal_data=DataConfig(repo_id=f"{robot}/mixed"),
        value=ValueConfig(
            num_train_steps=steps + 1,
            batch_size=16,
            lr_schedule=LrSchedule(peak_lr=1e-4, decay_steps=steps, decay_lr=1e-5),  # the value expert starts fresh
            weight_loader=BASE[family],
            freeze_filter="trunk",
            val_interval=5_000,
        ),
        policy=PolicyConfig(
            num_train_steps=steps,
            batch_size=16,
            weight_loader=BASE[family],
            ema_decay=0.0 if lora else 0.99,
            remat="full",
            run_name=name,
            val_interval=5_000,
            **policy,
        ),
    )


def value_r1() -> Experiment:
    """R1, the value stage: Q per level, exponential, on pi0_base's frozen trunk with a value expert of 300M.

    Command: python launch/submit.py --stage value --config value_r1 --data DATASETS
    Devices and memory: 14.4 GiB on one GPU, 8.6 on each of two, 2.5 on each of eight (`hvd plan`).
    Hours: about 2.6 on one H100 at 40 % of its peak (125 TFLOP a step, counted; not measured).
    """
    return _r1("value_r1", "r1")


def value_r1_flat() -> Experiment:
    """R1, the value stage with one flat Q: the ablation of the hierarchy.

    Command: python launch/submit.py --stage value --config value_r1_flat --data DATASETS
    Devices, memory, hours: as value_r1.
    """
    return _r1("value_r1_flat", "r1_flat")


def pi0_r1() -> Experiment:
    """R1, all of pi0 (3.2 B) trained from pi0_base, each level weighted by its advantage.

    Command: python launch/submit.py --stage policy --config pi0_r1 --data DATASETS (after value_r1)
    Devices and memory: 61 GiB on one GPU, 34 on each of two, 8.7 on each of eight (`hvd plan`): 1 x 80 GB to 8 x 24 GB.
    Hours: about 3.9 on one H100, 0.5 on eight, at 40 % of their peak (184 TFLOP a step, counted; not measured).
    """
    return _r1("pi0_r1", "r1", lora=False)


def pi0_r1_filter() -> Experiment:
    """As pi0_r1, from the mixed chunks that look like the demonstrations: the expert ratio, docs/evidence.md's winner.

    Command: python launch/submit.py --stage policy --config pi0_r1_filter --data DATASETS (after value_r1)
    Devices, memory, hours: as pi0_r1.
    """
    return _r1("pi0_r1_filter", "r1", lora=False, **FILTER)


def pi0_r1_flat() -> Experiment:
    """As pi0_r1, one weight per chunk by the flat Q of value_r1_flat.

    Command: python launch/submit.py --stage policy --config pi0_r1_flat --data DATASETS (after value_r1_flat)
    Devices, memory, hours: as pi0_r1.
    """
    return _r1("pi0_r1_flat", "r1_flat", lora=False)


def pi0_r1_imitation() -> Experiment:
    """As pi0_r1, plain imitation of the optimal set: the baseline.

    Command: python launch/submit.py --stage policy --config pi0_r1_imitation --data DATASETS
    Devices, memory, hours: as pi0_r1.
    """
    return _r1("pi0_r1_imitation", "r1", lora=False, weighting="none", suboptimal_share=0.0)


def pi0_r1_lora() -> Experiment:
    """R1, pi0 with LoRA on both experts (468 M trained) from pi0_base: the published setting.

    Command: python launch/submit.py --stage policy --config pi0_r1_lora --data DATASETS (after value_r1)
    Devices and memory: 9.6 GiB on each of two GPUs of 24 GB, 15 on one alone with --fsdp_devices 1 (`hvd plan`).
    Hours: about 1.4 on two H100, at 40 % of their peak (136 TFLOP a step, counted; not measured).
    """
    return _r1("pi0_r1_lora", "r1", fsdp=2)


def pi0_r1_lora_filter() -> Experiment:
    """As pi0_r1_lora, from the mixed chunks that look like the demonstrations, as pi0_r1_filter.

    Command: python launch/submit.py --stage policy --config pi0_r1_lora_filter --data DATASETS (after value_r1)
    Devices, memory, hours: as pi0_r1_lora.
    """
    return _r1("pi0_r1_lora_filter", "r1", fsdp=2, **FILTER)


def pi0_r1_lora_flat() -> Experiment:
    """As pi0_r1_lora, one weight per chunk by the flat Q of value_r1_flat.

    Command: python launch/submit.py --stage policy --config pi0_r1_lora_flat --data DATASETS (after value_r1_flat)
    Devices, memory, hours: as pi0_r1_lora.
    """
    return _r1("pi0_r1_lora_flat", "r1_flat", fsdp=2)


def pi0_r1_lora_imitation() -> Experiment:
    """As pi0_r1_lora, plain imitation of the optimal set: the baseline.

    Command: python launch/submit.py --stage policy --config pi0_r1_lora_imitation --data DATASETS
    Devices, memory, hours: as pi0_r1_lora.
    """
    return _r1("pi0_r1_lora_imitation", "r1", fsdp=2, weighting="none", suboptimal_share=0.0)


def value_pi05_r1() -> Experiment:
    """R1, the value stage for pi0.5: as value_r1, on pi05_base's frozen trunk, with the state in the prompt.

    Command: python launch/submit.py --stage value --config value_pi05_r1 --data DATASETS
    Devices and memory: 14.7 GiB on one GPU, 8.9 on each of two, 2.6 on each of eight (`hvd plan`).
    """
    return _r1("value_pi05_r1", "pi05_r1", family="pi05")


def pi05_r1() -> Experiment:
    """R1, all of pi0.5 (3.4 B) trained from pi05_base, each level weighted by its advantage.

    Command: python launch/submit.py --stage policy --config pi05_r1 --data DATASETS (after value_pi05_r1)
    Devices and memory: 64 GiB on one GPU, 36 on each of two, 9.1 on each of eight (`hvd plan`): 1 x 80 GB to 8 x 24 GB.
    """
    return _r1("pi05_r1", "pi05_r1", family="pi05", lora=False)


def pi05_r1_filter() -> Experiment:
    """As pi05_r1, from the mixed chunks that look like the demonstrations, as pi0_r1_filter.

    Command: python launch/submit.py --stage policy --config pi05_r1_filter --data DATASETS (after value_pi05_r1)
    Devices, memory, hours: as pi05_r1.
    """
    return _r1("pi05_r1_filter", "pi05_r1", family="pi05", lora=False, **FILTER)


def pi05_r1_lora() -> Experiment:
    """R1, pi0.5 with LoRA on both experts (467 M trained) from pi05_base.

    Command: python launch/submit.py --stage policy --config pi05_r1_lora --data DATASETS (after value_pi05_r1)
    Devices and memory: 10.2 GiB on each of two GPUs of 24 GB (`hvd plan`).
    """
    return _r1("pi05_r1_lora", "pi05_r1", family="pi05", fsdp=2)


def value_pi05_r1pro() -> Experiment:
    """R1 Pro in the BEHAVIOR challenge's order of actions, the value stage for pi0.5.

    Command: python launch/submit.py --stage value --config value_pi05_r1pro --data DATASETS
    Devices and memory: as value_pi05_r1.
    """
    return _r1("value_pi05_r1pro", "pi05_r1pro", family="pi05", robot="r1_pro_b1k")


def pi05_r1pro() -> Experiment:
    """R1 Pro in the BEHAVIOR challenge's order of actions (23), all of pi0.5 trained from pi05_base.

    Command: python launch/submit.py --stage policy --config pi05_r1pro --data DATASETS (after value_pi05_r1pro)
    Devices and memory: as pi05_r1.
    """
    return _r1("pi05_r1pro", "pi05_r1pro", family="pi05", robot="r1_pro_b1k", lora=False)


R1: tuple[Callable[[], Experiment], ...] = (
    value_r1,
    value_r1_flat,
    pi0_r1,
    pi0_r1_filter,
    pi0_r1_flat,
    pi0_r1_imitation,
    pi0_r1_lora,
    pi0_r1_lora_filter,
    pi0_r1_lora_flat,
    pi0_r1_lora_imitation,
    value_pi05_r1,
    pi05_r1,
    pi05_r1_filter,
    pi05_r1_lora,
    value_pi05_r1pro,
    pi05_r1pro,
)
