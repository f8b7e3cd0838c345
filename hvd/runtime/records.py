"""What a process tells the batch script and `hvd jobs` about itself, by small files in the folder of its job.

    $HVD_JOB_DIR/run.json      the run it works on
    $HVD_JOB_DIR/begun/<run>   the run has been begun by this job: a restart does not --overwrite it again
    $HVD_JOB_DIR/exit/<rank>   with which code each process ended; one that was killed leaves none

Without HVD_JOB_DIR nothing is written. Imports no jax.
"""

import contextlib
import json
import os
from pathlib import Path

from hvd.files import write_atomic
from hvd.runtime import processes


def folder() -> Path | None:
    """The job's folder, on storage that all its nodes share."""
    path = os.environ.get("HVD_JOB_DIR")
    return Path(path) if path else None


def grace_seconds() -> float:
    """Seconds from the first signal to the kill, by the job's own request; 0 = not known."""
    try:
        return float(os.environ.get("HVD_GRACE_SECONDS", "0"))
    except ValueError:
        return 0.0


def tell_run(stage: str, run_dir: str, steps: int) -> None:
    """Name the run that the job works on; by the main process."""
    if job := folder():
        about = {"stage": stage, "run_dir": os.fspath(run_dir), "steps": steps}
        write_atomic(job / "run.json", json.dumps(about).encode())


def tell_begun(run_dir: str) -> None:
    """The run's folder has been emptied, or gone on from, by this job; by the main process."""
    if job := folder():
        write_atomic(job / "begun" / os.path.basename(run_dir), f"{run_dir}\n".encode())


def has_begun(run_dir: str) -> bool:
    """Is this a restart of a job that had begun the run?"""
    job = folder()
    return job is not None and (job / "begun" / os.path.basename(run_dir)).exists()


def tell_exit(code: int) -> None:
    """Record the code that this process is about to end with; a disk that takes nothing must not hide that code."""
    if job := folder():
        with contextlib.suppress(OSError):
            write_atomic(job / "exit" / str(processes.rank()), f"{code}\n".encode())
