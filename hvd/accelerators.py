"""What is known of the accelerators that people train on: memory and peak rates, from the makers' data sheets.

Imports no jax: `hvd plan` and the launcher read it on login nodes, telemetry reads it for the MFU.
"""

import re
from dataclasses import dataclass

from hvd.errors import UserError, nearest


@dataclass(frozen=True)
class Accelerator:
    """One device.

    Attributes:
        kind: a pattern of what jax calls it (device_kind), lower case.
        memory: bytes that the device has by its name.
        usable: bytes that CUDA reports as its total; error correction and the driver take the rest.
        flops: dense peak of bfloat16 matrix products with float32 accumulation, FLOP/s (no sparsity).
        bandwidth: of its memory, bytes/s.
        cores: streaming multiprocessors.
        capability: CUDA compute capability.
        l2: bytes of its level-2 cache.
        clock: highest clock of the multiprocessors, GHz.
    """

    kind: str
    memory: int
    usable: int
    flops: float
    bandwidth: float
    cores: int
    capability: tuple[int, int]
    l2: int
    clock: float


# Of a device's free memory, what hvd's runs give to JAX's pool (XLA_CLIENT_MEM_FRACTION unless it is set); JAX's own
# default leaves a quarter idle. CUDA's libraries and NCCL live in the rest.
MEMORY_FRACTION = 0.92

_GB = 1 << 30
_MB = 1 << 20


def _gib(x: float) -> int:
    return int(x * _GB)


ACCELERATORS: dict[str, Accelerator] = {
    "h100-80gb": Accelerator(r"h100(?!.*pcie)", 80 * _GB, _gib(79.1), 989.4e12, 3.35e12, 132, (9, 0), 50 * _MB, 1.98),
    "h100-pcie-80gb": Accelerator(r"h100.*pcie", 80 * _GB, _gib(79.1), 756e12, 2.0e12, 114, (9, 0), 50 * _MB, 1.755),
    "h200-141gb": Accelerator(r"h200", 141 * _GB, _gib(139.7), 989.4e12, 4.8e12, 132, (9, 0), 50 * _MB, 1.98),
    "gh200-96gb": Accelerator(r"gh200", 96 * _GB, _gib(94.5), 989.4e12, 4.0e12, 132, (9, 0), 50 * _MB, 1.98),
    "b200-180gb": Accelerator(r"b200", 180 * _GB, _gib(178.3), 2250e12, 8.0e12, 148, (10, 0), 126 * _MB, 1.965),
    "a100-40gb": Accelerator(r"a100.*40gb", 40 * _GB, _gib(39.39), 312e12, 1.555e12, 108, (8, 0), 40 * _MB, 1.41),
    "a100-80gb": Accelerator(r"a100.*80gb", 80 * _GB, _gib(79.15), 312e12, 2.039e12, 108, (8, 0), 40 * _MB, 1.41),
    "l40s-48gb": Accelerator(r"l40s", 48 * _GB, _gib(44.3), 362e12, 0.864e12, 142, (8, 9), 96 * _MB, 2.52),
    "a6000-48gb": Accelerator(r"rtx a6000", 48 * _GB, _gib(47.4), 154.8e12, 0.768e12, 84, (8, 6), 6 * _MB, 1.8),
    "rtx4090-24gb": Accelerator(r"rtx 4090", 24 * _GB, _gib(23.64), 165.2e12, 1.008e12, 128, (8, 9), 72 * _MB, 2.52),
    "rtx3090-24gb": Accelerator(r"rtx 3090", 24 * _GB, _gib(23.68), 71e12, 0.936e12, 82, (8, 6), 6 * _MB, 1.695),
    "a10-24gb": Accelerator(r"a10(?!0)", 24 * _GB, _gib(22.0), 125e12, 0.6e12, 72, (8, 6), 6 * _MB, 1.695),
    "l4-24gb": Accelerator(r"\bl4\b", 24 * _GB, _gib(22.0), 121e12, 0.3e12, 58, (8, 9), 48 * _MB, 2.04),
}


def get(name: str) -> Accelerator:
    """The device called `name`; a UserError that offers the nearest names otherwise."""
    if name not in ACCELERATORS:
        raise UserError(f"unknown device {name!r}{nearest(name, ACCELERATORS)}")
    return ACCELERATORS[name]


def of_kind(device_kind: str) -> Accelerator | None:
    """The device that jax calls `device_kind` ("NVIDIA H100 80GB HBM3"), or None where it is not known."""
    lower = device_kind.lower()
    return next((a for a in ACCELERATORS.values() if re.search(rf"(?<!g){a.kind}", lower)), None)
