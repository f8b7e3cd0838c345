"""Success against delay for the ways to execute chunks that come late, and success against flow steps, by hand, with
trained policy runs:

    hvd train-policy --config demo --policy.run_name prefix --policy.prefix_max 4    # beside the demo's own policy
    python -m tests.benchmarks.bench_rtc --config demo --prefix_run prefix           # success against delay
    python -m tests.benchmarks.bench_rtc --config demo --flow_steps 1 2 4 10         # success against flow steps

A cell is `--rollouts` rollouts from the same starts. Delays are in control steps of 0.1 s. `prefix` is executed with
the run that was trained with prefixes, the other ways with the config's own policy run.
"""

import argparse
import dataclasses
import tempfile
import time

from hvd import checks, overrides
from hvd.configs import Experiment
from hvd.evaluate.command import roll_out
from hvd.evaluate.policies import trained
from hvd.tables import aligned
from hvd.train.complete import check_complete

DELAYS = (0, 1, 2, 4)
WAYS = ("replace", "ensemble", "guided", "prefix")


def main() -> None:
    parser = argparse.ArgumentParser(description="success against delay and against flow steps")
    parser.add_argument("--config", default="demo")
    parser.add_argument("--rollouts", type=int, default=200)
    parser.add_argument("--first_start", type=int, default=4_000_000)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--delays", nargs="+", type=int, default=DELAYS, help="control steps")
    parser.add_argument("--prefix_run", default="", help="policy.run_name of a run trained with prefixes")
    parser.add_argument("--flow_steps", nargs="+", type=int, default=[], help="the other table, for so many steps")
    args, rest = parser.parse_known_args()
    cfg = overrides.experiment(["--config", args.config, *rest])
    common = {"num_rollouts": args.rollouts, "seed": args.first_start, "videos": 0}
    cfg = changed(cfg, "evaluate", **common)
    if args.flow_steps:
        rows = [["flow steps", *map(str, args.flow_steps)]]
        rows.append(["success", *(success(changed(cfg, "policy", num_flow_steps=n)) for n in args.flow_steps)])
        print("\n".join(aligned(rows)), flush=True)
        return
    rows = [["chunks", *(f"{100 * delay} ms" for delay in args.delays)]]
    for way in args.ways:
        tried = cfg
        if way == "prefix":
            if not args.prefix_run:
                continue
            tried = changed(cfg, "policy", run_name=args.prefix_run, prefix_max=max(DELAYS))
        rows.append([way, *(success(changed(tried, "evaluate", delay=delay, chunking=way)) for delay in args.delays)])
        print("\n".join(aligned(rows)), flush=True)


def changed(cfg: Experiment, group: str, **fields) -> Experiment:
    return dataclasses.replace(cfg, **{group: dataclasses.replace(getattr(cfg, group), **fields)})


def success(cfg: Experiment) -> str:
    """The cell of these settings."""
    checks.check_config(cfg)
    check_complete(cfg.policy_dir, stage="policy", cfg=cfg)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        results = roll_out(cfg, cfg.policy.run_name, trained, {"digest": "", "step": 0}, out=scratch)
    found = results["success"]
    cell = f"{found['mean']:.3f} [{found['low']:.2f}, {found['high']:.2f}]"
    how = f"{cfg.evaluate.chunking}, delay {cfg.evaluate.delay}, {cfg.policy.num_flow_steps} flow steps"
    print(f"{how}: {found['count']} of {found['n']}, {cell}, {time.monotonic() - begin:.0f} s", flush=True)
    return cell


if __name__ == "__main__":
    main()
