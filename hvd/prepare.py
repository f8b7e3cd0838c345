"""`hvd prepare`: what a stage needs before it can train, in one step: simulated recordings, their datasets, statistics.

For configs whose data are the user's own only the statistics are left to do; what is there already is not done again.
Batch files call it, so that they are the same for every config.
"""

import os

from hvd.configs import Experiment


def main(cfg: Experiment) -> None:
    """Run the steps one after the other."""
    from hvd.data import convert, normalize

    if cfg.sim.task:
        from hvd.sim import record

        record.main(cfg)
        for _, args in conversions(cfg):
            convert.main(args)
    normalize.main(cfg)


def conversions(cfg: Experiment) -> list[tuple[str, list[str]]]:
    """(name of the set, arguments of `hvd convert`) for each dataset of a simulated config."""
    folders = {"optimal": "optimal", "suboptimal": "mixed"}
    return [
        (
            folders[role],
            [
                *("--raw-dirs", os.path.join(cfg.exp_dir, "recordings", folders[role])),
                *("--repo-id", data.repo_id, "--root", str(data.path())),
            ],
        )
        for role, data in cfg.datasets()
    ]
