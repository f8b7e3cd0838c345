"""A real Slurm cluster on one machine: slurmctld and a slurmd for each node, on request with slurmdbd and MariaDB.

Every node is a PID, UTS and mount namespace of its own: it has a name, sees only its own processes and can be powered
off. The network (loopback) and the file system are the machine's, so that any folder is shared storage.

    python -m tests.clusters.slurm_cluster install         # Debian's packages; tests never do that
    python -m tests.clusters.slurm_cluster up --gpus 8     # then: eval "$(python -m tests.clusters.slurm_cluster env)"
    python -m tests.clusters.slurm_cluster down            # also: status, kill-node NAME, start-node NAME
"""

import argparse
import atexit
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.clusters import slurm_config
from tests.clusters.daemons import NAMESPACES, Daemons, read, wait_until
from tests.clusters.slurm_config import PACKAGES

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged", "unshare", "hostname")
ACCOUNTING_PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "mariadb-admin")
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
DB_BYTES = 400 << 20
FINISHED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}
LOST = {"NODE_FAIL", "PREEMPTED"}  # final only for a job that may not be requeued
# Fields of `scontrol show job` that are the rest of their line: the user's text and paths may hold anything.
FREE_TEXT = ("Command", "WorkDir", "Comment", "AdminComment", "SystemComment", "StdErr", "StdIn", "StdOut")


def missing(accounting: bool = False) -> str:
    """'' where a cluster can be brought up, else one line for a skip that says what this machine lacks."""
    if os.geteuid() != 0:
        return "no Slurm here: namespaces and daemons need root"
    wanted = PROGRAMS + (ACCOUNTING_PROGRAMS if accounting else ())
    lacking = [name for name in wanted if not shutil.which(name, path=_environ()["PATH"])]
    if lacking:
        return f"no Slurm here: {', '.join(lacking)} not found (python -m tests.clusters.slurm_cluster install)"
    tried = subprocess.run([*NAMESPACES, "hostname", "node"], capture_output=True, text=True, timeout=20)
    return "" if tried.returncode == 0 else f"no Slurm here: {' '.join(tried.stderr.split())}"


def install() -> None:
    """Debian's packages, where any is missing."""
    status = ["dpkg-query", "-W", "-f", "${db:Status-Abbrev}"]
    have = [subprocess.run([*status, name], capture_output=True, text=True).stdout for name in PACKAGES]
    lacking = [name for name, state in zip(PACKAGES, have, strict=True) if not state.startswith("ii")]
    if lacking:
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], env=env, check=True)
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *lacking]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)


class SlurmCluster:
    """`root` gets configuration and logs; sockets and state lie in short temporary folders that `down` removes.

    Partitions: main (default), scavenge (preempted by both others: requeued after `grace` s), urgent (preempts).
    """

    def __init__(
        self,
        root: Path,
        *,
        nodes: int = 4,
        cpus: int = 4,
        memory_mb: int = 8000,
        gpus: int = 0,
        accounting: bool = False,
        node_timeout: int = 10,
        kill_wait: int = 5,
        grace: int = 20,
        preempt_signal: bool = True,
        min_job_age: int = 3600,
        base_port: int | None = None,
    ):
        self.root = Path(root).absolute()
        self.layout = slurm_config.Layout(
            etc=str(self.root / "etc"),
            log=str(self.root / "log"),
            run="",
            base_port=base_port or 0,
            nodes=nodes,
            cpus=cpus,
            memory_mb=memory_mb,
            gpus=gpus,
            accounting=accounting,
            node_timeout=node_timeout,
            kill_wait=kill_wait,
            grace=grace,
            preempt_signal=preempt_signal,
            min_job_age=min_job_age,
        )
        self._database = ""
        self._daemons = Daemons({})

    @classmethod
    def attach(cls, root: Path) -> "SlurmCluster":
        """The cluster that any process has brought up below `root`."""
        cluster = cls(root)
        saved = read(str(cluster.root / "cluster.json"))
        if saved:  # else nothing is up, and `down` has nothing to do
            saved = json.loads(saved)
            cluster.layout = slurm_config.Layout(**saved["layout"])
            cluster._database = saved["database"]
            cluster._daemons = Daemons(saved["pids"])
        return cluster

    def __enter__(self) -> "SlurmCluster":
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self, *, outlive: bool = False) -> None:
        """All nodes idle. Unless it may `outlive` this process, the cluster goes down with it, however that ends."""
        SlurmCluster.attach(self.root).down()
        shutil.rmtree(self.root / "log", ignore_errors=True)
        ports = slurm_config.FIRST_NODE + self.layout.nodes
        self.layout = dataclasses.replace(
            self.layout,
            run=tempfile.mkdtemp(prefix="slurm-", dir="/tmp"),
            base_port=self.layout.base_port or slurm_config.free_ports(ports),
        )
        os.chmod(self.layout.run, 0o755)  # munge wants its socket to be reachable
        atexit.register(self.down)
        try:
            slurm_config.write(self.layout)
            self._save()
            if not outlive:
                self._start_keeper()
            self._start("munged", ["munged", "--foreground", "--force", *self._munge_options()])
            wait_until(lambda: (Path(self.layout.run) / "munge.socket").exists(), 20, "munged")
            if self.layout.accounting:
                self._start_accounting()
            self._start("slurmctld", ["slurmctld", "-D", "-f", self.environment["SLURM_CONF"]])
            wait_until(lambda: self._listens(slurm_config.CONTROLLER), 20, "slurmctld")
            for name in self.layout.names:
                self.start_node(name)
            self.wait_idle(60)
        except BaseException as error:
            error.add_note(self._log_tails())
            self.down()
            raise
        if outlive:
            atexit.unregister(self.down)

    def down(self) -> None:
        """Nothing of it is left but configuration and logs; safe at any time and more than once."""
        atexit.unregister(self.down)
        # The keeper is last: it does the same when this process dies on the way.
        left = []
        for name in sorted(self._daemons.pids, key=lambda name: (name == "keeper", name)):
            try:
                self._daemons.kill(name)
            except TimeoutError:
                left.append(name)
        for folder in filter(None, (self._database, self.layout.run)):
            shutil.rmtree(folder, ignore_errors=True)
        if left:
            raise TimeoutError(f"not ended by SIGKILL: {', '.join(left)}; see `status`")
        (self.root / "cluster.json").unlink(missing_ok=True)

    @property
    def environment(self) -> dict[str, str]:
        """What a client (sbatch, squeue, ...) needs besides os.environ."""
        return {"SLURM_CONF": str(self.root / "etc" / "slurm.conf")}

    def run(self, *argv: str, check: bool = True, timeout: float = 60) -> str:
        """Standard output of a client command; a failure is a RuntimeError with what it said."""
        done = subprocess.run(argv, env=_environ(**self.environment), capture_output=True, text=True, timeout=timeout)
        if check and done.returncode:
            said = f"{done.stdout}{done.stderr}".strip()
            raise RuntimeError(f"{' '.join(argv)}: exit code {done.returncode}: {said}")
        return done.stdout

    def show(self, job_id: str | int) -> dict[str, str]:
        """`scontrol show job`: JobState, Reason, Restarts, NodeList, BatchHost, ExitCode, PreemptTime, ..."""
        return parse_job(self.run("scontrol", "show", "job", str(job_id)))

    def wait_state(self, job_id: str | int, *states: str, timeout: float = 120) -> dict[str, str]:
        """The job's fields once it is in one of the states; an AssertionError when it takes too long or never will."""
        end = time.monotonic() + timeout
        while True:
            job = self.show(job_id)
            if job["JobState"] in states:
                return job
            final = job["JobState"] in FINISHED or (job["JobState"] in LOST and job["Requeue"] == "0")
            if final or time.monotonic() > end:
                fields = ("JobState", "Reason", "Restarts", "NodeList", "ExitCode")
                now = ", ".join(f"{name}={job.get(name)}" for name in fields)
                waited = "which is final" if final else f"after {timeout:g} s"
                raise AssertionError(f"job {job_id}: expected {' or '.join(states)}, got {now}, {waited}")
            time.sleep(0.1)

    def wait_idle(self, timeout: float = 60) -> None:
        """All nodes idle. Slurm notices a node's end only after `node_timeout` s: until then that node counts too."""
        wait_until(self._all_idle, timeout, f"idle nodes; logs in {self.layout.log}")

    def kill_node(self, name: str) -> None:
        """Power off: every process of the node is gone on return, and none had a chance to do anything."""
        self._daemons.kill(self._known(name))
        self._save()

    def start_node(self, name: str) -> None:
        """Power on. The node is there once Slurm shows it as idle."""
        if self._daemons.alive(self._known(name)):
            raise RuntimeError(f"{name} is on")
        # In its next life a node has the same few process ids: slurmd must not take one for the slurmd of its last.
        (Path(self.layout.run) / f"slurmd.{name}.pid").unlink(missing_ok=True)
        (Path(self.layout.run) / "spool" / name).mkdir(exist_ok=True)
        self._start(name, [*NAMESPACES, "bash", f"{self.layout.etc}/node-init", name, self.layout.etc])

    def node_processes(self, name: str) -> list[tuple[int, str]]:
        """(pid on this machine, command line) of everything that runs in the node, daemons included."""
        return self._daemons.inside(self._known(name))

    def status(self) -> str:
        """One line for each daemon, and what Slurm says about its nodes."""
        pids = self._daemons.pids
        if not pids:
            return "down\n"
        lines = [f"{name}: {f'pid {pids[name][0]}' if self._daemons.alive(name) else 'dead'}\n" for name in pids]
        lines += [f"{name}: off\n" for name in self.layout.names if name not in pids]
        return "".join(lines) + self.run("sinfo", "-N", "-o", "%N %P %T %c %m %G %E", check=False)

    def _known(self, name: str) -> str:
        if name not in self.layout.names:
            raise ValueError(f"{name}: this cluster has {', '.join(self.layout.names)}")
        return name

    def _all_idle(self) -> bool:
        listed = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False).splitlines()
        return sorted(listed) == sorted(f"{name} idle" for name in self.layout.names)

    def _munge_options(self) -> list[str]:
        run = self.layout.run
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        return [
            *(f"--{option}={run}/{name}" for option, name in names.items()),
            f"--log-file={self.layout.log}/munged.log",
        ]

    def _start_accounting(self) -> None:
        # In memory, since a table made on disk takes several fsyncs; a container may have only 64 MB there.
        shm = Path("/dev/shm")
        roomy = shm.is_dir() and shutil.disk_usage(shm).free > DB_BYTES
        self._database = tempfile.mkdtemp(prefix="slurm-db-", dir=shm if roomy else self.layout.run)
        self._save()
        unix = f"{self.layout.run}/mysql.socket"
        base = ["--no-defaults", "--user=root", f"--datadir={self._database}"]
        plain = ["--skip-test-db", "--skip-name-resolve", "--auth-root-authentication-method=normal"]
        self.run("mariadb-install-db", *base, *plain, "--innodb-log-file-size=8M")
        small = ["--innodb-buffer-pool-size=64M", "--innodb-log-file-size=8M", "--performance-schema=0"]
        unsafe = [f"--innodb-{o}" for o in ("flush-log-at-trx-commit=0", "flush-method=nosync", "doublewrite=0")]
        own = [f"--socket={unix}", "--skip-networking", "--skip-log-bin", f"--pid-file={self.layout.run}/mariadbd.pid"]
        # slurmdbd insists on a long time-out of locks
        self._start(
            "mariadbd", ["mariadbd", *base, *own, *small, *unsafe, "--debug-no-sync", "--innodb-lock-wait-timeout=900"]
        )
        ping = ("mariadb-admin", "--no-defaults", f"--socket={unix}", "-uroot", "ping")
        wait_until(lambda: "alive" in self.run(*ping, check=False), 30, "mariadbd")
        self._start("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=unix)
        wait_until(lambda: self._listens(slurm_config.ACCOUNTING), 60, "slurmdbd")

    def _start_keeper(self) -> None:
        """A process that takes the cluster down when this one is gone, even by SIGKILL: its standard input ends."""
        command = [sys.executable, "-m", "tests.clusters.slurm_cluster", "keep", "--root", str(self.root)]
        self._start("keeper", command, stdin=subprocess.PIPE)

    def _start(self, name: str, command: list[str], stdin: int = subprocess.DEVNULL, **env: str) -> None:
        log = Path(self.layout.log) / f"{name}.out"
        self._daemons.start(name, command, log, _environ(**self.environment, **env), stdin)
        self._save()

    def _listens(self, port: int) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.layout.base_port + port), timeout=1):
                return True
        except OSError:
            return False

    def _save(self) -> None:
        state = {"layout": dataclasses.asdict(self.layout), "database": self._database, "pids": self._daemons.pids}
        written = self.root / f".cluster.json.{os.getpid()}"
        written.write_text(json.dumps(state))
        written.replace(self.root / "cluster.json")

    def _log_tails(self) -> str:
        logs = sorted(Path(self.layout.log).glob("*"))
        return "\n".join(f"--- {log.name}\n" + "\n".join(read(str(log)).splitlines()[-5:]) for log in logs)


def parse_job(text: str) -> dict[str, str]:
    """The fields that `scontrol show job` prints for one job. Its many lines keep apart what `-o` runs together."""
    job: dict[str, str] = {}
    for line in text.splitlines():
        line = line.strip()
        first = re.match(r"(JobId=\d+ .*?)JobName=(.*)", line)
        if first:
            line, job["JobName"] = first.groups()
        name, _, value = line.partition("=")
        if name in FREE_TEXT:
            job[name] = value
        else:
            job.update(field.split("=", 1) for field in line.split() if "=" in field)
    return job


def _environ(**more: str) -> dict[str, str]:
    """This process's environment without another cluster's traces, and with the daemons on its path."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN", "SALLOC"))}
    return {**mine, "PATH": f"{mine.get('PATH', '/usr/bin:/bin')}:{SBIN}", **more}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clusters.slurm_cluster", description=__doc__.split("\n")[0])
    steps = ("install", "up", "down", "status", "env", "kill-node", "start-node", "keep")
    parser.add_argument("step", choices=steps)
    parser.add_argument("name", nargs="?", default="", help="a node, for kill-node and start-node")
    parser.add_argument("--root", type=Path, default=Path("/tmp/hvd-slurm"))
    for option in ("nodes", "cpus", "memory-mb", "gpus", "node-timeout", "kill-wait", "grace", "base-port"):
        parser.add_argument(f"--{option}", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--accounting", action="store_true", default=argparse.SUPPRESS)
    parser.add_argument("--no-preempt-signal", dest="preempt_signal", action="store_false", default=argparse.SUPPRESS)
    options = vars(parser.parse_args(argv))
    step, name, root = (options.pop(key) for key in ("step", "name", "root"))
    cluster = SlurmCluster.attach(root)
    match step:
        case "install":
            install()
        case "up":
            if lacking := missing(options.get("accounting", False)):
                sys.exit(lacking)
            SlurmCluster(root, **options).up(outlive=True)
        case "down":
            cluster.down()
        case "keep":
            sys.stdin.buffer.read()
            cluster = SlurmCluster.attach(root)  # as it is by now
            cluster._daemons.pids.pop("keeper", None)  # that is this process
            cluster.down()
        case "status":
            print(cluster.status(), end="")
        case "env":
            print("\n".join(f"export {variable}={value}" for variable, value in cluster.environment.items()))
        case "kill-node":
            cluster.kill_node(name)
        case "start-node":
            cluster.start_node(name)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, RuntimeError, TimeoutError) as error:
        sys.exit("\n".join([str(error), *getattr(error, "__notes__", [])]))
