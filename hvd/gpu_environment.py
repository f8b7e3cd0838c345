"""Settings of XLA and NCCL by kind of GPU: one table, each with its reason. A user's own values come first.

Few on purpose: what JAX sets by itself is left alone. None was measured by us (no GPU was at hand); each stands here
for what its maker's documentation says.
"""

import re
from dataclasses import dataclass

ALL = ".*"


@dataclass(frozen=True)
class Setting:
    """A variable for the GPUs (names as in hvd.accelerators) that `gpus` matches; on `several` GPUs only."""

    gpus: str
    name: str
    value: str
    reason: str
    several: bool = True


TABLE = (
    Setting(ALL, "NCCL_DEBUG", "WARN", "a broken network says why instead of hanging"),
    Setting(
        ALL,
        "TF_CPP_MIN_LOG_LEVEL",
        "1",
        "XLA's informative lines of every process would bury the log",
        several=False,
    ),
    Setting(
        r"h100|h200|gh200|b200|a100",
        "XLA_FLAGS",
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        "gathering the next layer's parameters (fsdp) overlaps with computing this one",
    ),
    Setting(r"rtx", "NCCL_P2P_DISABLE", "1", "GeForce cards have no peer-to-peer; drivers that claim it hang"),
)


def settings(gpu: str, gpus: int) -> list[Setting]:
    """The rows for a job of `gpus` GPUs of kind `gpu` ("" = not known: only what holds for all)."""
    return [
        row
        for row in TABLE
        if (gpus > 1 or not row.several) and (row.gpus == ALL or (gpu and re.search(row.gpus, gpu)))
    ]
