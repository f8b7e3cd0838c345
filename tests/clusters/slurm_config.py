"""The files that a Slurm cluster of one machine is made of: slurm.conf and its neighbours, a node's first process."""

import contextlib
import os
import random
import socket
import stat
import time
from dataclasses import dataclass
from pathlib import Path

# Debian 12. On other machines tests skip: nothing is ever installed by a test.
PACKAGES = (
    "slurmctld",
    "slurmd",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "munge",
    "slurmdbd",
    "mariadb-server",
    "util-linux",
    "procps",
    "iproute2",
)

# Ports of a cluster, from its base port on: controller, accounting daemon, then one for each node.
CONTROLLER, ACCOUNTING, FIRST_NODE = 0, 1, 2

# PID 1 of a node: reaps orphans and lives until the node is powered off. A job sees this name and these hosts.
NODE_INIT = """\
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
slurmd -f "$2/slurm.conf" -N "$1"
trap : TERM INT HUP
while :; do sleep 86400 & wait $! || :; done
"""


@dataclass(frozen=True)
class Layout:
    """What a cluster is and where its files lie."""

    etc: str  # configuration; may be a long path
    log: str
    run: str  # sockets and spool: a short path, since a Unix socket's has about 100 characters
    base_port: int
    nodes: int
    cpus: int
    memory_mb: int
    gpus: int
    accounting: bool
    node_timeout: int
    kill_wait: int
    grace: int
    preempt_signal: bool
    min_job_age: int

    @property
    def names(self) -> list[str]:
        return [f"node{i + 1}" for i in range(self.nodes)]


def free_ports(count: int) -> int:
    """First of `count` consecutive TCP ports that nobody listens on, outside the kernel's range for clients."""
    for _ in range(200):
        base = random.SystemRandom().randrange(12000, 32000)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(base, base + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return base
    raise RuntimeError(f"no {count} consecutive free TCP ports on this machine")


def write(layout: Layout) -> None:
    """Everything the daemons read. `etc`, `log` and `run` are made."""
    etc, run = Path(layout.etc), Path(layout.run)
    for folder in (etc, Path(layout.log), run / "state", run / "spool", run / "gpus"):
        folder.mkdir(parents=True, exist_ok=True)
    for i in range(layout.gpus):
        _device(run / "gpus" / f"nvidia{i}")
    key = run / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    (etc / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in ["localhost", _hostname(), *layout.names]))
    (etc / "node-init").write_text(NODE_INIT)
    (etc / "slurm.conf").write_text(slurm_conf(layout))
    gres = f"NodeName=node[1-{layout.nodes}] Name=gpu File={run}/gpus/nvidia[0-{layout.gpus - 1}]\n"
    (etc / "gres.conf").write_text("AutoDetect=off\n" + (gres if layout.gpus else ""))
    if layout.accounting:
        conf = etc / "slurmdbd.conf"
        conf.touch(mode=0o600)  # slurmdbd refuses one that others can read
        conf.write_text(slurmdbd_conf(layout))


def slurm_conf(layout: Layout) -> str:
    run, port = layout.run, layout.base_port
    # One address for all and a port each. Addresses of their own (127.0.1.N) fail: srun's connections leave from
    # 127.0.0.1 and slurmd answers there, while srun listens on 127.0.1.N only.
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port + FIRST_NODE + i} CPUs={layout.cpus} "
        f"RealMemory={layout.memory_mb} {f'Gres=gpu:{layout.gpus} ' if layout.gpus else ''}State=UNKNOWN"
        for i, name in enumerate(layout.names)
    )
    accounting = f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port + ACCOUNTING}
AccountingStoragePass={run}/munge.socket
AccountingStorageTRES=gres/gpu
"""
    return f"""\
ClusterName=hvdtest
SlurmctldHost={_hostname()}(127.0.0.1)
SlurmctldPort={port + CONTROLLER}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits until it may start again (Slurm's default: 120 s)
AuthInfo=socket={run}/munge.socket,cred_expire=5
{_loopback_only()}
StateSaveLocation={run}/state
SlurmdSpoolDir={run}/spool/%n
SlurmctldPidFile={run}/slurmctld.pid
SlurmdPidFile={run}/slurmd.%n.pid
SlurmctldLogFile={layout.log}/slurmctld.log
SlurmdLogFile={layout.log}/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
MpiDefault=none
GresTypes=gpu
{accounting if layout.accounting else ""}
# no cgroups: they may be read-only where tests run
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
# nodes may be larger than the machine
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU={layout.memory_mb // layout.cpus}
# everything at once
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
# whether a preempted job gets the signal it asked for (--signal) at once
{"SlurmctldParameters=preempt_send_user_signal" if layout.preempt_signal else ""}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# a node that has rebooted may work again
ReturnToService=2
# a node that is off is DOWN after this time and two or three unanswered messages
SlurmdTimeout={layout.node_timeout}
MessageTimeout=5
SlurmctldTimeout=10
BatchStartTimeout=10
KillWait={layout.kill_wait}
MinJobAge={layout.min_job_age}
# job ids of different clusters differ: files are named after them, and JAX takes a port from them
FirstJobId={int(time.time()) % 60_000_000 + 1}

{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=10 PreemptMode=OFF
PartitionName=scavenge Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE \
GraceTime={layout.grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=10 PriorityTier=100 PreemptMode=OFF
"""


def slurmdbd_conf(layout: Layout) -> str:
    return f"""\
AuthType=auth/munge
AuthInfo=socket={layout.run}/munge.socket
{_loopback_only()}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={layout.base_port + ACCOUNTING}
SlurmUser=root
PidFile={layout.run}/slurmdbd.pid
LogFile={layout.log}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
CommitDelay=0
"""


def _hostname() -> str:
    """What slurmctld takes this machine's name to be."""
    return socket.gethostname().split(".")[0]


def _loopback_only() -> str:
    """The option that binds daemons and clients to their host name's address: right only where that is loopback."""
    try:
        loopback = socket.gethostbyname(_hostname()).startswith("127.")
    except OSError:
        loopback = False
    return "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if loopback else ""


def _device(path: Path) -> None:
    """Something with a GPU's name. Slurm wants the file, nothing opens it."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        path.touch()
