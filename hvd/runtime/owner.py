"""One job at a time works on a run directory: owner.json says which.

No file locks (NFS may not have them), no file times: the file is put there by linking, which fails if there is one
already (where there are no links, by exclusive creation). Whether the owner still lives is asked of its scheduler by
`job_alive`, which the command line hands in, or of the process table that both share. An owner without a scheduler that
could be asked (a process in a container or on another machine, a pod of Kubernetes) shows a sign of life
(hvd.runtime.heartbeat).
"""

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from etils import epath

from hvd import documents
from hvd.errors import Lost, UserError
from hvd.files import is_local, temporary_path, write_atomic
from hvd.runtime import heartbeat
from hvd.runtime.heartbeat import OWNER

KUBERNETES = "kubernetes"
_beats: dict[str, heartbeat.Heartbeat] = {}


def _unknown(scheduler: str, job: str) -> bool | None:
    return None


# (scheduler, job id) -> has the job not ended? None where it cannot be asked. hvd.cli hands in hvd.clusters.base.alive.
job_alive: Callable[[str, str], bool | None] = _unknown


@dataclass(frozen=True)
class Owner:
    """Who works on a run directory. A job that was requeued is the same owner, on whatever node."""

    job: str  # the scheduler's id, or the Kubernetes Job's name and uid; "" where no scheduler runs the process
    cluster: str  # the scheduler's own name of the cluster, or KUBERNETES
    host: str
    machine: str  # boot id and process namespace: process ids mean something within these only
    pid: int
    started: str  # of the process, in the kernel's clock ticks: process ids come again
    user: str
    pod: str = ""  # uid of a Kubernetes pod
    scheduler: str = "slurm"  # of the job, a name of hvd.clusters; files of older versions are Slurm's or have a pod
    beats: bool = False  # it shows a sign of life; processes of older versions do not

    @property
    def sign(self) -> str:
        """Whose sign of life it is."""
        return self.pod or f"{self.machine} {self.pid} {self.started}"

    @property
    def name(self) -> str:
        if self.pod:
            return f"pod {self.host} of Job {self.job.partition('/')[0]}"
        return (
            f"{self.scheduler.capitalize()} job {self.job} on {self.host}"
            if self.job
            else f"process {self.pid} on {self.host}"
        )


def myself(env: Mapping[str, str] = os.environ) -> Owner:
    """This process; HVD_SCHEDULER and HVD_JOB_ID tell the job where neither Slurm nor Kubernetes runs it."""
    pod, job = env.get("HVD_POD_UID", ""), env.get("HVD_JOB_ID") or env.get("SLURM_JOB_ID", "")
    return Owner(
        job=f"{env.get('HVD_JOB_NAME', '')}/{env.get('HVD_JOB_UID', '')}" if pod else job,
        cluster=KUBERNETES if pod else env.get("SLURM_CLUSTER_NAME", ""),
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()) or "",
        user=env.get("USER", ""),
        pod=pod,
        scheduler=KUBERNETES if pod else env.get("HVD_SCHEDULER", "slurm"),
        beats=bool(pod) or not job,
    )


def claim(run_dir: os.PathLike | str) -> None:
    """Make this process's job the owner of the run directory; called by the run's main process.

    Raises:
        UserError: another job works on it.
        Lost: whether the other job still lives cannot be known.
    """
    path, me = epath.Path(run_dir) / OWNER, myself()
    if is_local(path):
        _claim_local(path, me, run_dir)
    else:
        _claim_remote(path, me)
    if me.beats and os.fspath(run_dir) not in _beats:
        _beats[os.fspath(run_dir)] = heartbeat.Heartbeat(run_dir, me.sign)


def _claim_local(path: epath.Path, me: Owner, run_dir: os.PathLike | str) -> None:
    target = Path(os.fspath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    mine = temporary_path(target)
    with mine.open("x") as file:
        file.write(json.dumps(asdict(me)) + "\n")
    try:
        while not _linked(mine, target):
            owner = _read(target)
            if owner is None:
                continue  # released this very moment
            _refuse_if_alive(owner, me, run_dir)
            _put_away(target, owner)
    finally:
        mine.unlink(missing_ok=True)


def release(run_dir: os.PathLike | str) -> None:
    """The run directory is free again; the claim of another owner is left alone."""
    if beat := _beats.pop(os.fspath(run_dir), None):
        beat.stop()
    path = epath.Path(run_dir) / OWNER
    owner = _read(path)
    if owner is not None and _same(owner, myself()):
        path.unlink(missing_ok=True)


def check(run_dir: os.PathLike | str) -> None:
    """Raise Lost where another job has taken the folder: this one stood still for so long that it was held for dead."""
    owner = _read(epath.Path(run_dir) / OWNER)
    if owner is not None and not _same(owner, myself()):
        raise Lost(f"{run_dir} was taken over by {owner.name} while this process stood still")


def _claim_remote(path: epath.Path, me: Owner) -> None:
    """An object store: without linking two claims of the same second may both succeed."""
    owner = _read(path)
    if owner is not None:
        _refuse_if_alive(owner, me, path.parent)
    write_atomic(path, json.dumps(asdict(me)).encode())


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileExistsError:
        # over NFS the answer to a link that succeeded may be lost, and the repeated call fails: look who it was
        return os.path.samefile(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        return _created(source, target)  # FUSE and exFAT have no links
    return True


def _created(source: Path, target: Path) -> bool:
    try:
        with target.open("x") as file:
            file.write(source.read_text())
    except FileExistsError:
        return False
    return True


def _put_away(target: Path, judged: Owner) -> None:
    """Remove the claim that was judged dead. If it is another one by now, it is put back."""
    aside = temporary_path(target)
    try:
        target.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != judged:
        _linked(aside, target)
    aside.unlink(missing_ok=True)


def _read(path: os.PathLike) -> Owner | None:
    try:
        return documents.read(path, Owner)
    except FileNotFoundError:
        return None
    except UserError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path} is damaged ({why}): if no job works on this run, delete it") from None


def _same(a: Owner, b: Owner) -> bool:
    if a.pod or b.pod:
        return a.pod == b.pod
    if a.job or b.job:
        return (a.scheduler, a.job, a.cluster) == (b.scheduler, b.job, b.cluster)
    return (a.machine, a.pid, a.started) == (b.machine, b.pid, b.started)


def _refuse_if_alive(owner: Owner, me: Owner, run_dir: os.PathLike | str) -> None:
    if _same(owner, me):
        return  # an earlier step or attempt of this job
    if owner.pod:
        alive = _pod_alive(owner, me, run_dir)
    elif owner.job:
        alive = _job_alive(owner, me)
    elif owner.machine == me.machine:
        alive = _started(owner.pid) == owner.started
    elif owner.beats:
        print(f"{run_dir}: watching whether {owner.name} still works on it, for a minute at most", flush=True)
        alive = heartbeat.lives(run_dir, owner.sign)
    elif owner.host == me.host and owner.machine.partition(" ")[0] != me.machine.partition(" ")[0]:
        alive = False  # the machine was started anew
    else:
        gone = f"if it is gone for good, delete {Path(run_dir) / OWNER}"
        raise Lost(f"{owner.name} was at work on {run_dir}, and from here nobody can see whether it still is; {gone}")
    if alive:
        by = f" of {owner.user}" if owner.user and owner.user != me.user else ""
        raise UserError(f"{run_dir} is being worked on by {owner.name}{by}: wait for it, or choose another --exp_name")


def _pod_alive(owner: Owner, me: Owner, run_dir: os.PathLike | str) -> bool:
    """Another pod. One of the same Job is about to end, since this one takes its place: it is waited for."""
    if owner.job != me.job:
        return heartbeat.lives(run_dir, owner.pod)
    print(f"{run_dir}: waiting until {owner.name} has saved and ended", flush=True)
    while heartbeat.lives(run_dir, owner.pod):
        time.sleep(1)
        if _read(epath.Path(run_dir) / OWNER) != owner:
            break
    return False


def _job_alive(owner: Owner, me: Owner) -> bool:
    if me.cluster and owner.cluster != me.cluster:
        return True  # another cluster's job; its ids mean nothing here
    alive = job_alive(owner.scheduler, owner.job)
    if alive is None:
        name = owner.scheduler.capitalize()
        raise Lost(f"{owner.name} was at work on this run, and {name} cannot be asked whether it still is")
    return alive


def _machine() -> str:
    """The same for processes that see the same process ids, and for no others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When the process started, in clock ticks since boot; None where there is none, or a dead one not yet reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
