"""Stages as jobs of a Slurm cluster: what is asked for, the scripts, and handing them over through submitit.

submitit writes the script, calls sbatch and reads the job's id. Its pickled functions and its own requeueing are not
used: a pickle in a folder that others can write is code that others can run, and its checkpoint hook runs on one task
only, while a save needs all of them. The script (hvd.clusters.slurm.batch) starts `hvd` itself.
"""

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvd.clusters.slurm import batch, queue
from hvd.clusters.slurm.batch import Request, Step
from hvd.clusters.slurm.site import JOBS_DIR, Site
from hvd.configs import Experiment
from hvd.errors import Failed, UserError
from hvd.launch import steps

_ANSWER_SECONDS = 60


@dataclass(frozen=True)
class Job:
    """A job to be submitted: its script, and the stage that it waits for ("" = none)."""

    request: Request
    site: Site
    script: str
    run_dir: str
    after: str = ""


def available() -> bool:
    """Is this a login node of a cluster that answers? Inside of a job it is not one."""
    if "SLURM_JOB_ID" in os.environ:
        return False
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(["scontrol", "ping"], capture_output=True, timeout=_ANSWER_SECONDS, check=False)
        return asked.returncode == 0
    return False


def gpus(cfg: Experiment, site: Site, asked: bool) -> int:
    """GPUs of a node: none for configs that are made for CPUs, unless the user asked for them by name."""
    return site.gpus_per_node if asked or cfg.accelerator == "gpu" else 0


def devices(request: Request, site: Site) -> tuple[int, int]:
    """(devices, processes) of the job, over all nodes."""
    processes = request.nodes * site.tasks_per_node
    return (request.nodes * request.gpus if request.gpus else processes), processes


def jobs(
    cfg: Experiment, stage: str, options: Sequence[str], nodes: int, site: Site, gpus: int, overwrite: bool
) -> list[Job]:
    """The stage's jobs in their order: for "all" value, policy and, on one node, evaluation and report."""
    again = ("--overwrite",) if overwrite else ()
    plans: dict[str, tuple[Step, ...]] = {
        "value": (Step("one", ("prepare",)), Step("all", ("train-value", *again))),
        "policy": (
            *((Step("all", ("advantages",)),) if steps.needs_value(cfg) else ()),
            Step("all", ("train-policy", *again)),
        ),
        "evaluate": tuple(
            Step("all" if task.spread else "one", tuple(arg for arg in _own_arguments(task, options)))
            for group in steps.after(cfg, options, overwrite)
            for task in group
        ),
    }
    site = with_command(site)
    run_dirs = {"value": cfg.value_dir, "policy": cfg.policy_dir, "evaluate": ""}
    order = ["value", "policy", "evaluate"] if stage == "all" else [stage]
    found = []
    for name in order:
        request = Request(name, plans[name], tuple(options), 1 if name == "evaluate" else nodes, gpus)
        after = order[order.index(name) - 1] if found else ""
        found.append(Job(request, site, batch.render(request, site), run_dirs[name], after))
    return found


def _own_arguments(task: steps.Task, options: Sequence[str]) -> list[str]:
    """The task's arguments without the options that the script gives to every step."""
    name, *rest = task.args
    return [name, *rest[len(options) :]]


def with_command(site: Site) -> Site:
    """The site, calling hvd by this very Python where there is no .venv in the working directory."""
    if site.command or site.container != "none" or Path(batch.PLAIN.split()[0]).exists():
        return site
    return dataclasses.replace(site, command=_this_python())


def _this_python() -> str:
    return f"{shlex.quote(sys.executable)} -m hvd.cli"


def check(jobs: Sequence[Job]) -> None:
    """UserError where the environment cannot do what is asked for, or Slurm says that it never could."""
    first = jobs[0]
    own = first.site.container == "none" and first.site.command in ("", _this_python())
    if first.request.gpus and own:
        if importlib.util.find_spec("jax_cuda12_plugin") is None:
            raise UserError(
                "the job asks for GPUs, but this environment's jax has no CUDA: `uv sync --extra cuda12`, or "
                "--slurm.gpus-per-node 0 to train on CPUs"
            )
    for job in jobs:
        answer = _sbatch(["--test-only"], job.script)
        told = answer.stderr.strip().splitlines()
        if answer.returncode:
            raise _refusal(answer, f"the {job.request.stage} job", job)
        if told:
            print(f"{job.request.stage}: {told[-1].removeprefix('sbatch: ')}", flush=True)


def describe(job: Job) -> str:
    """The resolved request in one line."""
    asked = batch.directives(job.request, job.site)
    words = [name if value is None else f"{name}={value}" for name, value in asked.items()]
    kept = [word for word in words if not word.startswith(("job-name", "open-mode", "output"))]
    if job.site.container != "none":
        kept.append(f"{job.site.container}={job.site.image}")
    return f"{job.request.stage}: " + " ".join(kept)


def dependency(after: str) -> list[str]:
    """Options of sbatch: only after that job has completed; cancelled, not pending for ever, when it never will."""
    return [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []


def submit(jobs: Sequence[Job], after: str = "") -> list[str]:
    """Put the jobs into the queue, each after the one it waits for; their ids. `after`: a job that the first waits for.

    Raises:
        UserError: Slurm refuses one; those before it are cancelled again.
        Failed: Slurm does not answer.
    """
    ids: dict[str, str] = {}
    try:
        for job in jobs:
            waits_for = ids.get(job.after, after)
            ids[job.request.stage] = number = _hand_over(job, dependency(waits_for))
            _record(job, number, waits_for)
    except OSError as error:
        _take_back(list(ids.values()))
        raise Failed(f"{error.filename or JOBS_DIR}: {error.strerror or error}") from error
    except BaseException:
        _take_back(list(ids.values()))
        raise
    return list(ids.values())


def _hand_over(job: Job, options: Sequence[str]) -> str:
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        """submitit's, with our script in place of the one that unpickles a function."""

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return job.script

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            written.append(submission_file_path)
            return ["sbatch", *options, str(submission_file_path)]

        @staticmethod
        def _get_job_id_from_submission_command(string: bytes | str) -> str:
            accepted.append(SlurmExecutor._get_job_id_from_submission_command(string))
            return accepted[-1]

    JOBS_DIR.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []  # not what a glob finds: that may be another submission's, on its way to sbatch
    accepted: list[str] = []
    try:
        executor = Executor(folder=JOBS_DIR / "%j")
        executor.update_parameters(nodes=job.request.nodes, ntasks_per_node=job.site.tasks_per_node)
        return executor._submit_command("").job_id
    except FailedJobError as error:
        line = next((x for x in reversed(str(error).splitlines()) if "error" in x), str(error).strip() or repr(error))
        raise UserError(f"sbatch refuses the {job.request.stage} job: {line.removeprefix('sbatch: ')}") from error
    except BaseException:
        _take_back(accepted)  # the queue has it, and nobody would know
        raise
    finally:
        for link in written:  # submitit leaves a link to the script
            link.unlink(missing_ok=True)


def _take_back(ids: Sequence[str]) -> None:
    if ids:
        subprocess.run(["scancel", *ids], check=False, timeout=_ANSWER_SECONDS)
        print(f"cancelled again: job {', '.join(ids)}", file=sys.stderr)


def _record(job: Job, number: str, after: str) -> None:
    """slurm/jobs/<id>/job.json, for `hvd jobs`."""
    folder = JOBS_DIR / number
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "id": number,
        "cluster": "slurm",
        "stage": job.request.stage,
        "name": f"hvd-{job.request.stage}",
        "options": list(job.request.options),
        "nodes": job.request.nodes,
        "exp_dir": os.path.dirname(job.run_dir),
        "run_dir": job.run_dir,
        "log": str(JOBS_DIR / f"{number}.log"),
        "after": after,
        "submitted": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    temporary = folder / ".job.json.tmp"
    temporary.write_text(json.dumps(about, indent=1) + "\n")
    temporary.replace(folder / "job.json")


def _sbatch(options: Sequence[str], script: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["sbatch", *options], input=script, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise UserError("--cluster slurm: there is no sbatch here; run this on a login node") from error
    except subprocess.TimeoutExpired as error:
        raise Failed(f"Slurm did not answer within {_ANSWER_SECONDS} s") from error


def _refusal(answer: subprocess.CompletedProcess[str], what: str, job: Job) -> UserError | Failed:
    lines = [line.removeprefix("sbatch: ") for line in answer.stderr.splitlines() if line.strip()]
    line = next((x for x in lines if "error" in x or "failure" in x), lines[-1] if lines else "no reason given")
    if queue.unanswered(answer.stderr):
        return Failed(f"Slurm does not answer: {line}")
    return UserError(f"Slurm cannot run {what}: {line} (asked for: {describe(job)}; see slurm/site.toml)")
