"""One command for both stages: python launch/submit.py --stage all|value|policy [--config NAME] [--field value]...

Checks what can be checked, then runs the stage's steps here, or as jobs of a Slurm or Kubernetes cluster. A rerun
goes on where the last one stopped. Exit codes: 0 complete (or queued), 2 the user's mistake, 143 stopped after saving,
1 anything else.
"""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvd import overrides
from hvd.checks import check_config, check_datasets, check_devices, check_weights, check_writable
from hvd.clusters import local
from hvd.clusters.kubernetes import manifests as kubernetes
from hvd.clusters.kubernetes import queue
from hvd.clusters.slurm import site
from hvd.clusters.slurm import submission as slurm
from hvd.configs import Experiment
from hvd.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_USER, Failed, UserError
from hvd.fields import AT_LEAST_1, option
from hvd.launch import fit, steps

CLUSTERS = ("auto", "local", "slurm", "kubernetes")


@dataclass(frozen=True)
class Submit:
    """What the launcher itself is told; other options say which experiment, or are fields of its config."""

    stage: Literal["all", "value", "policy"] = option("all", "value and policy need what comes before them")
    nodes: int = option(1, AT_LEAST_1, "nodes of a job; on this machine processes that share its cores or GPUs")
    cluster: Literal["auto", "local", "slurm", "kubernetes"] = option(
        "auto", "auto is Slurm where it answers, else this machine"
    )
    dry_run: bool = option(False, "print the commands, or the batch scripts, and run nothing")
    detach: bool = option(False, "run in the background, with a log; on Kubernetes: do not follow the Jobs")
    devices: str = option(
        "", "of a node, such as 8xh100-80gb, for the memory plan; on this machine nvidia-smi is asked"
    )
    plan: bool = option(True, "refuse a job that cannot fit its devices (`hvd plan`)")
    after: str = option(
        "", "start only after this job has completed, such as the value job of --stage policy (Slurm: its id)"
    )


_ABOUT = """Run a stage's steps here, or as jobs of a cluster; a rerun goes on where the last one stopped.

Every field of the config can be set: --exp-name my_run --model.method expectile --value.batch_size 128
(`hvd train-policy --help --config NAME` lists them). So can any setting of slurm/site.toml (--slurm.partition gpu,
--slurm.time 4:00:00, ...) and those of docs/kubernetes.md (--kubernetes.image registry/hvd:1, ...)."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if overrides.asks_help(argv):
        parts = (Submit(), overrides.Choice("demo"), overrides.RunDirectory())
        overrides.print_help("python launch/submit.py --stage all", _ABOUT, *parts)
        return EXIT_COMPLETE
    try:
        return submit(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        return EXIT_FAILED


def submit(argv: list[str]) -> int:
    """Parse, check, and run or print. Raises UserError; nothing is written before everything has been checked."""
    options, rest, for_clusters = parse(argv)
    passed_on, overwrite = overrides.take_overwrite(rest)
    cfg = overrides.experiment(passed_on)
    place = choose_cluster(options.cluster)
    for cluster, flags in for_clusters.items():
        if flags and place != cluster:
            raise UserError(f"{flags[0].token} is for --cluster {cluster}, this is {place}")
    if place == "kubernetes":
        return to_kubernetes(cfg, options, passed_on, for_clusters["kubernetes"], overwrite)
    if place == "slurm":
        return to_slurm(cfg, options, passed_on, for_clusters["slurm"], overwrite)
    if options.after:
        raise UserError(f"--after is for --cluster slurm and kubernetes, this is {place}")
    return here(cfg, options, passed_on, overwrite, argv)


def here(cfg: Experiment, options: Submit, passed_on: list[str], overwrite: bool, argv: Sequence[str]) -> int:
    """Run the steps on this machine."""
    found = local.gpus()
    if found and len(found) < options.nodes:
        raise UserError(f"--nodes {options.nodes}: this machine has only {len(found)} GPU(s) to divide among them")
    check(cfg, options, local.devices(options.nodes), options.nodes)
    plan = steps.plan(cfg, options.stage, passed_on, overwrite)
    log_dir = logs(cfg)
    if options.dry_run:
        print("\n".join(commands(plan, options.nodes)))
        return EXIT_COMPLETE
    if options.plan:
        fit.check(options.stage, passed_on, options.devices, options.nodes)
    if options.detach:
        return detach(argv, log_dir)
    started = time.monotonic()
    code = local.Runner(log_dir, options.nodes).run(plan)
    if code == EXIT_COMPLETE:
        finish(cfg, options.stage, time.monotonic() - started)
    return code


def to_slurm(
    cfg: Experiment, options: Submit, passed_on: list[str], for_site: list[overrides.Flag], overwrite: bool
) -> int:
    """Put the stage's jobs into Slurm's queue, or print their scripts."""
    if options.after and not options.after.isdigit():
        raise UserError(f"--after {options.after!r} is no job id")
    settings = site.load(for_site)
    gpus = slurm.gpus(cfg, settings, asked=any(flag.field == "slurm.gpus_per_node" for flag in for_site))
    jobs = slurm.jobs(cfg, options.stage, passed_on, options.nodes, settings, gpus, overwrite)
    check(cfg, options, *slurm.devices(jobs[0].request, settings), on_cluster=True)
    if options.dry_run:
        for job in jobs:
            waits = slurm.dependency(f"<id of the {job.after} job>" if job.after else options.after)
            if len(jobs) > 1 or waits:
                print(f"# ---- sbatch {' '.join([*waits, f'{job.request.stage}.sbatch'])}")
            print(job.script, end="")
        return EXIT_COMPLETE
    kind = f"{gpus}x{settings.gpu}" if gpus and settings.gpu else ""
    if options.plan and (options.devices or kind):
        fit.check(options.stage, passed_on, options.devices or kind, options.nodes)
    for job in jobs:
        print(slurm.describe(job), flush=True)
    slurm.check(jobs)
    for job, number in zip(jobs, slurm.submit(jobs, options.after), strict=True):
        waits = f", after the {job.after} job" if job.after else ""
        print(f"{job.request.stage}: job {number}{waits}; log {site.JOBS_DIR}/{number}.log")
    print("follow them: hvd jobs; hvd jobs logs ID -f")
    return EXIT_COMPLETE


def to_kubernetes(
    cfg: Experiment, options: Submit, passed_on: list[str], flags: list[overrides.Flag], overwrite: bool
) -> int:
    """Apply the stage's manifests, or print them; follows the Jobs unless --detach."""
    asked = kubernetes.settings(flags)
    if options.after and (options.stage != "policy" or not queue.is_name(options.after)):
        raise UserError(f"--after {options.after!r}: it names the value Job that --stage policy waits for")
    check_config(cfg)
    manifests = kubernetes.render(
        cfg, options.stage, passed_on, options.nodes, asked, after=options.after, overwrite=overwrite
    )
    gpus = kubernetes.gpus(manifests)
    check_devices(cfg, options.nodes * max(1, gpus), options.nodes)
    if options.dry_run:
        print(kubernetes.to_yaml(manifests), end="")
        return EXIT_COMPLETE
    if not shutil.which("kubectl"):
        raise UserError("--cluster kubernetes: there is no kubectl on this machine")
    kind = options.devices or (f"{gpus}x{asked.gpu}" if gpus and asked.gpu else "")
    if options.plan and kind:
        fit.check(options.stage, passed_on, kind, options.nodes)
    names = kubernetes.submit(manifests)
    print(f"follow them: hvd jobs; hvd jobs logs {names[0]} -f", flush=True)
    return EXIT_COMPLETE if options.detach else kubernetes.follow(names)


def parse(argv: Sequence[str]) -> tuple[Submit, list[str], dict[str, list[overrides.Flag]]]:
    """The launcher's own options, the experiment's, and the flags of each cluster (--slurm.NAME, ...)."""
    flags = overrides.split_flags(argv)
    theirs = {name: [flag for flag in flags if flag.field.startswith(f"{name}.")] for name in ("slurm", "kubernetes")}
    others = [flag for flag in flags if not flag.field.startswith(("slurm.", "kubernetes."))]
    options, rest = overrides.take(Submit(), overrides.joined(others))
    choice, fields = overrides.take(overrides.Choice(), rest)
    if not choice.config_file:
        choice = dataclasses.replace(choice, config=choice.config or "demo")
    return options, [*choice.as_flags(), *fields], theirs


def choose_cluster(asked: str) -> str:
    """The place a job runs at: what was asked for; auto is Slurm where it answers, else this machine."""
    if asked != "auto":
        return asked
    if slurm.available():
        return "slurm"
    if queue.available():
        print("--cluster auto: running on this machine (kubectl has a context: --cluster kubernetes would use it)")
    return "local"


def check(cfg: Experiment, options: Submit, devices: int, processes: int, *, on_cluster: bool = False) -> None:
    """Everything that can be known before a step runs; raises UserError. `devices`: of all processes."""
    check_config(cfg)
    check_devices(cfg, devices, processes)
    check_datasets(cfg)
    check_weights(cfg, ("value", "policy") if options.stage == "all" else (options.stage,))
    check_writable(cfg.exp_dir)
    check_writable(cfg.assets_dir)
    # a script is printed for later, and --after is a value job that is not complete yet: the job itself asks again
    later = bool(options.after) or (options.dry_run and on_cluster)
    if options.stage == "policy" and steps.needs_value(cfg) and not later:
        from hvd.train.complete import check_complete

        check_complete(cfg.value_dir, stage="value", cfg=cfg)


def logs(cfg: Experiment) -> Path:
    """Folder of the steps' logs: in the experiment's, or below runs/ when that is remote."""
    name = cfg.exp_name or cfg.name
    return (Path("runs") / name if "://" in cfg.exp_dir else Path(cfg.exp_dir)) / "logs"


def commands(plan: Sequence[steps.Group], nodes: int) -> list[str]:
    """The plan as shell commands, one a line; what runs at the same time is said in a comment."""
    lines = []
    for group in plan:
        at_a_time = len(local.core_shares(len(group)))
        if len(group) > 1:
            lines.append(f"# the next {len(group)}: {at_a_time} at a time, each on its share of the cores")
        for task in group:
            count = nodes if task.spread else 1
            for index in range(count):
                env = local.node_environment("127.0.0.1:PORT", count, index) if count > 1 else {}
                words = [f"{name}={value}" for name, value in env.items()]
                command = [*local.COMMAND, *task.args]
                lines.append(" ".join([*words, shlex.join(command)]) + (" &" if index < count - 1 else ""))
    return lines


def detach(argv: Sequence[str], log_dir: Path) -> int:
    """The same command without --detach, in a session of its own; prints how to follow and to stop it."""
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / "submit.log"
    again = [flag for flag in overrides.split_flags(argv) if flag.field != "detach"]
    command = [sys.executable, "-m", "hvd.launch.submit", *overrides.joined(again)]
    with open(log, "a", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    print(f"running in the background: process {process.pid}, log {log}")
    print(f"follow it: tail -f {shlex.quote(str(log))}; stop it (it saves): kill {process.pid}")
    return EXIT_COMPLETE


def finish(cfg: Experiment, stage: str, seconds: float) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
