"""`hvd prepare`: what a stage needs before it can train, in one step: simulated recordings, their datasets, statistics.

For configs whose data are the user's own only the statistics are left to do; what is there already is not done again.
It is the first step of the value stage (hvd.stages).
"""

import os
import time

from hvd.configs import Experiment
from hvd.runtime import processes


def main(cfg: Experiment) -> None:
    """Run the steps one after the other. Of several processes (the pods of a run) the first one does it.

    The others wait for what is written last. If the first one fails, its scheduler ends them with it.
    """
    from hvd.data import convert, normalize

    if processes.rank():
        wanted = [normalize.path_for(cfg, data.repo_id) for data in normalize.datasets_of(cfg)]
        print(f"waiting for process 0 to prepare {', '.join(map(str, wanted))}", flush=True)
        while not all(path.exists() for path in wanted):
            time.sleep(1)
        return
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
                *(() if cfg.sim.image_size else ("--cameras",)),
            ],
        )
        for role, data in cfg.datasets()
        if role in folders
    ]
