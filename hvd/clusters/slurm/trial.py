"""The small job of `hvd site check` on Slurm: a batch job like a training's, with ten minutes and another step."""

import contextlib
import dataclasses
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from hvd import documents
from hvd.clusters.base import JobState
from hvd.clusters.slurm import handover, options, queue, script, site
from hvd.clusters.slurm.cluster import Slurm
from hvd.clusters.slurm.script import BatchJob
from hvd.configs import Experiment
from hvd.errors import UserError
from hvd.files import is_local
from hvd.overrides import Flag
from hvd.site import probe
from hvd.site.findings import Asked, Report
from hvd.site.options import Check, Probe
from hvd.stages import Step
from hvd.train import run_dir

_END_S = 60.0  # in which a cancelled job ends


class Trial:
    """See hvd.site.command.Trial."""

    def __init__(self, cfg: Experiment, flags: Sequence[Flag], wanted: Check, seconds: int):
        asked = any(flag.field == "slurm.gpus_per_node" for flag in flags)
        settings = script.with_command(site.load(flags))
        gpus = settings.gpus_per_node if asked or cfg.accelerator == "gpu" else 0
        runs = cfg.runs_dir if is_local(cfg.runs_dir) else "runs"
        self._folder = Path(runs) / f".hvd-site-{secrets.token_hex(4)}"
        self._new = not Path(runs).exists()
        self._cluster, self._id = Slurm(flags), ""
        words = Probe(str(self._folder), wanted.patience).words()
        self._like = BatchJob("site", [Step("site", "site", spread=True)], words, wanted.nodes or 2, gpus, settings)
        short = dataclasses.replace(
            settings,
            time=f"{seconds // 60 or 1}",
            requeue=False,
            grace=0,
            node_failures=0,
            extra=tuple(word for word in settings.extra if options.kind(word) not in ("array", "time")),
        )
        self._job = dataclasses.replace(self._like, site=short)
        self.asked = Asked(
            nodes=self._job.nodes,
            processes=self._job.devices[1],
            gpus=gpus,
            limit=_limit(settings),
            grace=settings.grace,
            limit_option="--slurm.time",
            grace_option="--slurm.grace",
            space=int(wanted.space * 1e9),
            version=run_dir.running() if settings.container == "none" else "",
        )

    def queue(self) -> str:
        handover.check([self._like])
        asked = (
            "taken by sbatch --test-only" if self._like.site.test else "sbatch --test-only is not asked (test = false)"
        )
        return f"{self._like.describe().removeprefix('site: ')}; {asked}"

    def start(self) -> None:
        _, self._id = handover.submit([self._job])[0]
        for process in range(self.asked.processes):  # a file that was there and is replaced is seen at once on NFS, too
            with contextlib.suppress(FileExistsError):
                (site.JOBS_DIR / self._id / f"site-{process}.json").open("x").close()

    def state(self) -> JobState:
        return self._cluster.look(self._id, tries=3)

    def reports(self) -> list[Report]:
        found = probe.reports(self._log())
        for path in (site.JOBS_DIR / self._id).glob("site-*.json"):
            with contextlib.suppress(OSError, UserError):
                found.append(documents.read(path, Report))
        return found

    def last_words(self) -> str:
        lines = [line for line in self._log().splitlines() if line.strip() and probe.MARK not in line]
        return lines[-1] if lines else "its log is empty"

    def images(self) -> dict[str, str]:
        return {}

    def remove(self) -> None:
        if self._id:
            queue.cancel([self._id])
            end = time.monotonic() + _END_S
            while queue.alive(self._id) is not False and time.monotonic() < end:
                time.sleep(0.2)
            shutil.rmtree(site.JOBS_DIR / self._id, ignore_errors=True)
            (site.JOBS_DIR / f"{self._id}.log").unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._new:  # made by processes that were killed before they could take it back
            with contextlib.suppress(OSError):
                self._folder.parent.rmdir()

    def _log(self) -> str:
        try:
            return (site.JOBS_DIR / f"{self._id}.log").read_text(errors="replace")
        except OSError:
            return ""


def _limit(settings: site.Site) -> int | None:
    """Seconds that a training job has; `extra` may say its own words for it."""
    text = next((word.partition("=")[2] for word in settings.extra if options.kind(word) == "time"), settings.time)
    try:
        return site.seconds(text)
    except ValueError:
        return None
