"""Success against delay for four ways to execute chunks that come late, by hand, with a trained policy run:

    python -m tests.benchmarks.bench_rtc --config demo --rollouts 200

A cell is `--rollouts` rollouts from the same starts. Delays are in control steps of 0.1 s.
"""

import argparse
import dataclasses
import tempfile

from hvd import overrides
from hvd.evaluate.command import roll_out
from hvd.evaluate.policies import trained
from hvd.tables import aligned
from hvd.train.complete import check_complete

DELAYS = (0, 1, 2, 4)
WAYS = ("replace", "ensemble", "guided")


def main() -> None:
    parser = argparse.ArgumentParser(description="success against delay, by the way that late chunks are executed")
    parser.add_argument("--config", default="demo")
    parser.add_argument("--rollouts", type=int, default=200)
    parser.add_argument("--first_start", type=int, default=4_000_000)
    args, rest = parser.parse_known_args()
    cfg = overrides.experiment(["--config", args.config, *rest])
    check_complete(cfg.policy_dir, stage="policy", cfg=cfg)
    rows = [["chunks", *(f"{100 * delay} ms" for delay in DELAYS)]]
    for way in WAYS:
        cells = []
        for delay in DELAYS:
            settings = dataclasses.replace(
                cfg.evaluate,
                num_rollouts=args.rollouts,
                seed=args.first_start,
                delay=delay,
                chunking=way,
                videos=0,
            )
            tried = dataclasses.replace(cfg, evaluate=settings)
            with tempfile.TemporaryDirectory() as scratch:
                results = roll_out(tried, cfg.policy.run_name, trained, {"digest": "", "step": 0}, out=scratch)
            success = results["success"]
            cells.append(f"{success['mean']:.3f} [{success['low']:.2f}, {success['high']:.2f}]")
        rows.append([way, *cells])
        print("\n".join(aligned(rows)), flush=True)


if __name__ == "__main__":
    main()
