"""The folder of a run becomes this job's: whether it is complete already, who works on it, what is written first."""

from collections.abc import Callable

import numpy as np
from etils import epath

from hvd import files
from hvd.configs import Experiment
from hvd.data import normalize
from hvd.errors import EXIT_LOST, EXIT_USER, Lost, UserError
from hvd.runtime import owner, records
from hvd.train import checkpoints, complete
from hvd.train import run_dir as runs
from hvd.train.mesh import Devices
from hvd.train.stage_data import StageData


def already_complete(folder: str, cfg: Experiment, stage: runs.Stage) -> bool:
    """True, and says so, if the run is complete at the configured step; UserError if it is damaged or longer."""
    if not (epath.Path(folder) / runs.COMPLETE).exists():
        return False
    found = complete.read_complete(folder)
    if found.step < getattr(cfg, stage).num_train_steps:
        complete.check_complete(folder, stage=stage)
        return False  # it is to be continued
    complete.check_complete(folder, stage=stage, cfg=cfg)
    print(f"{folder}: complete at step {found.step}, nothing to do", flush=True)
    return True


def take(data: StageData, folder: str, devices: Devices, inputs: dict[str, str], *, overwrite: bool) -> None:
    """Make the folder this run's (--overwrite: emptied first): config.yaml and the norm stats are written.

    Raises:
        UserError: another job works on it, it holds another run, or what --overwrite does not delete; nothing is
            changed then.
        Lost: whether another job works on it cannot be found out.
    """
    cfg, stage = data.cfg, data.stage
    runs.check_startable(folder, cfg, stage, inputs, overwrite=overwrite)
    devices.barrier("checked")  # no process writes before all have looked
    by_main(devices, folder, lambda: owner.claim(folder))
    if devices.is_main:
        if overwrite:
            runs.delete(folder)
        files.remove_left_over(folder)
        before = runs.read(folder)
        own = getattr(cfg, stage)
        checkpoints.say_kept(stage, own.save_interval, own.keep_period)
        if before is not None:
            checkpoints.keep_older(folder, *(getattr(c, stage).keep_period for c in (before.config, cfg)))
        if not (epath.Path(folder) / runs.COMPLETE).exists():  # else `run` does, once complete.json is gone
            runs.write_config(folder, cfg, stage, inputs)
            normalize.save(epath.Path(folder) / runs.NORM_STATS, data.transform.stats, data.made_of)
        records.tell_begun(folder)
    devices.barrier("claimed")


def by_main(devices: Devices, folder: str, action: Callable[[], int | None]) -> int:
    """What the main process's action gives, on all of them; where it is refused, all of them end."""
    refused: UserError | Lost | None = None
    found = 0
    if devices.is_main:
        try:
            found = action() or 0
        except (UserError, Lost) as error:
            refused, found = error, -EXIT_USER if isinstance(error, UserError) else -EXIT_LOST
    found = int(devices.from_main(np.asarray(found)))
    if found < 0:
        raise refused or (Lost if found == -EXIT_LOST else UserError)(f"{folder}: the main process says why")
    return found


def go_on(folder: str, cfg: Experiment, stage: runs.Stage, inputs: dict[str, str]) -> None:
    """A run that goes on is not complete. Its config.yaml is the present one once nothing says what it was."""
    done = epath.Path(folder) / runs.COMPLETE
    if done.exists():
        done.unlink()
        runs.write_config(folder, cfg, stage, inputs)
