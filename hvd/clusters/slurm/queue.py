"""Asking Slurm: what it says of a job, whether a job lives, what waits for what; and cancelling.

Three places know a job, one after the other: slurmctld (squeue, scontrol) until MinJobAge, five minutes by default,
after its end; slurmdbd (sacct) after that, where the cluster has one; else only its own
folder.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hvd.clusters.base import Absent, Unreachable
from hvd.errors import Failed

# Everything else, states of future versions included, is taken for life: two jobs in one run folder are worse than a
# job that is waited for too long.
ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED LAUNCH_FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED RECONFIG_FAIL "
    "REVOKED TIMEOUT UNKNOWN".split()
)
NEVER = "DependencyNeverSatisfied"  # the reason of a job that waits for one that failed

_TIMEOUT_S = 20.0  # of one command; Slurm's own tries take 8 s where no controller answers
_PAUSES_S = (0.5, 1.5)  # between tries
_TRY_FOR_S = 10.0  # no new try after that
_FEW = 8  # jobs that are asked for one by one before the whole queue is
_UNKNOWN_JOB = "Invalid job id"
_OVER = "already completing or completed"
_FIELD = r"(?:^|\s){}=(.*?)(?=\s[A-Z][\w/:&]*=|\s*$)"


@dataclass(frozen=True)
class Status:
    """What Slurm says of a job.

    Attributes:
        state: PENDING, RUNNING, COMPLETED, ... as Slurm says it, without "by 1000" and "+".
        reason: why it waits or how it ended; "" for none.
        exit_code: as a shell has it (128 + signal); None while it is not known.
        nodes: Slurm's short form, such as "node[1-2]"; "" before the job has any.
        restarts: how often Slurm has started it again.
    """

    id: str
    state: str
    reason: str = ""
    exit_code: int | None = None
    nodes: str = ""
    restarts: int = 0

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True)
class Queued:
    """One of this user's jobs that have not ended.

    Attributes:
        after: ids of the jobs that it waits for.
        folder: its working directory.
    """

    id: str
    state: str
    reason: str
    name: str
    after: tuple[str, ...]
    folder: str


def states(ids: Iterable[str], tries: int = 3) -> dict[str, Status]:
    """What is known of the jobs; those that neither slurmctld nor slurmdbd knows are absent.

    Raises Unreachable after `tries` questions without an answer, a few seconds in all where it is told so at once.
    """
    ids = list(dict.fromkeys(ids))
    if not ids:
        return {}
    found: dict[str, Status] = {}
    for job, row in _squeue(ids, tries).items():
        found[job] = _scontrol(job, tries) or row
    forgotten = [job for job in ids if job not in found]
    # A job that accounting has running and slurmctld has never heard of is one that a crash left in the books.
    return found | {job: status for job, status in _sacct(forgotten).items() if status.ended}


def alive(job: str) -> bool | None:
    """Has the job not ended yet (it waits, is requeued, runs, completes)? None where Slurm cannot be asked."""
    try:
        row = _squeue([job]).get(job)
    except Unreachable:
        return None
    return row is not None and not row.ended


def queue() -> list[Queued]:
    """This user's jobs that have not ended, oldest first. Raises Unreachable."""
    answer = ask(["squeue", "-h", "-u", str(os.getuid()), "-o", "%A|%T|%r|%E|%Z|%j"])
    rows = [line.split("|", 5) for line in answer.splitlines()]
    jobs = [
        Queued(job, _word(state), _none(reason), name, dependencies(after), folder)
        for job, state, reason, after, folder, name in (row for row in rows if len(row) == 6)
        if job.isdigit() and _word(state) not in ENDED
    ]
    return sorted(jobs, key=lambda job: int(job.id))


def ask(command: Sequence[str]) -> str:
    """What one of Slurm's programs prints. Raises Unreachable where it fails."""
    done = _ask(command)
    if done.returncode:
        raise Unreachable(f"Slurm cannot be asked: {_complaint(done)}")
    return done.stdout


def dependencies(text: str) -> tuple[str, ...]:
    """Ids in squeue's form of a dependency: `afterok:12(unfulfilled),afterany:13:14` -> 12, 13, 14."""
    return tuple(dict.fromkeys(re.findall(r":(\d+)", text)))


def cancel(ids: Sequence[str]) -> None:
    """Cancel the jobs, one after the other in this order; one that has ended already is left alone.

    Raises Unreachable, and Failed where Slurm refuses.
    """
    for job in ids:
        done = _ask(["scancel", job])
        if done.returncode and not any(text in done.stderr for text in (_OVER, _UNKNOWN_JOB)):
            raise Failed(f"job {job} is not cancelled: {_complaint(done)}")


# ----------------------------------------------------------------------------------------------------- three sources


def _squeue(ids: Sequence[str], tries: int = 3) -> dict[str, Status]:
    """Those of the jobs that slurmctld knows; exit codes and restarts are not in it."""
    command = ["squeue", "-h", "-t", "all", "-o", "%A|%T|%N|%r"]  # not %i: "7_2" in an array
    done = _ask([*command, "-j", ",".join(ids)], tries)
    if done.returncode and _UNKNOWN_JOB in done.stderr:
        # Some versions let one forgotten id spoil the answer for all of them.
        if len(ids) == 1:
            return {}
        if len(ids) <= _FEW:
            return {job: row for one in ids for job, row in _squeue([one], tries).items()}
        done = _ask(command, tries)
    if done.returncode:
        raise Unreachable(f"Slurm cannot be asked: {_complaint(done)}")
    found = {}
    for line in done.stdout.splitlines():
        job, *rest = line.split("|", 3)
        if job in ids and len(rest) == 3:
            found[job] = Status(job, _word(rest[0]), _none(rest[2]), nodes=_none(rest[1]))
    return found


def _scontrol(job: str, tries: int) -> Status | None:
    """Everything slurmctld knows of the job, None where it has just been forgotten."""
    done = _ask(["scontrol", "show", "job", "-o", job], tries)
    line = done.stdout.strip()
    state = _field(line, "JobState")
    if done.returncode or not state:
        return None
    restarts = _field(line, "Restarts")
    return Status(
        id=job,
        state=_word(state),
        reason=_none(_field(line, "Reason")),
        exit_code=_shell_code(_field(line, "ExitCode")) if _word(state) in ENDED else None,
        nodes=_none(_field(line, "NodeList")),
        restarts=int(restarts) if restarts.isdigit() else 0,
    )


def _sacct(ids: Sequence[str]) -> dict[str, Status]:
    """Those of the jobs that accounting knows; {} where there is none."""
    if not ids:
        return {}
    command = ["sacct", "-n", "-X", "-P", "-D", "-j", ",".join(ids), "-o", "JobID,State,ExitCode,NodeList,Reason"]
    try:
        done = _run(command)
    except Unreachable:
        return {}
    found: dict[str, Status] = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        row = line.split("|", 4)
        if len(row) != 5 or row[0] not in ids or not row[1]:
            continue
        job, state, code, nodes, reason = row
        restarts = found[job].restarts + 1 if job in found else 0  # -D: one line a start, the last one counts
        code = _shell_code(code) if _word(state) in ENDED else None
        found[job] = Status(job, _word(state), _none(reason), code, _none(nodes), restarts)
    return found


def _field(line: str, name: str) -> str:
    match = re.search(_FIELD.format(name), line)
    return match[1] if match else ""


def _word(state: str) -> str:
    """ "CANCELLED by 1000" and "CANCELLED+" -> "CANCELLED"."""
    return re.split(r"[\s+,]", state.strip())[0]


def _none(text: str) -> str:
    text = text.strip()
    return "" if text in ("None", "(null)", "None assigned", "N/A") else text


def _shell_code(text: str) -> int | None:
    """Slurm's "status:signal" as one number."""
    match = re.fullmatch(r"(\d+):(\d+)", text.strip())
    if not match:
        return None
    status, number = int(match[1]), int(match[2])
    return 128 + number if number else status


# ------------------------------------------------------------------------------------------------------------ asking


def _ask(command: Sequence[str], tries: int = 3) -> subprocess.CompletedProcess[str]:
    """The finished command, tried again while Slurm does not answer; Unreachable in the end.

    What it says of a job ("Invalid job id", a refusal) is an answer.
    """
    began = time.monotonic()
    for pause in _PAUSES_S[: tries - 1]:
        try:
            return _answer(command)
        except Absent:
            raise
        except Unreachable:
            if time.monotonic() - began > _TRY_FOR_S:
                raise
            time.sleep(pause)
    return _answer(command)


def _answer(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    done = _run(command)
    if done.returncode and unanswered(done.stderr):
        raise Unreachable(f"Slurm cannot be asked: {_complaint(done)}")
    return done


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # The user's SQUEUE_USERS, SQUEUE_STATES, SCANCEL_INTERACTIVE, SLURM_TIME_FORMAT, ... would change the answers.
    drop = re.compile(r"(SQUEUE|SACCT|SCANCEL|SCONTROL|SINFO)_|SLURM_(TIME_FORMAT|BITSTR_LEN|DEBUG_FLAGS)$")
    environment = {name: value for name, value in os.environ.items() if not drop.match(name)}
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            env=environment | {"LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError:
        raise Absent(f"Slurm cannot be asked: no {command[0]} on this machine (a login node has it)") from None
    except OSError as error:
        raise Absent(f"Slurm cannot be asked: {command[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"Slurm cannot be asked: {command[0]} did not answer within {_TIMEOUT_S:g} s") from None


def unanswered(stderr: str) -> bool:
    """Is it about the way to the controller, rather than about the job?"""
    return bool(
        re.search(
            r"unable to contact|connect failure|connection (refused|timed out)|timed out|zero bytes|"
            r"communication (connection|shutdown|send|receive)|standby mode|protocol authentication|munge|"
            r"configuration source|fetch.config|resource temporarily unavailable|name resolution|unexpected message",
            stderr,
            re.IGNORECASE,
        )
    )


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of what the command complained of."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"{done.args[0]} ended with exit code {done.returncode}"
