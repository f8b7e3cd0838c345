"""hvd plan: does a training run fit its devices? Memory by category from the compiled step, without the devices.

The compiler is XLA's GPU compiler where jax's CUDA plugin is installed (it needs no GPU), else XLA's compiler for CPUs,
whose figure is an upper bound. It runs in a process of its own, and its answers are kept. Imports no jax.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hvd import overrides
from hvd.accelerators import MEMORY_FRACTION
from hvd.checks import check_config, check_devices
from hvd.configs import Experiment
from hvd.errors import EXIT_COMPLETE, EXIT_USER, UserError
from hvd.fields import option
from hvd.method import value_run
from hvd.plan import advice as plan_advice
from hvd.plan import devices as plan_devices
from hvd.plan import report as plan_report
from hvd.plan.devices import Cluster
from hvd.plan.measure import SECONDS, Measurer, cache_folder, has_cuda_compiler
from hvd.plan.request import Compiler, Request, Stage
from hvd.plan.verdict import Verdict

SMALL = 50  # `--certain`: a stage whose state fills less than a 50th of a device is taken to fit


@dataclass(frozen=True)
class Options:
    """What `hvd plan` itself is told; every other option says which experiment, or is a field of its config."""

    devices: str = option("", "devices of a node, such as 8xh100-80gb; needed")
    nodes: int = option(1, "how many such nodes")
    stage: Literal["both", "value", "policy"] = option("both")
    compiler: Literal["auto", "cuda", "cpu"] = option(
        "auto", "cuda (XLA's GPU compiler, no GPU needed), cpu (upper bound), auto = cuda where it is installed"
    )
    reserve: float = option(
        -1.0, "GiB of a device left to CUDA, its libraries and NCCL; -1 = 0.75, or 1.25 with several devices"
    )
    advice: bool = option(True, "where it does not fit, find out what would")
    quick: bool = option(False, "compile nothing: only say what state, gradients and batch need")
    certain: bool = option(False, "compile only where that can prove that a stage does not fit (the launcher asks so)")
    cache: bool = option(True, "use and keep results in ~/.cache/hvd/plans")
    timeout: float = option(SECONDS, "seconds for one compilation")
    buffers: bool = option(False, "also list the largest buffers that are no argument of the step")
    json: bool = option(False, "print one JSON object instead of tables")


def main(argv: Sequence[str]) -> int:
    """Print the plan. Exit code 0: all stages that were asked for fit, or may; 2: one cannot fit."""
    if overrides.asks_help(argv):
        about = "Does a training run fit its devices? All fields of the config are options too. Known devices: "
        about += ", ".join(plan_devices.accelerators.ACCELERATORS)
        overrides.print_help("hvd plan --config NAME --devices 8xh100-80gb", about, Options(), overrides.Choice())
        return EXIT_COMPLETE
    options, rest = parse(argv)
    cluster = plan_devices.parse(options.devices, options.nodes)
    cfg = overrides.experiment(rest)
    check_config(cfg)
    check_devices(cfg, cluster.count, cluster.nodes)
    planner = Planner(options, rest)
    verdicts = []
    for stage in stages(cfg, options.stage):
        verdict = planner.judge(stage, [], cluster)
        found = planner.advise(verdict) if verdict.fits is False and options.advice else None
        verdicts.append((verdict, found))
        if not options.json:
            print(plan_report.text(verdict, found), flush=True)
            if options.buffers:
                print(plan_report.buffers(verdict), flush=True)
    if options.json:
        print(json.dumps({"plans": [plan_report.as_json(*each) for each in verdicts]}))
    return EXIT_USER if any(verdict.fits is False for verdict, _ in verdicts) else EXIT_COMPLETE


def parse(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """The planner's own options, and the rest as it was."""
    options, rest = overrides.take(Options(), argv)
    if not options.devices:
        raise UserError("--devices is missing: the devices of a node, such as --devices 8xh100-80gb")
    if options.compiler == "cuda" and not has_cuda_compiler():
        raise UserError(
            "--compiler cuda: jax's CUDA plugin is not installed (uv sync --extra cuda12); no GPU is needed"
        )
    return options, rest


def stages(cfg: Experiment, asked: Literal["both", "value", "policy"]) -> list[Stage]:
    """Of the experiment, in their order; imitation, and a policy with another run's values, have no value stage."""
    if asked != "both":
        return [asked]
    return ["value", "policy"] if value_run.own_needed(cfg) else ["policy"]


def memory_fraction() -> float:
    """Of a device's free memory, that JAX takes for its pool: the user's setting, or that of hvd's runs."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        value = os.environ.get(name, "")
        if value:
            try:
                return float(value)
            except ValueError:
                raise UserError(f"{name} {value!r} is not a number") from None
    return MEMORY_FRACTION


class Planner:
    """Verdicts and advice for one command line."""

    def __init__(self, options: Options, argv: Sequence[str]):
        self.options, self.argv = options, list(argv)
        auto: Compiler = "cuda" if has_cuda_compiler() else "cpu"
        self.compiler: Compiler = auto if options.compiler == "auto" else options.compiler
        self.measure = Measurer(cache_folder() if options.cache else None, options.timeout, _say)

    def judge(self, stage: Stage, flags: Sequence[str], cluster: Cluster, *, thorough: bool = False) -> Verdict:
        """The verdict of a stage with these flags behind the command line's, on these devices.

        Args:
            thorough: compile although `--quick` or `--certain` would not.

        Raises:
            UserError: the flags contradict the config or the devices.
        """
        argv = [*self.argv, *flags]
        cfg = overrides.experiment(argv)
        check_config(cfg)
        check_devices(cfg, cluster.count, cluster.nodes)
        options = self.options
        limit = cluster.limit(memory_fraction(), None if options.reserve < 0 else int(options.reserve * (1 << 30)))
        _say(f"{stage} stage on {cluster}{' with ' + ' '.join(flags) if flags else ''}")
        request = Request(
            argv=argv,
            stage=stage,
            device=cluster.name,
            per_node=cluster.per_node,
            nodes=cluster.nodes,
            compiler=self.compiler,
            limit=limit,
            enough=limit // SMALL if options.certain and not thorough else 0,
            arguments_only=not thorough and (options.quick or (options.certain and self.compiler == "cpu")),
        )
        return Verdict(cfg, stage, cluster, limit, self.measure(request))

    def advise(self, verdict: Verdict) -> tuple[plan_advice.Change, Verdict] | None:
        """The cheapest change that makes the stage fit. Compiles for minutes."""
        _say(f"{verdict.stage} stage {plan_report.conclusion(verdict)}; looking for what would (--no-advice does not)")

        def judge(flags: list[str], cluster: Cluster) -> Verdict | None:
            try:
                return self.judge(verdict.stage, flags, cluster, thorough=True)
            except UserError:  # the batch cannot be divided so
                return None

        return plan_advice.search(verdict, judge)


def _say(line: str) -> None:
    print(f"plan: {line}", file=sys.stderr, flush=True)
