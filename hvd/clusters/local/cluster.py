"""This machine as a cluster: the launcher itself runs the steps, in the foreground or in the background."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NoReturn

from hvd import stages
from hvd.clusters import base
from hvd.clusters.base import JobState, Planned, Request, Submitted
from hvd.clusters.local import runner
from hvd.configs import Experiment
from hvd.errors import EXIT_COMPLETE, UserError
from hvd.overrides import Flag
from hvd.plan import devices as plan_devices
from hvd.stages import Group


class Local:
    """`--cluster local`. The one job is the launcher's own process: `wait` runs its steps."""

    name: ClassVar[str] = "local"
    auto: ClassVar[bool] = True
    stays: ClassVar[bool] = True
    shares_files: ClassVar[bool] = True

    def __init__(self, flags: Sequence[Flag] = (), jobs_dir: str = "") -> None:
        if flags:
            raise UserError(f"unknown field {flags[0].token}: this machine has no settings")
        self._planned: Planned | None = None

    def available(self) -> bool:
        return True

    def plan(self, request: Request) -> Planned:
        gpus = runner.gpus()
        if gpus and len(gpus) < request.nodes:
            raise UserError(f"--nodes {request.nodes}: this machine has only {len(gpus)} GPU(s) to divide among them")
        if request.after:
            raise UserError("--after is for clusters with a queue; this machine has none")
        parts = stages.parts(request.cfg, request.stage, overwrite=request.overwrite, together=True)
        groups = [group for part in parts.values() for group in part]
        text = "\n".join(_commands(groups, request)) + "\n"
        return Planned(request, text, runner.devices(request.nodes), request.nodes, hardware(), 1, groups)

    def check(self, planned: Planned) -> None:
        pass

    def submit(self, planned: Planned, again: Sequence[str] = ()) -> list[Submitted]:
        if again:
            base.start_again(again, logs(planned.request.cfg))
        self._planned = planned
        return [Submitted("", planned.request.stage)]

    def wait(self, job: str, timeout: float | None) -> int:
        assert self._planned is not None, "submit comes first"
        request, started = self._planned.request, time.monotonic()
        code = runner.Runner(logs(request.cfg), request.nodes, request.options).run(self._planned.parts)
        if code == EXIT_COMPLETE:
            _finish(request.cfg, request.stage, time.monotonic() - started)
        return code

    def alive(self, job: str) -> bool | None:
        return None

    def owns(self, job: str) -> bool:
        return False  # a launcher here has a process id, which `ps` and `kill` know

    def states(self, days: float | None) -> tuple[list[JobState], int]:
        return [], 0

    def dependents(self, job: str) -> list[JobState]:
        _no_queue()

    def cancel(self, jobs: Sequence[str]) -> None:
        _no_queue()

    def logs(self, job: str, lines: int, follow: bool) -> int:
        _no_queue()


def _no_queue() -> NoReturn:
    raise UserError("this machine keeps no list of jobs; the logs are in the experiment's folder")


def logs(cfg: Experiment) -> Path:
    """Folder of the steps' logs: in the experiment's, or below runs/ when that is remote."""
    name = cfg.exp_name or cfg.name
    return (Path("runs") / name if "://" in cfg.exp_dir else Path(cfg.exp_dir)) / "logs"


def hardware() -> str:
    """This machine's GPUs as `8xh100-80gb`; asks nvidia-smi. "" where it has none, or it is not known which."""
    wanted = runner.gpus()
    if not wanted:
        return ""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return _unknown("nvidia-smi does not tell the GPUs' names; --devices does")
    rows = [[part.strip() for part in line.split(",", 2)] for line in done.stdout.splitlines() if line.count(",") >= 2]
    kinds = [name for index, uuid, name in rows if index in wanted or uuid in wanted]
    if not kinds or len(set(kinds)) > 1:
        listed = ", ".join(sorted(set(kinds))) or "none"
        return _unknown(f"the GPUs are of several kinds or unknown ({listed}); see --devices")
    name = plan_devices.name_of(kinds[0])
    return f"{len(kinds)}x{name}" if name else _unknown(f"{kinds[0]} is not in the table of devices")


def _unknown(why: str) -> str:
    print(f"memory: not planned, {why}", file=sys.stderr)
    return ""


def _commands(groups: Sequence[Group], request: Request) -> list[str]:
    """The steps as shell commands, one a line; a comment says what runs at the same time."""
    lines = []
    for group in groups:
        if len(group) > 1:
            at_a_time = len(runner.core_shares(len(group)))
            lines.append(f"# the next {len(group)}: {at_a_time} at a time, each on its share of the cores")
        for step in group:
            count = request.nodes if step.spread else 1
            for index in range(count):
                env = runner.node_environment("127.0.0.1:PORT", count, index) if count > 1 else {}
                words = [f"{name}={value}" for name, value in env.items()]
                command = [*runner.COMMAND, *step.words(request.options)]
                lines.append(" ".join([*words, shlex.join(command)]) + (" &" if index < count - 1 else ""))
    return lines


def _finish(cfg: Experiment, stage: str, seconds: float) -> None:
    """The last lines: results and where the report is, or what comes next."""
    print(f"stage {stage} complete after {seconds / 60:.1f} minutes")
    if stage == "value":
        print(f"value run: {cfg.value_dir}; next: --stage policy")
    elif stage == "policy":
        print(f"policy run: {cfg.policy_dir}; next: hvd evaluate and hvd report with the same options, or --stage all")
    else:
        from hvd.report.results import summary

        print(summary(cfg))
        print(f"report: {os.path.join(cfg.exp_dir, 'report.html')}")
