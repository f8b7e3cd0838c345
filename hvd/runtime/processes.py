"""Which processes make up a run, told by the environment: HVD_COORDINATOR and companions, or what srun or mpirun sets.

Imports no jax: signal handlers and the command line ask it too.
"""

import ipaddress
import os
import re
import socket
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hvd.errors import UserError

ENVIRONMENT = ("HVD_COORDINATOR", "HVD_NUM_PROCESSES", "HVD_PROCESS_ID")
# What else may say the same, in this order: jax's own variables (Kubeflow sets them), mpirun of OpenMPI, PMIx, PMI
_COORDINATOR = (ENVIRONMENT[0], "JAX_COORDINATOR_ADDRESS")
_COUNT = (ENVIRONMENT[1], "JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_INDEX = (ENVIRONMENT[2], "JAX_PROCESS_ID", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
# Beside two of these: how many processes a host has, and which of them this one is
_ON_A_HOST = {
    "OMPI_COMM_WORLD_SIZE": ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "PMI_SIZE": ("MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
}
_JOBS = ("PMIX_NAMESPACE", "PMI_JOBID", "OMPI_MCA_orte_ess_jobid")  # the same for all processes of a run
PORT = 8476  # of process 0, where nobody says another

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

    Each of the three (coordinator as host:port, count, index) is HVD_COORDINATOR, HVD_NUM_PROCESSES or HVD_PROCESS_ID,
    else JAX's variable, else that of OpenMPI's mpirun, else, outside of Slurm, of what speaks PMIx or PMI; if there is
    none, Slurm's. In a step of Slurm a coordinator alone is another name for the host of process 0.

    Raises:
        UserError: they are incomplete or make no sense.
    """
    names = [_named(env, role) for role in (_COORDINATOR, _COUNT, _INDEX)]
    coordinator, number, which = names
    given = [name for name in names if name]
    if not given or (given == [coordinator] and _in_slurm(env)):
        return _slurm(env)
    mpi = which in _INDEX[2:] and number not in _COUNT[:2]
    if mpi and not coordinator and (not number or env[number] == "1"):
        return None  # mpirun -n 1, or a rank of nobody knows how many
    missing = [ours for ours, name in zip(ENVIRONMENT, names, strict=True) if not name]
    if mpi and missing == [ENVIRONMENT[0]]:
        if env.get(_ON_A_HOST[number][0]) != env[number]:
            raise UserError(
                f"{ENVIRONMENT[0]} is not set, and the {env[number]} processes of {number} are on several hosts: set "
                f"it to host:port of process 0, as in mpirun -x {ENVIRONMENT[0]}=node1:{PORT}"
            )
        job = next((env[name] for name in _JOBS if env.get(name)), "")
        address = f"127.0.0.1:{_PORTS[zlib.crc32(job.encode()) % len(_PORTS)]}"
    elif missing:
        raise UserError(
            f"{missing[0]} is not set, but {given[0]} is: a group of processes needs {', '.join(ENVIRONMENT)}"
        )
    else:
        address = env[coordinator]
    try:
        count, index = int(env[number]), int(env[which])
    except ValueError as error:
        raise UserError(f"{number} and {which} must be whole numbers: {error}") from error
    if not 0 <= index < count:
        raise UserError(f"{which} {index} is not below {number} {count}")
    port = env.get("HVD_COORDINATOR_PORT") or PORT
    address = address if re.search(r":\d+$", address) else f"{address}:{port}"
    return Group(address, count, index, _local(env, number) if which in _INDEX[2:] else None)


def _named(env: Mapping[str, str], role: Sequence[str]) -> str:
    """Name of the variable that counts for the role; "" for none. Slurm's own tasks are told by PMI(x) too."""
    slurm = _in_slurm(env)
    return next((name for name in role if env.get(name) and not (slurm and name.startswith("PMI"))), "")


def _in_slurm(env: Mapping[str, str]) -> bool:
    return "SLURM_STEP_NUM_TASKS" in env


def _local(env: Mapping[str, str], number: str) -> tuple[int, ...] | None:
    """Of the host's GPUs those of this process; None where it is the only one there."""
    here, which = (env.get(name, "") for name in _ON_A_HOST.get(number, ("", "")))
    if not here.isdigit() or not which.isdigit() or here == "1":
        return None
    visible = env.get("CUDA_VISIBLE_DEVICES")
    return (int(which),) if visible is None else _share(visible, int(here), int(which))


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
    name = _named(env, _COUNT)
    return (env[name] if name else env.get("SLURM_STEP_NUM_TASKS", "1")) != "1"


def rank(env: Mapping[str, str] = os.environ) -> int:
    """Number of this process in its run; never raises."""
    name = _named(env, _INDEX)
    name = name if name in _INDEX[:2] or several(env) else ""
    value = env[name] if name else (env.get("SLURM_PROCID") if several(env) else None) or "0"
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
    host = next((env[name] for name in _COORDINATOR if env.get(name)), "") or (
        "127.0.0.1" if alone else first_host(env["SLURM_STEP_NODELIST"])
    )
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
