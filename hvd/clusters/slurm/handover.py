"""Handing batch scripts to Slurm through submitit, and what is recorded of each job.

submitit's `submit` is not used. It pickles a function that the nodes load (a pickle in a folder that others can write
is code that others can run), its runner ignores SIGTERM and ends with 1 whatever failed, and its requeueing asks one
task only, while a save needs all of them. So its executor gets the same script that `sbatch slurm/value.sbatch` runs,
by the methods that submitit's plugins override: submitit writes it, calls sbatch, reads the id and keeps the script.
"""

import contextlib
import datetime
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hvd.clusters.base import Unreachable
from hvd.clusters.slurm import options, queue
from hvd.clusters.slurm.script import BatchJob, option_lines, render, this_python
from hvd.clusters.slurm.site import JOBS_DIR
from hvd.errors import Failed, UserError
from hvd.files import write_atomic

_ANSWER_SECONDS = 60
_NOT_NOW = re.compile(r"busy|down, drained|inactive or drain|reserv|accounting/QOS|limit.* exceeded", re.IGNORECASE)
_NO_SUCH_NODES = "node configuration is not available"  # never, or not while nodes are drained
_OUT_OF_SERVICE = re.compile(r"drain|drng|down|maint|resv|reserved|fail|boot|power|unk|no_respond|\*", re.IGNORECASE)


class Taken(NamedTuple):
    """A job that Slurm has taken; `cluster`: where its answer names one of several."""

    id: str
    cluster: str = ""


def check(jobs: Sequence[BatchJob]) -> None:
    """UserError where the environment cannot do what is asked for, or Slurm says that it never could."""
    site = jobs[0].site
    if jobs[0].gpus and site.container == "none" and site.command in ("", this_python()):
        if importlib.util.find_spec("jax_cuda12_plugin") is None:
            raise UserError(
                "the job asks for GPUs, but this environment's jax has no CUDA: `uv sync --extra cuda12`, or "
                "--slurm.gpus-per-node 0 to train on CPUs"
            )
    _say_environment(jobs)
    for job in jobs if site.test else ():
        answer = _sbatch(["--test-only"], job)
        lines = [line.removeprefix("sbatch: ") for line in answer.stderr.splitlines() if line.strip()]
        if answer.returncode:
            line = next((x for x in lines if "error" in x or "failure" in x), lines[-1] if lines else "no reason given")
            if queue.unanswered(answer.stderr):
                raise Unreachable(f"Slurm does not answer: {line}")
            if _NOT_NOW.search(line) or (_NO_SUCH_NODES in line and _out_of_service(job)):
                print(f"{job.stage}: not now ({line}); it is submitted all the same and may wait", flush=True)
                continue
            asked = f"asked for: {job.describe()}; see slurm/site.toml"
            raise UserError(f"Slurm cannot run the {job.stage} job: {line} ({asked})")
        if lines:
            print(f"{job.stage}: {lines[-1]}", flush=True)


def _say_environment(jobs: Sequence[BatchJob]) -> None:
    against, beside = options.foreign([line for job in jobs for line in option_lines(job)])
    for names, what in ((against, "set aside, what is printed above holds"), (beside, "kept, and holds as well")):
        shown = [f"{name}={os.environ[name]}" for name in names if name.startswith("SBATCH_")]
        if shown:
            print(f"of this environment {', '.join(shown)}: {what}", flush=True)


def _out_of_service(job: BatchJob) -> bool:
    """Are there nodes, of the job's partition where it names one, that are down, drained or reserved for now?"""
    where = ["-p", job.site.partition] if job.site.partition else []
    try:
        return bool(_OUT_OF_SERVICE.search(queue.ask(["sinfo", "-h", "-o", "%T", *where])))
    except Unreachable:
        return False


def dependency(after: str) -> list[str]:
    """Options of sbatch: only after that job has completed; cancelled, not pending for ever, when it never will."""
    return [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []


def submit(jobs: Sequence[BatchJob], after: str = "") -> list[tuple[BatchJob, str]]:
    """Put the jobs into the queue, each after the one it waits for; with their ids. `after`: the first one's.

    Raises:
        UserError: Slurm refuses one; those before it are cancelled.
        Failed: Slurm does not answer, or a job cannot be recorded.
    """
    taken: dict[str, Taken] = {}
    try:
        for job in jobs:
            waits_for = taken[job.after].id if job.after in taken else after
            taken[job.stage] = _hand_over(job, dependency(waits_for))
            _record(job, taken[job.stage].id, waits_for)
    except OSError as error:
        _take_back(list(taken.values()))
        raise Failed(f"{error.filename or JOBS_DIR}: {error.strerror or error}") from error
    except BaseException:
        _take_back(list(taken.values()))
        raise
    return [(job, taken[job.stage].id) for job in jobs]


def _hand_over(job: BatchJob, after: Sequence[str]) -> Taken:
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    written: list[Path] = []
    accepted: list[Taken] = []

    class Executor(SlurmExecutor):
        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return render(job)

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            written.append(submission_file_path)
            return [*_without_foreign(job), "sbatch", *after, str(submission_file_path)]

        @staticmethod
        def _get_job_id_from_submission_command(string: bytes | str) -> str:
            text = string if isinstance(string, str) else string.decode(errors="replace")
            accepted.append(read_answer(text) or _find(written[-1], text))
            return accepted[-1].id

    JOBS_DIR.mkdir(parents=True, exist_ok=True)
    try:
        executor = Executor(folder=JOBS_DIR / "%j")
        executor.update_parameters(nodes=job.nodes, ntasks_per_node=job.site.tasks_per_node)
        executor._submit_command("")
        return accepted[-1]
    except FailedJobError as error:
        if queue.unanswered(str(error)):  # it may have been taken before the answer was lost
            _take_back(_queued(written[-1]))
        line = next((x for x in reversed(str(error).splitlines()) if "error" in x), str(error).strip() or repr(error))
        raise UserError(f"sbatch refuses the {job.stage} job: {line.removeprefix('sbatch: ')}") from error
    except BaseException:
        # it is in the queue, and no record would say so
        _take_back(accepted or [job for path in written for job in _queued(path)])
        raise
    finally:
        for link in written:  # submitit leaves a link to the script
            link.unlink(missing_ok=True)


def _without_foreign(job: BatchJob) -> list[str]:
    against, _ = options.foreign(option_lines(job))
    return ["env", *(word for name in against for word in ("-u", name))] if against else []


def read_answer(answer: str) -> Taken | None:
    """The job that sbatch's answer tells of: "Submitted batch job 7 on cluster x" among a site's own lines, "7;x", "7".

    None where there is none or are several; a line such as "Your job 6 has ended" tells of no submission.
    """
    found = re.findall(r"^Submitted batch job (\d+)(?: on cluster (\S+))?", answer, re.MULTILINE)
    found = found or re.findall(r"^\s*(\d+)(?:;(\S*))?\s*$", answer, re.MULTILINE)
    return Taken(*found[0]) if len(set(found)) == 1 else None


def _find(script: Path, answer: str) -> Taken:
    """The job of a script whose id sbatch's answer does not tell. Failed says what to look for."""
    found = _queued(script)
    if len(found) == 1:
        return found[0]
    shown = " ".join(answer.split())[-200:]
    raise Failed(
        f"sbatch's answer {shown!r} has no job id and squeue does not show the job; if Slurm has it, cancel it: "
        f"its command is {script.resolve()} (squeue --me -o '%A %j %o')"
    )


def _queued(script: Path) -> list[Taken]:
    """The jobs in the queue that run the script; its name is like no other. [] where Slurm does not answer."""
    try:
        rows = queue.ask(["squeue", "-h", "-u", str(os.getuid()), "-o", "%A %o"]).splitlines()
    except Unreachable:
        return []
    return list(dict.fromkeys(Taken(row.split(" ", 1)[0]) for row in rows if script.name in row))


def _take_back(jobs: Sequence[Taken]) -> None:
    for job in jobs:
        where = ["-M", job.cluster] if job.cluster else []
        try:
            queue.ask(["scancel", *where, job.id])
            print(f"cancelled again: job {job.id}", file=sys.stderr)
        except Unreachable as error:
            print(f"job {job.id} is in the queue and could not be cancelled: {error}", file=sys.stderr)


def _record(job: BatchJob, number: str, after: str) -> None:
    """slurm/jobs/<id>/job.json, for `hvd jobs`."""
    about = {
        "id": number,
        "cluster": "slurm",
        "stage": job.stage,
        "name": f"hvd-{job.stage}",
        "options": list(job.options),
        "nodes": job.nodes,
        "exp_dir": job.exp_dir,
        "run_dir": job.run_dir,
        "log": str(JOBS_DIR / f"{number}.log"),
        "after": after,
        "submitted": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_atomic(JOBS_DIR / number / "job.json", json.dumps(about, indent=1) + "\n")


def answers() -> bool:
    """Does a controller answer here?"""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(["scontrol", "ping"], capture_output=True, timeout=_ANSWER_SECONDS, check=False)
        return asked.returncode == 0
    return False


def _sbatch(words: Sequence[str], job: BatchJob) -> subprocess.CompletedProcess[str]:
    command, against = ["sbatch", *words], options.foreign(option_lines(job))[0]
    env = {name: value for name, value in os.environ.items() if name not in against}
    try:
        return subprocess.run(
            command, input=render(job), env=env, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise UserError("--cluster slurm: there is no sbatch here; run this on a login node") from error
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"Slurm did not answer within {_ANSWER_SECONDS} s") from error
