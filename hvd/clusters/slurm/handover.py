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
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hvd.clusters.base import Unreachable
from hvd.clusters.slurm import queue
from hvd.clusters.slurm.script import BatchJob, render, this_python
from hvd.clusters.slurm.site import JOBS_DIR
from hvd.errors import Failed, UserError
from hvd.files import write_atomic

_ANSWER_SECONDS = 60


def check(jobs: Sequence[BatchJob]) -> None:
    """UserError where the environment cannot do what is asked for, or Slurm says that it never could."""
    site = jobs[0].site
    if jobs[0].gpus and site.container == "none" and site.command in ("", this_python()):
        if importlib.util.find_spec("jax_cuda12_plugin") is None:
            raise UserError(
                "the job asks for GPUs, but this environment's jax has no CUDA: `uv sync --extra cuda12`, or "
                "--slurm.gpus-per-node 0 to train on CPUs"
            )
    for job in jobs:
        answer = _sbatch(["--test-only"], render(job))
        lines = [line.removeprefix("sbatch: ") for line in answer.stderr.splitlines() if line.strip()]
        if answer.returncode:
            line = next((x for x in lines if "error" in x or "failure" in x), lines[-1] if lines else "no reason given")
            if queue.unanswered(answer.stderr):
                raise Unreachable(f"Slurm does not answer: {line}")
            asked = f"asked for: {job.describe()}; see slurm/site.toml"
            raise UserError(f"Slurm cannot run the {job.stage} job: {line} ({asked})")
        if lines:
            print(f"{job.stage}: {lines[-1]}", flush=True)


def dependency(after: str) -> list[str]:
    """Options of sbatch: only after that job has completed; cancelled, not pending for ever, when it never will."""
    return [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []


def submit(jobs: Sequence[BatchJob], after: str = "") -> list[tuple[BatchJob, str]]:
    """Put the jobs into the queue, each after the one it waits for; with their ids. `after`: the first one's.

    Raises:
        UserError: Slurm refuses one; those before it are cancelled.
        Failed: Slurm does not answer, or a job cannot be recorded.
    """
    ids: dict[str, str] = {}
    try:
        for job in jobs:
            waits_for = ids.get(job.after, after)
            ids[job.stage] = number = _hand_over(job, dependency(waits_for))
            _record(job, number, waits_for)
    except OSError as error:
        _take_back(list(ids.values()))
        raise Failed(f"{error.filename or JOBS_DIR}: {error.strerror or error}") from error
    except BaseException:
        _take_back(list(ids.values()))
        raise
    return [(job, ids[job.stage]) for job in jobs]


def _hand_over(job: BatchJob, options: Sequence[str]) -> str:
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    written: list[Path] = []
    accepted: list[str] = []

    class Executor(SlurmExecutor):
        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return render(job)

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            written.append(submission_file_path)
            return ["sbatch", *options, str(submission_file_path)]

        @staticmethod
        def _get_job_id_from_submission_command(string: bytes | str) -> str:
            accepted.append(SlurmExecutor._get_job_id_from_submission_command(string))
            return accepted[-1]

    JOBS_DIR.mkdir(parents=True, exist_ok=True)
    try:
        executor = Executor(folder=JOBS_DIR / "%j")
        executor.update_parameters(nodes=job.nodes, ntasks_per_node=job.site.tasks_per_node)
        return executor._submit_command("").job_id
    except FailedJobError as error:
        line = next((x for x in reversed(str(error).splitlines()) if "error" in x), str(error).strip() or repr(error))
        raise UserError(f"sbatch refuses the {job.stage} job: {line.removeprefix('sbatch: ')}") from error
    except BaseException:
        _take_back(accepted)  # it is in the queue, and no record would say so
        raise
    finally:
        for link in written:  # submitit leaves a link to the script
            link.unlink(missing_ok=True)


def _take_back(ids: Sequence[str]) -> None:
    if ids:
        subprocess.run(["scancel", *ids], check=False, timeout=_ANSWER_SECONDS)
        print(f"cancelled again: job {', '.join(ids)}", file=sys.stderr)


def _record(job: BatchJob, number: str, after: str) -> None:
    """slurm/jobs/<id>/job.json, for `hvd jobs`."""
    about = {
        "id": number,
        "cluster": "slurm",
        "stage": job.stage,
        "name": f"hvd-{job.stage}",
        "options": list(job.options),
        "nodes": job.nodes,
        "exp_dir": os.path.dirname(job.run_dir),
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


def _sbatch(options: Sequence[str], script: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["sbatch", *options], input=script, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise UserError("--cluster slurm: there is no sbatch here; run this on a login node") from error
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"Slurm did not answer within {_ANSWER_SECONDS} s") from error
