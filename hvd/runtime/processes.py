"""Which processes make up a run, told by the environment: HVD_COORDINATOR and its companions, or what srun sets.

Imports no jax: signal handlers and the command line ask it too.
"""

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from hvd.errors import UserError

ENVIRONMENT = ("HVD_COORDINATOR", "HVD_NUM_PROCESSES", "HVD_PROCESS_ID")

# A node may still pull its image or wait for its file system while the first one is ready. One that has failed ends
# the whole step at once (srun --kill-on-bad-exit, the local runner), so waiting long costs nothing.
COLD_START_SECONDS = 900
_PORTS = range(12_288, 32_768)  # below what Linux gives to outgoing connections (32768 and up)


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        coordinator: host:port of process 0.
        local_devices: of the devices that this process sees, the ones it takes; None = all.
    """

    coordinator: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None


def group(env: Mapping[str, str] = os.environ) -> Group | None:
    """The run's processes, or None for a process by itself.

    HVD_COORDINATOR (host:port), HVD_NUM_PROCESSES and HVD_PROCESS_ID must all be set, or none; they win over Slurm's.
    In a step of Slurm HVD_COORDINATOR alone (host, or host:port) is another name for the host of process 0.

    Raises:
        UserError: they are incomplete or make no sense.
    """
    given = [name for name in ENVIRONMENT if env.get(name)]
    if not given or (given == ["HVD_COORDINATOR"] and "SLURM_STEP_NUM_TASKS" in env):
        return _slurm(env)
    missing = [name for name in ENVIRONMENT if name not in given]
    if missing:
        raise UserError(
            f"{missing[0]} is not set, but {given[0]} is: a group of processes needs {', '.join(ENVIRONMENT)}"
        )
    try:
        count, index = int(env["HVD_NUM_PROCESSES"]), int(env["HVD_PROCESS_ID"])
    except ValueError as error:
        raise UserError(f"HVD_NUM_PROCESSES and HVD_PROCESS_ID must be whole numbers: {error}") from error
    if not 0 <= index < count:
        raise UserError(f"HVD_PROCESS_ID {index} is not below HVD_NUM_PROCESSES {count}")
    return Group(env["HVD_COORDINATOR"], count, index)


def bind_address(coordinator: str) -> str | None:
    """Where process 0 listens: at the coordinator's own address if it is one of this machine, so that a run of one
    machine is not seen from outside. None = everywhere, for a name that peers may resolve in another way than we do.
    """
    host, _, _ = coordinator.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.strip("[]")
    try:
        with socket.socket(socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET) as trial:
            trial.bind((host, 0))
    except (ValueError, OSError):
        return None
    return coordinator


def several(env: Mapping[str, str] = os.environ) -> bool:
    """Has the run more than one process? Never raises: a signal handler asks."""
    return (env.get("HVD_NUM_PROCESSES") or env.get("SLURM_STEP_NUM_TASKS", "1")) != "1"


def rank(env: Mapping[str, str] = os.environ) -> int:
    """Number of this process in its run; never raises."""
    value = env.get("HVD_PROCESS_ID") or (env.get("SLURM_PROCID") if several(env) else None) or "0"
    return int(value) if value.isdigit() else 0


def _slurm(env: Mapping[str, str]) -> Group | None:
    """The tasks of a job step, by srun's variables. A batch script itself has none of a step's."""
    count = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if count == 1 or "SLURM_STEP_NODELIST" not in env:
        return None
    # The batch script has looked for a free one. Without it, one of its own for each step: they follow one another
    # quickly, jobs share nodes, and an attempt that found its port taken must not find it so again
    step, restarts = (int(env.get(name, "0")) for name in ("SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    number = int(env["SLURM_JOB_ID"]) * 31 + step + 7919 * restarts
    port = int(env.get("HVD_COORDINATOR_PORT", "0")) or _PORTS[number % len(_PORTS)]
    alone = env.get("SLURM_STEP_NUM_NODES") == "1"
    host = env.get("HVD_COORDINATOR") or ("127.0.0.1" if alone else first_host(env["SLURM_STEP_NODELIST"]))
    return Group(
        host if re.search(r":\d+$", host) else f"{host}:{port}",
        count,
        int(env["SLURM_PROCID"]),
        _share(env.get("CUDA_VISIBLE_DEVICES", ""), tasks_here(env), int(env.get("SLURM_LOCALID", "0"))),
    )


def first_host(nodelist: str) -> str:
    """First name of Slurm's list of hosts: `gpu[003-007,12],cpu1` -> gpu003."""
    found = re.match(r"([^\[,]+)(?:\[([^\],\-]+)[^\]]*\]([^,]*))?", nodelist)
    if not found:
        raise UserError(f"SLURM_STEP_NODELIST {nodelist!r} names no host")
    prefix, number, suffix = found.groups()
    return prefix + (number or "") + (suffix or "")


def tasks_here(env: Mapping[str, str]) -> int:
    """Tasks of the step on this node, of SLURM_STEP_TASKS_PER_NODE: `2(x3),1` are 2, 2, 2 and 1."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found:
            counts += [int(found.group(1))] * int(found.group(2) or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else 1


def _share(visible: str, tasks: int, local: int) -> tuple[int, ...] | None:
    """Of the node's visible GPUs those of task `local`; None where Slurm has divided them, or one task takes all."""
    gpus = [name for name in visible.split(",") if name]
    if tasks == 1 or len(gpus) <= 1:
        return None
    if len(gpus) % tasks:
        raise UserError(f"{len(gpus)} GPUs of a node cannot be divided among its {tasks} tasks")
    each = len(gpus) // tasks
    return tuple(range(local * each, (local + 1) * each))


# What gloo, NCCL and JAX's coordination service say when another process has gone
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|heartbeat|coordination ?service|barrier timed out|socket closed|"
    r"failed to connect|peer (was )?lost",
    re.IGNORECASE,
)


def lost_companion(error: BaseException) -> str | None:
    """One line if the error is what a process sees when another one of its run has gone, else None."""
    if not several() or not isinstance(error, RuntimeError) or not _LOST.search(str(error)):
        return None
    first = str(error).strip().splitlines()[0][:200]
    return f"another process of this run has gone ({type(error).__name__}: {first})"
