"""The batch script of a Slurm job: directives, settings, and the steps. The program that it sources is slurm/job.sh.

slurm/value.sbatch and slurm/awr.sbatch are what this renders by default.
"""

import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvd import gpu_environment
from hvd.clusters.slurm import options
from hvd.clusters.slurm.site import JOBS_DIR, Site
from hvd.errors import UserError
from hvd.stages import Step

PLAIN = ".venv/bin/python -m hvd.cli"
NAMES = {
    "value": "value stage",
    "policy": "policy stage",
    "evaluate": "baselines, evaluation and report",
    "site": "hvd site check",
}
_JOB_SH = Path("slurm") / "job.sh"


@dataclass(frozen=True)
class BatchJob:
    """A job to be.

    Attributes:
        options: tell its steps the config.
        gpus: of a node; 0 = a job on CPUs.
        after: the stage that it waits for; "" = none.
        exp_dir: of the experiment; `run_dir` is one of its folders, "" for a job that is about several.
    """

    stage: str
    steps: Sequence[Step]
    options: tuple[str, ...]
    nodes: int
    gpus: int
    site: Site
    run_dir: str = ""
    after: str = ""
    exp_dir: str = ""

    @property
    def devices(self) -> tuple[int, int]:
        """(devices, processes) over all nodes."""
        processes = self.nodes * self.site.tasks_per_node
        return (self.nodes * self.gpus if self.gpus else processes), processes

    def describe(self) -> str:
        """What is asked for in one line."""
        words = [line.removeprefix("--") for line in option_lines(self)]
        kept = [word for word in words if not word.startswith(("job-name", "open-mode", "output"))]
        if self.site.container != "none":
            kept.append(f"{self.site.container}={self.site.image}")
        return f"{self.stage}: " + " ".join(kept)


def directives(job: BatchJob) -> dict[str, str | None]:
    """Options of sbatch, in the order in which they are written; None = an option without a value.

    What `site.extra` says in its own words is left out.
    """
    site, gpus, tasks = job.site, job.gpus, job.site.tasks_per_node
    asked: dict[str, str | None] = {
        "job-name": f"hvd-{job.stage}",
        "nodes": str(job.nodes),
        "ntasks-per-node": str(tasks),
    }
    if gpus:
        count = f"{site.gres_type}:{gpus}" if site.gres_type else str(gpus)
        asked |= {"gres": f"gpu:{count}"} if site.gpus_as == "gres" else {"gpus-per-node": count}
    asked["cpus-per-task"] = str(max(1, (site.cpus_per_gpu * gpus if gpus else site.cpus) // tasks))
    if site.mem_per_cpu:
        asked["mem-per-cpu"] = site.mem_per_cpu
    elif memory := _times(site.mem_per_gpu, gpus) if gpus else site.mem:
        asked["mem"] = memory
    asked["time"] = site.time
    for name in ("partition", "account", "qos", "constraint", "reservation", "exclude", "clusters"):
        if value := getattr(site, name):
            asked[name] = value
    if site.exclusive:
        asked["exclusive"] = None
    if site.grace:
        asked["signal"] = f"USR1@{site.grace}"  # to the steps, not to the script
    asked["requeue" if site.requeue else "no-requeue"] = None
    asked["open-mode"] = "append"
    asked["output"] = _output()
    said = {options.kind(option) for option in site.extra}
    return {name: value for name, value in asked.items() if options.kind(_option(name, value)) not in said}


def option_lines(job: BatchJob) -> list[str]:
    """All options as they are written. UserError where `extra` asks for other GPUs than the job is planned for."""
    for option in job.site.extra:
        if options.kind(option) in options.REFUSED:
            raise UserError(f"slurm.extra {option}: the launcher's --nodes and slurm.tasks_per_node are for that")
        gpus = options.gpus_of_a_node(option, job.nodes, job.site.tasks_per_node)
        if gpus is not None and gpus != job.gpus:
            raise UserError(
                f"slurm.extra {option} is {gpus} GPUs of a node, the {job.stage} job is for {job.gpus} "
                '(slurm.gpus_per_node; gpus_as = "gres" writes --gres for each job)'
            )
        if options.kind(option) == "array" and not option.endswith("%1"):
            raise UserError(
                f"slurm.extra {option}: all jobs of an array work on one run; --array=1-5%1 has one follow the other"
            )
    return [_option(name, value) for name, value in directives(job).items()] + list(job.site.extra)


def _option(name: str, value: str | None) -> str:
    return f"--{name}" if value is None else f"--{name}={value}"


def _output() -> str:
    """The log. sbatch makes the path absolute, and Slurm replaces % in all of it."""
    here = str(Path.cwd())
    return f'"{here.replace("%", "%%")}/{JOBS_DIR}/%j.log"' if "%" in here else f"{JOBS_DIR}/%j.log"


def _times(size: str, factor: int) -> str:
    unit = size.lstrip("0123456789")
    return size and f"{int(size.removesuffix(unit)) * factor}{unit}"


def render(job: BatchJob) -> str:
    """The whole script."""
    site = job.site
    program = job_sh()
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH {option}" for option in option_lines(job)]
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
        if "@" in site.image:  # by digest: every step logs it, and nodes compare theirs
            lines.append(f"export HVD_IMAGE={shlex.quote(site.image)}")
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
        flags = f'--container-image={pyxis_image(site.image)} --container-mounts="{mounts}" --container-workdir="$PWD"'
        return f"{flags} --no-container-mount-home {site.command or 'hvd'}"
    if site.container == "apptainer":
        binds = " ".join(f"--bind {mount}" for mount in site.mounts)
        nv = "${HVD_EXPECT_GPUS:+--nv}"
        flags = f'{nv} --pwd "$PWD" --bind "$PWD" {binds + " " if binds else ""}'
        return f"apptainer exec {flags}{site.image} {site.command or 'hvd'}"
    return site.command or PLAIN


def pyxis_image(image: str) -> str:
    """The image in pyxis' words. It takes a file for one that begins with . or /, all else for a name of Docker Hub,
    and a registry ends with # (before enroot 4 a / did not do)."""
    if image.endswith((".sqsh", ".squashfs")) and "#" not in image:
        return image if image.startswith((".", "/")) else f"./{image}"
    scheme = "docker://" if image.startswith("docker://") else ""
    host, slash, rest = image.removeprefix(scheme).partition("/")
    is_registry = (
        slash and "#" not in image and not image.startswith(("/", ".")) and re.search(r"[.:]|^localhost$", host)
    )
    return f"{scheme}{host}#{rest}" if is_registry else image
