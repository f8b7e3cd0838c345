"""The batch script of a Slurm job: directives, settings, and the steps. The program that it sources is slurm/job.sh.

slurm/value.sbatch and slurm/awr.sbatch are what this renders by default.
"""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvd import gpu_environment
from hvd.clusters.slurm.site import JOBS_DIR, Site
from hvd.stages import Step

PLAIN = ".venv/bin/python -m hvd.cli"
NAMES = {"value": "value stage", "policy": "policy stage", "evaluate": "baselines, evaluation and report"}
_JOB_SH = Path("slurm") / "job.sh"


@dataclass(frozen=True)
class BatchJob:
    """A job to be.

    Attributes:
        options: tell its steps the config.
        gpus: of a node; 0 = a job on CPUs.
        after: the stage that it waits for; "" = none.
    """

    stage: str
    steps: Sequence[Step]
    options: tuple[str, ...]
    nodes: int
    gpus: int
    site: Site
    run_dir: str = ""
    after: str = ""

    @property
    def devices(self) -> tuple[int, int]:
        """(devices, processes) over all nodes."""
        processes = self.nodes * self.site.tasks_per_node
        return (self.nodes * self.gpus if self.gpus else processes), processes

    def describe(self) -> str:
        """What is asked for in one line."""
        words = [name if value is None else f"{name}={value}" for name, value in directives(self).items()]
        kept = [word for word in words if not word.startswith(("job-name", "open-mode", "output"))]
        if self.site.container != "none":
            kept.append(f"{self.site.container}={self.site.image}")
        return f"{self.stage}: " + " ".join(kept)


def directives(job: BatchJob) -> dict[str, str | None]:
    """Options of sbatch, in the order in which they are written; None = an option without a value."""
    site, gpus, tasks = job.site, job.gpus, job.site.tasks_per_node
    asked: dict[str, str | None] = {
        "job-name": f"hvd-{job.stage}",
        "nodes": str(job.nodes),
        "ntasks-per-node": str(tasks),
    }
    if gpus:
        asked["gpus-per-node"] = f"{site.gres_type}:{gpus}" if site.gres_type else str(gpus)
        asked["cpus-per-task"] = str(max(1, site.cpus_per_gpu * gpus // tasks))
        asked["mem"] = _times(site.mem_per_gpu, gpus)
    else:
        asked["cpus-per-task"] = str(max(1, site.cpus // tasks))
        asked["mem"] = site.mem
    asked["time"] = site.time
    for name in ("partition", "account", "qos", "constraint", "reservation", "exclude"):
        if value := getattr(site, name):
            asked[name] = value
    if site.exclusive:
        asked["exclusive"] = None
    if site.grace:
        asked["signal"] = f"USR1@{site.grace}"  # to the steps, not to the script
    asked["requeue" if site.requeue else "no-requeue"] = None
    asked["open-mode"] = "append"
    asked["output"] = f"{JOBS_DIR}/%j.log"
    return asked


def _times(size: str, factor: int) -> str:
    unit = size.lstrip("0123456789")
    return f"{int(size.removesuffix(unit)) * factor}{unit}"


def render(job: BatchJob) -> str:
    """The whole script."""
    site = job.site
    program = job_sh()
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in directives(job).items()]
    lines += [f"#SBATCH {option}" for option in site.extra]
    lines += [
        f"# hvd: {NAMES[job.stage]}. `python launch/submit.py --cluster slurm --dry-run` prints such scripts.",
        "",
        f"options=({shlex.join(job.options)})",
        '[ $# = 0 ] || options=("$@")',
        f"grace={site.grace} node_failures={site.node_failures}",
    ]
    rows = gpu_environment.settings(site.gpu, job.gpus * job.nodes)
    lines.append(f"gpu_settings=({shlex.join(f'{row.name}={row.value}' for row in rows)})")
    if site.container != "none":
        lines.append(f"container={site.container}")
    lines += [
        f". {shlex.quote(program)} || exit 2",
        *site.setup,
        f"hvd=({_command(site)})",
        "",
        *(shlex.join(("step", "all" if step.spread else "one", step.step, *step.extra)) for step in job.steps),
        'end 0 "complete"',
    ]
    return "\n".join(lines) + "\n"


def job_sh() -> str:
    """The batch program: of the working directory, which a checkout is, else of this checkout or package."""
    if _JOB_SH.is_file():
        return str(_JOB_SH)
    checkout = Path(__file__).resolve().parents[3] / _JOB_SH
    return str(checkout if checkout.is_file() else Path(__file__).resolve().with_name("job.sh"))


def with_command(site: Site) -> Site:
    """The site, calling hvd by this very Python where there is no .venv in the working directory."""
    if site.command or site.container != "none" or Path(PLAIN.split()[0]).exists():
        return site
    return dataclasses.replace(site, command=this_python())


def this_python() -> str:
    return f"{shlex.quote(sys.executable)} -m hvd.cli"


def _command(site: Site) -> str:
    """How hvd is called, after srun's own options."""
    if site.container == "pyxis":
        mounts = ",".join(["$PWD:$PWD", *site.mounts])
        flags = f'--container-image={site.image} --container-mounts="{mounts}" --container-workdir="$PWD"'
        return f"{flags} --no-container-mount-home {site.command or 'hvd'}"
    if site.container == "apptainer":
        binds = " ".join(f"--bind {mount}" for mount in site.mounts)
        nv = "${HVD_EXPECT_GPUS:+--nv}"
        flags = f'{nv} --pwd "$PWD" --bind "$PWD" {binds + " " if binds else ""}'
        return f"apptainer exec {flags}{site.image} {site.command or 'hvd'}"
    return site.command or PLAIN
