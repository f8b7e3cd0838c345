"""The folders of submitted jobs, and how far the runs are that they train.

    slurm/jobs/ID.log        what the job printed, all its starts
    slurm/jobs/ID/job.json   from the launcher: stage, options, run folder, the job it waits for
    slurm/jobs/ID/run.json   from the trainer, once it starts: run folder, steps
    slurm/jobs/ID/restarts   one line a restart: time, number, cause, text
    slurm/jobs/ID/end        one line when the job ended for good: time, exit code, text

Each of them may be missing, or be half written: a job of plain sbatch has no job.json, a killed one no end.
"""

import datetime
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from hvd import documents
from hvd.errors import UserError
from hvd.train.metrics import last_train_line

_DEFAULT = Path("slurm/jobs")
_LIMIT = 1 << 20  # bytes of job.json and run.json
_ID = re.compile(r"[0-9]{1,18}")


class _Launched(msgspec.Struct):
    """job.json."""

    stage: str = ""
    name: str = ""
    exp_dir: str = ""
    run_dir: str = ""
    submitted: str = ""
    after: str | int = ""


class _Run(msgspec.Struct):
    """run.json."""

    stage: str = ""
    run_dir: str = ""
    steps: int | None = None


@dataclass(frozen=True)
class End:
    """How the job ended, by its own record."""

    time: datetime.datetime | None
    exit_code: int
    text: str


@dataclass(frozen=True)
class JobRecord:
    """What the folder says of a job; "" and None for what it does not.

    Attributes:
        after: ids of the jobs that it waits for.
        causes: of its restarts: cause -> how often.
        steps: how many the trainer was told to do.
        base: the folder that `run_dir` is relative to.
    """

    id: str
    log: Path
    base: Path
    stage: str = ""
    name: str = ""
    exp_dir: str = ""
    run_dir: str = ""
    submitted: str = ""
    after: tuple[str, ...] = ()
    steps: int | None = None
    causes: Mapping[str, int] = field(default_factory=dict)
    end: End | None = None

    @property
    def experiment(self) -> str:
        return self.run_dir or self.exp_dir


def is_id(text: str) -> bool:
    return bool(_ID.fullmatch(text))


def ids(jobs: Path) -> list[str]:
    """Ids that have a folder or a log, oldest first; [] where there is no jobs folder.

    UserError where it cannot be read.
    """
    try:
        names = [entry.name for entry in os.scandir(jobs)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{jobs}: cannot be read as a folder of jobs ({error.strerror})") from None
    found = {name.removesuffix(".log") for name in names}
    return sorted((name for name in found if is_id(name)), key=int)


def read(jobs: Path, job: str) -> JobRecord:
    """What the folder says of the job. Never fails: what is missing, half written or not ours is left out."""
    place = jobs / job
    launched, run = _read(place / "job.json", _Launched), _read(place / "run.json", _Run)
    if launched.stage and run.stage and run.stage != launched.stage:
        run = _Run()  # of a policy that the evaluation trains on its way, to compare with
    return JobRecord(
        id=job,
        log=jobs / f"{job}.log",
        base=base(jobs),
        stage=run.stage or launched.stage,
        name=launched.name,
        exp_dir=launched.exp_dir,
        run_dir=run.run_dir or launched.run_dir,
        submitted=launched.submitted,
        after=tuple(re.findall(r"[0-9]+", str(launched.after))),
        steps=run.steps,
        causes=_causes(place / "restarts"),
        end=_end(place / "end"),
    )


def last_sign(jobs: Path, job: JobRecord) -> datetime.datetime | None:
    """When the job ended, by its own record; else when one of its files last changed."""
    if job.end is not None and job.end.time is not None:
        return job.end.time
    times = []
    for path in (job.log, jobs / job.id):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return datetime.datetime.fromtimestamp(max(times), datetime.UTC) if times else None


def progress(job: JobRecord) -> dict[str, Any]:
    """How far its run is, whichever job brought it there, by the run's folder: fields of a JobState."""
    if not job.run_dir:
        return {"total": job.steps}
    remote = "://" in job.run_dir
    try:
        run = _remote(job.run_dir) if remote else job.base / job.run_dir
        checkpoints = run / "checkpoints"
        line = last_train_line(run)
        step, step_s = _number(line, "step"), _seconds(line)
        total = job.steps if job.steps is not None else _configured_steps(os.fspath(run), job.stage)
        names = [entry.name for entry in checkpoints.iterdir()] if checkpoints.exists() else []
        left = None if step is None or total is None or step_s is None else max(0, total - step) * step_s
        return {
            "step": step,
            "total": total,
            "steps_per_s": step_s and 1 / step_s,
            "eta_s": left,
            "last_checkpoint": max((int(name) for name in names if is_id(name)), default=None),
            "complete": (run / "complete.json").exists(),
        }
    except Exception:  # no library, credentials or network, each with errors of its own: the table goes without
        if not remote:
            raise
        return {"total": job.steps}


def _remote(run_dir: str) -> Any:
    from etils import epath

    return epath.Path(run_dir)


# ------------------------------------------------------------------------------------------------------- job's folder


def base(jobs: Path) -> Path:
    """Where the job was submitted, if slurm/jobs is where it usually is; else here."""
    absolute = Path(os.path.abspath(jobs))  # not resolve(): slurm/jobs may be a link to a larger disk
    return absolute.parents[1] if absolute.parts[-2:] == _DEFAULT.parts else Path.cwd()


def _read[T](path: Path, form: documents.Form[T]) -> T:
    """The document; what is not there or not of that form leaves the defaults."""
    try:
        return documents.read(path, form, _LIMIT)
    except (OSError, UserError):
        return form()


def _number(data: Mapping[str, Any], key: str) -> int | None:
    value = data.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]


def _causes(path: Path) -> dict[str, int]:
    words = [line.split() for line in _lines(path)]
    return dict(Counter(line[2] for line in words if len(line) > 2))


def _end(path: Path) -> End | None:
    for line in reversed(_lines(path)):
        when, code, text = [*line.split(maxsplit=2), "", ""][:3]
        if re.fullmatch(r"[0-9]{1,3}", code):
            return End(_time(when), int(code), text.strip())
    return None


def _time(text: str) -> datetime.datetime | None:
    try:
        return datetime.datetime.fromisoformat(text).astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        return None


# ------------------------------------------------------------------------------------------------------- run's folder


def _seconds(line: Mapping[str, Any]) -> float | None:
    """Of a step."""
    value = line.get("time/step_s")
    return float(value) if isinstance(value, int | float) and 0 < value < float("inf") else None


def _configured_steps(run: str, stage: str) -> int | None:
    """num_train_steps of config.yaml, where the trainer has not said it."""
    from hvd.train import run_dir as runs

    try:
        record = runs.read(run)
        return None if record is None else getattr(record.config, stage or record.stage).num_train_steps
    except (UserError, OSError, ValueError, AttributeError):  # another version's; the table goes without
        return None
