"""One command for all stages: python launch/submit.py --stage all|value|policy|evaluate [--config NAME] [--field X]...

Checks what can be checked, then hands the stage to a cluster (hvd.clusters): this machine, Slurm, Kubernetes. A rerun
goes on where the last one stopped. Exit codes: 0 complete (or queued), 2 the user's mistake, 143 stopped after saving,
1 anything else.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hvd import overrides
from hvd.checks import check_config, check_devices
from hvd.clusters import base
from hvd.clusters.base import Planned, Request
from hvd.configs import Experiment
from hvd.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_USER, Failed, UserError
from hvd.fields import AT_LEAST_1, option, to_plain
from hvd.files import write_atomic
from hvd.launch import fit
from hvd.method import value_run
from hvd.stages import needs_value
from hvd.train.inputs import check_datasets, check_weights, check_writable


@dataclass(frozen=True)
class Submit:
    """What the launcher itself is told; other options say which experiment, or are fields of its config."""

    stage: Literal["all", "value", "policy", "evaluate"] = option("all", "each needs what comes before it")
    nodes: int = option(1, AT_LEAST_1, "nodes of a job; on this machine processes that share its cores or GPUs")
    cluster: str = option("auto", f"{', '.join(base.names())}; auto is Slurm where it answers, else this machine")
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
    options, rest, settings = parse(argv, Submit())
    given, overwrite = overrides.take_overwrite(rest)
    here = options.cluster == "auto" or base.get(options.cluster).shares_files
    cfg = overrides.experiment(given, here=here)
    name = choose(options.cluster, settings)
    cluster = base.get(name, settings)
    check_config(cfg)
    planned = cluster.plan(Request(cfg, options.stage, tuple(given), options.nodes, overwrite, options.after))
    check(planned, files=cluster.shares_files, later=options.dry_run and not cluster.stays, queued=not cluster.stays)
    if options.dry_run:
        print(planned.text, end="")
        return EXIT_COMPLETE
    if options.plan and (options.devices or planned.hardware):
        nodes = options.nodes if options.devices else planned.hardware_nodes
        fit.check(options.stage, given, options.devices or planned.hardware, nodes)
    cluster.check(planned)
    if cluster.shares_files:
        request = dataclasses.replace(planned.request, options=("--config-file", config_file(cfg)))
        planned = cluster.plan(request)
    again = [flag for flag in overrides.split_flags(argv) if options.detach and flag.field != "detach"]
    jobs = cluster.submit(planned, overrides.joined(again))
    for job in jobs:
        if job.log:
            after = f", after the {job.after} job" if job.after else ""
            print(f"{job.stage}: job {job.id}{after}; log {job.log}", flush=True)
    if any(job.log for job in jobs):
        print(f"follow them: hvd jobs{jobs[0].where}; hvd jobs logs {jobs[0].id} -f{jobs[0].where}", flush=True)
    codes = (cluster.wait(job.id, None) for job in jobs if cluster.stays and not options.detach)
    return next((code for code in codes if code), EXIT_COMPLETE)


def choose(asked: str, settings: Sequence[overrides.Flag]) -> str:
    """The cluster's name; UserError for settings of another one."""
    name = base.choose(asked)
    for flag in settings:
        if not flag.field.startswith(f"{name}."):
            raise UserError(f"{flag.token} is for --cluster {flag.field.partition('.')[0]}, this is {name}")
    return name


def parse[T](argv: Sequence[str], own: T) -> tuple[T, list[str], list[overrides.Flag]]:
    """A command's own options, the experiment's, and the settings of clusters (--slurm.NAME, ...)."""
    prefixes = tuple(f"{name}." for name in base.names())
    flags = overrides.split_flags(_with_dashes(argv))
    settings = [flag for flag in flags if flag.field.startswith(prefixes)]
    options, rest = overrides.take(own, overrides.joined([flag for flag in flags if flag not in settings]))
    choice, fields = overrides.take(overrides.Choice(), rest)
    if not choice.config_file:
        choice = dataclasses.replace(choice, config=choice.config or "demo")
    return options, [*choice.as_flags(), *fields], settings


def _with_dashes(argv: Sequence[str]) -> list[str]:
    """`--slurm.extra --x=y`, an option of sbatch as a value, as `--slurm.extra=--x=y`; all that are given count."""
    words, extra = [], []
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if name != "--slurm.extra":
            words.append(word)
        elif (found := value if equals else next(rest, "")).startswith("-"):
            extra.append(found)
        else:
            words += [name, found] if found else [name]
    return [*words, "--slurm.extra", *([json.dumps(extra)])] if extra else words


def check(planned: Planned, *, files: bool, later: bool, queued: bool) -> None:
    """Everything that can be known before a step runs; raises UserError.

    Args:
        files: datasets, weights and run folders are where this machine sees them.
        later: it is printed, and another time submitted.
        queued: it may wait for hours: every byte of the value run is read now, and not only by the step.
    """
    request, cfg = planned.request, planned.request.cfg
    check_devices(cfg, planned.devices, planned.processes)
    if not files:
        return
    check_datasets(cfg)
    trained = {"all": ("value", "policy"), "evaluate": ("policy",) if cfg.evaluate.baselines else ()}
    check_weights(cfg, trained.get(request.stage, (request.stage,)))
    check_writable(cfg.exp_dir)
    check_writable(cfg.assets_dir)
    # --after is a value job that is not complete yet: the job itself asks again
    given = request.stage == "all" and cfg.policy.value_run
    if (request.stage == "policy" or given) and needs_value(cfg) and not later and not request.after:
        value_run.check(cfg, digests=queued)  # a step that starts now reads every byte itself
    if request.stage == "evaluate" and not later and not request.after:
        from hvd.train.complete import check_complete

        check_complete(cfg.policy_dir, stage="policy", cfg=cfg, digests=queued)
    if given:
        print(f"value stage: left out, the policy takes {cfg.policy.value_run} (policy.value_run)", flush=True)


def config_file(cfg: Experiment) -> str:
    """The resolved config as a file of the experiment's folder (below runs/ when that is remote), for its steps.

    It is named by what it holds: a job in the queue keeps its own when the next one is submitted with another config.
    """
    from hvd.train import run_dir  # etils.epath: a tenth of a second of the launcher's start

    data = to_plain(cfg)
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
    folder = os.path.join("runs", cfg.exp_name or cfg.name) if "://" in cfg.exp_dir else cfg.exp_dir
    path = os.path.join(folder, "configs", f"{digest}.yaml")
    if not os.path.exists(path):
        import yaml

        write_atomic(path, yaml.safe_dump({"version": run_dir.code_version(), "config": data}, sort_keys=False))
    return path


if __name__ == "__main__":
    sys.exit(main())
