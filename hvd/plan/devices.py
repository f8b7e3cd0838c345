"""The devices that a plan is for: `8xh100-80gb`, their memory, and how XLA's GPU compiler is told of them.

Imports no jax: the launcher asks it what this machine has.
"""

import re
from dataclasses import dataclass

from hvd import accelerators
from hvd.accelerators import Accelerator
from hvd.errors import UserError

_GIB = 1 << 30

# What lies beside JAX's pool on a device, by experience: CUDA's context and the loaded kernels; handles and workspaces
# of cuBLAS and cuDNN; NCCL's buffers where several devices talk. `--reserve` overrides the sum.
CONTEXT = _GIB // 2
LIBRARIES = _GIB // 4
NCCL = _GIB // 2

# compute capability -> shared memory of a multiprocessor and of a block that opts in (bytes), threads of a
# multiprocessor, float32 units of one; from the tables of CUDA's programming guide.
_CAPABILITIES: dict[tuple[int, int], tuple[int, int, int, int]] = {
    (8, 0): (167_936, 166_912, 2048, 64),
    (8, 6): (102_400, 101_376, 1536, 128),
    (8, 9): (102_400, 101_376, 1536, 128),
    (9, 0): (233_472, 232_448, 2048, 128),
    (10, 0): (233_472, 232_448, 2048, 128),
}


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines with `per_node` devices of one kind each."""

    name: str
    per_node: int
    nodes: int
    accelerator: Accelerator

    @property
    def count(self) -> int:
        return self.per_node * self.nodes

    def __str__(self) -> str:
        each = f"{self.per_node} x {self.name}"
        return each if self.nodes == 1 else f"{self.nodes} nodes of {each}"

    def limit(self, fraction: float, reserve: int | None = None) -> int:
        """Bytes of a device that a step may fill.

        JAX's pool has `fraction` of what is free after the context; `reserve` bytes (default: CONTEXT, LIBRARIES and,
        between several devices, NCCL) must stay outside it.
        """
        if reserve is None:
            reserve = CONTEXT + LIBRARIES + (NCCL if self.count > 1 else 0)
        usable = self.accelerator.usable
        return max(0, min(int(fraction * (usable - CONTEXT)), usable - reserve))


def parse(text: str, nodes: int = 1) -> Cluster:
    """`8xh100-80gb` (8 on each of `nodes` nodes), `h100-80gb` for one.

    Raises:
        UserError: the form is another, or the device is unknown (the nearest names are offered).
    """
    match = re.fullmatch(r"(?:(\d+)\s*[x*])?\s*([a-z][\w.-]*)", text.strip().lower())
    if match is None:
        raise UserError(f"--devices {text!r} is not of the form 8xh100-80gb (devices of a node x their name)")
    count = int(match[1] or 1)
    if count < 1:
        raise UserError(f"--devices {text!r}: at least one device is needed")
    if nodes < 1:
        raise UserError(f"--nodes {nodes} must be at least 1")
    name = _whole_name(match[2])
    return Cluster(name, count, nodes, accelerators.get(name))


def name_of(device_kind: str) -> str | None:
    """The table's name of what the driver or jax calls a device ("NVIDIA H100 80GB HBM3"); None when unknown."""
    found = accelerators.of_kind(device_kind)
    return next((name for name, known in accelerators.ACCELERATORS.items() if known is found), None)


def target_config(accelerator: Accelerator, device: str) -> str:
    """The device as a GpuTargetConfigProto in text form, with which XLA compiles for it where there is none."""
    shared, opt_in, threads, fpus = _CAPABILITIES[accelerator.capability]
    major, minor = accelerator.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {opt_in}
  threads_per_core_limit: {threads}
  core_count: {accelerator.cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(accelerator.bandwidth)}
  l2_cache_size: {accelerator.l2}
  clock_rate_ghz: {accelerator.clock}
  device_memory_size: {accelerator.usable}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
device_description_str: "{device}"
"""


def _whole_name(name: str) -> str:
    """`h100` where only one device begins so."""
    if name in accelerators.ACCELERATORS:
        return name
    found = [known for known in accelerators.ACCELERATORS if known.startswith(name + "-")]
    return found[0] if len(found) == 1 else name
