"""Processes, devices, and where every array lies.

A run is one program on all its processes. The mesh has two axes: "data" (batches are split over it) and "fsdp"
(batches are split over it too, and large parameters as well). Devices are laid out node by node, in a node process by
process, whatever numbers the processes have: an fsdp group stays inside a node wherever it fits, gradients alone are
summed across nodes, and a process's rows of a batch are one contiguous slice.
"""

import collections
import dataclasses
import functools
import hashlib
import os
import socket
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from hvd.accelerators import MEMORY_FRACTION
from hvd.configs import Experiment
from hvd.errors import UserError
from hvd.runtime import preemption, processes
from hvd.train import compilation, parameter_rules, run_dir

MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # share of a GPU that jax may take

_DIGEST, _RUNNING = 16, 240  # bytes by which a process tells its node, and what it runs
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def initialize(patience: int = processes.COLD_START_SECONDS) -> None:
    """Join the other processes, if the environment names any (hvd.runtime.processes), before the first use of a device.

    They must meet within `patience` seconds. May be called again. A run that was promised GPUs (HVD_EXPECT_GPUS, set by
    batch scripts) and finds none is refused.
    """
    if not any(os.environ.get(name) for name in MEMORY_VARIABLES):
        os.environ[MEMORY_VARIABLES[0]] = str(MEMORY_FRACTION)  # what `hvd plan` counts on; jax itself takes 0.75
    if jax.distributed.is_initialized() or (found := processes.group()) is None:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax's own preemption service would take SIGTERM away from us
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        found.coordinator,
        found.count,
        found.index,
        local_device_ids=found.local_devices,
        coordinator_bind_address=processes.bind_address(found.coordinator),
        cluster_detection_method="deactivate",
        initialization_timeout=patience,
        shutdown_timeout_seconds=60,
    )


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
        return NamedSharding(self.mesh, parameter_rules.partition(shape, dtype, self.mesh.shape["fsdp"]))

    def parameters(self, tree: Any) -> Any:
        """`parameter` for each array (or its shape) of a tree; also fits optimiser states and averages."""
        return jax.tree.map(lambda x: self.parameter(x.shape, x.dtype), tree)

    def place_batch(self, batch: Any) -> Any:
        """This process's rows (numpy, first axis) as global arrays over all devices. Safe in a loader's thread."""
        if jax.process_count() == 1:
            return jax.device_put(batch, self.batch)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.batch, x), batch)

    def ambient[**P, T](self, function: Callable[P, T]) -> Callable[P, T]:
        """`function`, which under jit sees this mesh as the ambient one (hvd.models.sharding follows it)."""
        abstract = self.mesh if isinstance(self.mesh, AbstractMesh) else self.mesh.abstract_mesh

        @functools.wraps(function)
        def on_mesh(*args: P.args, **kwargs: P.kwargs) -> T:
            with jax.sharding.use_abstract_mesh(abstract):
                return function(*args, **kwargs)

        return on_mesh

    def check_batch(self, rows: int, parts: int, stage: str) -> None:
        """UserError unless the stage's `rows` of a global batch split evenly over micro-batches and all devices."""
        if rows <= 0 or rows % (self.count * parts):
            micro = f" in {parts} micro-batches (grad_accum_steps)" if parts > 1 else ""
            raise UserError(
                f"{stage}.batch_size {rows} cannot be divided over the {self.count} devices{micro}: choose a multiple "
                f"of {self.count * parts}"
            )

    @functools.cached_property
    def place_of_process(self) -> tuple[int, int]:
        """(i, n): this process loads the i-th of n equal slices of each batch."""
        assert isinstance(self.mesh, Mesh), "an abstract mesh has no processes"
        return place_in(self.mesh.devices, jax.process_index())

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
        UserError: the devices cannot be split into groups of `fsdp_devices`, or the processes have not equally many.
    """
    if cfg.deterministic:
        be_deterministic()
    initialize()
    check_gpus()
    compilation.use_cache()
    return make_devices(cfg.fsdp_devices if fsdp is None else fsdp, nodes=_nodes())


def check_gpus() -> None:
    """UserError where the job was given GPUs and jax has found none: it would train on the CPU without a word."""
    if os.environ.get("HVD_EXPECT_GPUS", "0") not in ("", "0") and jax.default_backend() != "gpu":
        raise UserError(
            f"the job has GPUs, but jax finds none (its platform is {jax.default_backend()!r}): install hvd[cuda12] "
            "and look at nvidia-smi on the node, or ask for no GPUs (--accelerator cpu)"
        )


def be_deterministic() -> None:
    """Bit-equal results of equal runs on a GPU: sums in a fixed order, kernels not chosen by timing them.

    Has to come before the first use of a device. A CPU needs none of it.
    """
    if jax.config.jax_platforms != "cpu" and _DETERMINISTIC not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} {_DETERMINISTIC}".strip()


def make_devices(
    fsdp: int, devices: Sequence[Any] | None = None, *, nodes: Mapping[int, Hashable] | None = None
) -> Devices:
    """The mesh (data, fsdp) of `devices`, all there are unless given.

    Args:
        fsdp: devices of a group that shares one copy of the parameters; 0 = those of a node.
        nodes: the node that each process runs on; default: each is a node of its own.

    Raises:
        UserError: the devices cannot be split so.
    """
    ordered = arrange(jax.devices() if devices is None else devices, fsdp, nodes)
    return Devices(Mesh(ordered, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2))


def arrange(devices: Sequence[Any], fsdp: int, nodes: Mapping[int, Hashable] | None = None) -> np.ndarray:
    """`make_devices`, as an array [data, fsdp] of the devices."""
    groups = [list(group) for group in _by_node(devices, nodes).values()]
    ordered = [device for group in groups for device in group]
    _check_even(ordered)
    if fsdp == 0:
        fsdp = len(groups[0])
        if any(len(group) != fsdp for group in groups):
            sizes = ", ".join(str(len(group)) for group in groups)
            raise UserError(f"fsdp_devices 0 needs nodes of equally many devices, these have {sizes}: set a number")
    if fsdp < 1 or len(ordered) % fsdp:
        raise UserError(f"fsdp_devices {fsdp} does not divide the {len(ordered)} devices: choose a divisor")
    if any(len(group) % fsdp for group in groups) and jax.process_index() == 0:
        print(
            f"fsdp_devices {fsdp}: groups reach across nodes of {len(groups[0])} devices, so every layer's parameters "
            "go through the network; 0 keeps each group in a node",
            flush=True,
        )
    return np.array(ordered, dtype=object).reshape(-1, fsdp)


def place_in(arranged: np.ndarray, process: int) -> tuple[int, int]:
    """(i, n): the process's place among the n of an array of devices."""
    order = list(dict.fromkeys(device.process_index for device in arranged.flat))
    return order.index(process), len(order)


def _by_node(devices: Sequence[Any], nodes: Mapping[int, Hashable] | None) -> dict[Hashable, list[Any]]:
    """Node -> its devices, process by process; nodes in the order of their first process."""
    found: dict[Hashable, list[Any]] = {}
    for device in sorted(devices, key=lambda d: (d.process_index, d.id)):
        node = device.process_index if nodes is None else nodes[device.process_index]
        found.setdefault(node, []).append(device)
    return found


def _check_even(devices: Sequence[Any]) -> None:
    counts = collections.Counter(d.process_index for d in devices)
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} on process {index}" for index, count in sorted(counts.items()))
        raise UserError(f"all processes need equally many devices, there are {listed}")


def _nodes() -> dict[int, Hashable]:
    """The node of each process, as all of them tell. UserError where they do not run the same code."""
    if jax.process_count() == 1:
        return {0: 0}
    mine = _node_digest() + run_dir.running().encode()[:_RUNNING].ljust(_RUNNING)
    told = [row.tobytes() for row in np.asarray(multihost_utils.process_allgather(np.frombuffer(mine, np.uint8)))]
    code = [row[_DIGEST:].decode(errors="replace").strip() for row in told]
    for index, other in enumerate(code):
        if other != code[0]:
            raise UserError(
                f"process {index} runs {other}, process 0 runs {code[0]}: bring all nodes to one version (one "
                "checkout, or one image, named by its digest)"
            )
    return {index: row[:_DIGEST] for index, row in enumerate(told)}


def _node_digest() -> bytes:
    """16 bytes that are the same in all processes of a machine, containers of it included, and on no other machine."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        name = socket.gethostname()
    return hashlib.sha256(name.encode()).digest()[:_DIGEST]
