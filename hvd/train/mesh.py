"""Processes, devices, and where every array lies.

A run is one program on all its processes. The mesh has two axes: "data" (batches are split over it) and "fsdp"
(batches are split over it too, and large parameters as well). Devices are laid out process by process, so that an fsdp
group stays inside a node wherever it fits, and a process's rows of a batch are one contiguous slice.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from hvd.configs import Experiment
from hvd.errors import UserError
from hvd.train import preemption

ENVIRONMENT = ("HVD_COORDINATOR", "HVD_NUM_PROCESSES", "HVD_PROCESS_ID")

# The rule for parameters (and everything shaped like them), first match counts: (dims at least, bytes at least, place).
# "largest": split over fsdp along the largest axis that it divides, of equal ones the later; "copy": on every device.
PARAMETER_RULES = (
    (2, 4 << 20, "largest"),
    (0, 0, "copy"),
)


def initialize() -> None:
    """Join the other processes, if the environment names any, before the first use of a device. May be called again.

    HVD_COORDINATOR (host:port), HVD_NUM_PROCESSES and HVD_PROCESS_ID must all be set, or none.
    """
    given = [name for name in ENVIRONMENT if os.environ.get(name)]
    if not given or jax.distributed.is_initialized():
        return
    missing = [name for name in ENVIRONMENT if name not in given]
    if missing:
        raise UserError(
            f"{missing[0]} is not set, but {given[0]} is: a group of processes needs {', '.join(ENVIRONMENT)}"
        )
    try:
        count, index = int(os.environ["HVD_NUM_PROCESSES"]), int(os.environ["HVD_PROCESS_ID"])
    except ValueError as error:
        raise UserError(f"HVD_NUM_PROCESSES and HVD_PROCESS_ID must be whole numbers: {error}") from error
    if not 0 <= index < count:
        raise UserError(f"HVD_PROCESS_ID {index} is not below HVD_NUM_PROCESSES {count}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax's own preemption service would take SIGTERM away from us
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(os.environ["HVD_COORDINATOR"], count, index, cluster_detection_method="deactivate")


def use_compilation_cache(runs_dir: str) -> None:
    """Keep compiled programs in $JAX_COMPILATION_CACHE_DIR, else <runs_dir>/.jax_cache: a restart compiles nothing."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.join(runs_dir, ".jax_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@dataclasses.dataclass(frozen=True)
class Devices:
    """The mesh of a run and how arrays are placed on it."""

    mesh: Mesh | AbstractMesh  # abstract: where arrays would lie, without the devices

    @property
    def count(self) -> int:
        return self.mesh.size

    @property
    def is_main(self) -> bool:
        """True on the one process that writes the run's small files."""
        return jax.process_index() == 0

    @functools.cached_property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @functools.cached_property
    def batch(self) -> NamedSharding:
        """Rows (the first axis) over all devices."""
        return NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))

    def parameter(self, shape: tuple[int, ...], dtype: Any) -> NamedSharding:
        """Where an array of this shape lies, by PARAMETER_RULES."""
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        place = next(place for dims, least, place in PARAMETER_RULES if len(shape) >= dims and size >= least)
        parts = self.mesh.shape["fsdp"]
        divisible = [axis for axis, length in enumerate(shape) if length % parts == 0]
        if place == "copy" or parts == 1 or not divisible:
            return self.replicated
        axis = max(divisible, key=lambda a: (shape[a], a))
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, "fsdp"))

    def parameters(self, tree: Any) -> Any:
        """`parameter` for each array (or its shape) of a tree; also fits optimiser states and averages."""
        return jax.tree.map(lambda x: self.parameter(x.shape, x.dtype), tree)

    def place_batch(self, batch: Any) -> Any:
        """This process's rows (numpy, first axis) as global arrays over all devices. Safe in a loader's thread."""
        if jax.process_count() == 1:
            return jax.device_put(batch, self.batch)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.batch, x), batch)

    def check_batch(self, rows: int, field: str) -> None:
        """UserError unless `rows` of a global batch (config field `field`) split evenly over all devices."""
        if rows <= 0 or rows % self.count:
            raise UserError(f"{field} {rows} is not a multiple of the {self.count} devices: choose a multiple")

    @functools.cached_property
    def flags(self) -> tuple[Int[Array, "d"], Int[Array, "d"]]:
        """One int32 per device, all 0 or all 1 on this process: what a process says about having to stop."""
        local = len(self.batch.addressable_devices)
        zero, one = (self.place_batch(np.full((local,), value, np.int32)) for value in (0, 1))
        return zero, one

    def flag(self) -> Int[Array, "d"]:
        """This process's answer now, to be given to a step that returns the maximum over all."""
        return self.flags[1 if preemption.requested() else 0]

    def poll(self, where: str) -> None:
        """Outside the step loop: raise `Stopped` if any process was asked to stop. All processes call it together."""
        if jax.process_count() == 1:
            stop = preemption.requested() is not None
        else:
            maximum = jax.jit(jnp.max, out_shardings=self.replicated)
            stop = bool(jax.device_get(maximum(self.flag())))
        if stop:
            preemption.raise_stopped(where)

    def from_main(self, array: np.ndarray) -> np.ndarray:
        """The main process's array, on every process; all give one of the same shape."""
        if jax.process_count() == 1:
            return array
        return np.asarray(multihost_utils.broadcast_one_to_all(array))

    def barrier(self, name: str) -> None:
        """Wait for all processes."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(name)


def start(cfg: Experiment, *, fsdp: int | None = None) -> Devices:
    """Processes joined, compilation cache set, mesh of all devices made.

    Raises:
        UserError: the devices cannot be split into groups of `fsdp_devices`.
    """
    initialize()
    use_compilation_cache(cfg.runs_dir)
    return make_devices(cfg.fsdp_devices if fsdp is None else fsdp)


def make_devices(fsdp: int, devices: Sequence[Any] | None = None) -> Devices:
    """The mesh (data, fsdp) of `devices`, all there are unless given."""
    ordered = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    if fsdp < 1 or len(ordered) % fsdp:
        raise UserError(f"fsdp_devices {fsdp} does not divide the {len(ordered)} devices: choose a divisor")
    shape = (len(ordered) // fsdp, fsdp)
    return Devices(Mesh(np.array(ordered).reshape(shape), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2))
