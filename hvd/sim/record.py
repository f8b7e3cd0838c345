"""`hvd simulate`: the scripted teleoperator's recordings of the simulated R1, as a user's own would lie on the disk.

Two sets below `<exp_dir>/recordings`: "optimal" holds clean successes only; "mixed" holds noise, structured mistakes,
failures and recoveries. Episodes are independent: processes write them in any order, each under a temporary name
first, and a second run makes only what is missing.
"""

import atexit
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hvd import documents
from hvd.configs import SIM_TASKS, Experiment, SimConfig
from hvd.errors import UserError
from hvd.files import write_atomic
from hvd.sim.env import Env
from hvd.sim.operators import operator_of
from hvd.sim.recording import RecordedEpisode, roll_out, write
from hvd.sim.render import Backend, Cameras, available_backend
from hvd.sim.workers import run_jobs

SETS = ("optimal", "mixed")
# What identifies recordings, and what those say that are older than a field
_STAMPED = ("task", "seed", "image_size", "horizon", "operator", "mistake_rate", "noticed", "operator_noise")
_OLDER = {name: getattr(SimConfig(), name) for name in _STAMPED[4:]}
_MAX_ATTEMPTS = 20  # for a clean success; the clean operator succeeds nearly always


def main(cfg: Experiment) -> None:
    """Write what is missing of `<exp_dir>/recordings/{optimal,mixed}/demo_NNNN.hdf5` and the label sidecars."""
    sim = cfg.sim
    if not sim.task:
        tasks = " or ".join(SIM_TASKS)
        raise UserError(f"config {cfg.name}: sim.task is not set: set it to {tasks}, or convert your recordings")
    if "://" in cfg.exp_dir:
        raise UserError(f"runs_dir {cfg.runs_dir}: recordings are HDF5 files and need a local folder")
    operator_of(sim)
    root = Path(cfg.exp_dir) / "recordings"
    _check_folder(root, sim)
    jobs = []
    for name, count in zip(SETS, (sim.num_optimal, sim.num_mixed), strict=True):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".*.tmp"):  # of a killed run
            stale.unlink()
        jobs += [(name, i) for i in range(count) if not recording_path(root, name, i).exists()]
    if not jobs:
        print(f"recordings: all {sim.num_optimal} optimal and {sim.num_mixed} mixed episodes are in {root}", flush=True)
        return
    backend = available_backend() if sim.image_size else None
    if backend == "rays":
        print("recordings: no OpenGL here (libEGL, libOSMesa): cameras are ray cast on the CPU, 2x slower", flush=True)
    bar = tqdm(total=len(jobs), desc=f"recordings {sim.task}", unit="episode", mininterval=0.5)
    with bar:
        for _ in run_jobs(record_one, [(sim, root, name, i, backend) for name, i in jobs], sim.workers):
            bar.update()


def _check_folder(root: Path, sim: SimConfig) -> None:
    """Recordings of another simulation, or more of them than asked for, must not end up in one dataset."""
    for name, count in zip(SETS, (sim.num_optimal, sim.num_mixed), strict=True):
        present = len(list((root / name).glob("demo_*.hdf5")))
        if present > count:
            raise UserError(
                f"{root / name} holds {present} recordings, sim.num_{name} is {count}: "
                "choose another exp_name or delete the folder"
            )
    wanted = {name: getattr(sim, name) for name in _STAMPED}
    stamp = root / "simulation.json"
    if stamp.exists():
        made = documents.read(stamp, dict[str, Any])
        for name, value in wanted.items():
            before = made.get(name, _OLDER.get(name))
            if before != value:
                raise UserError(
                    f"{root} was recorded with sim.{name} {before}, not {value}: "
                    "choose another exp_name or delete the folder"
                )
        return
    root.mkdir(parents=True, exist_ok=True)
    write_atomic(stamp, json.dumps(wanted) + "\n")


def recording_path(root: Path, name: str, index: int) -> Path:
    return root / name / f"demo_{index:04d}.hdf5"


def record_one(sim: SimConfig, root: Path, name: str, index: int, backend: Backend | None) -> None:
    """Record episode `index` of the set `name`; `backend` None records no cameras."""
    env, cameras = _simulator(sim, backend)
    write(record_episode(sim, name, index, env, cameras), recording_path(root, name, index))


def record_episode(sim: SimConfig, name: str, index: int, env: Env, cameras: Cameras | None) -> RecordedEpisode:
    """Episode `index` of the set `name` ("optimal": tries seeds until a clean success), the same on every machine."""
    mixed = name == "mixed"
    for attempt in range(1 if mixed else _MAX_ATTEMPTS):
        # Four numbers with a non-zero set: never the seed of an evaluation, which is one number.
        seed = (sim.seed, 1 + mixed, index, attempt)
        env.reset(seed)
        if mixed:
            rng = np.random.default_rng([3, *seed])
            chosen = operator_of(sim)
            plans = chosen.plans(rng, env.task, sim, index)
            retries, quality = bool(rng.random() < 0.7), float(rng.uniform(0.1, 0.7))
            quality = quality if sim.operator_noise == "clumsy" else 0.0
            operator = env.task.operator(env, seed, quality, retries, plans, chosen.concurrent)
            return roll_out(env, operator, cameras, "teleop" if retries else "rollout")
        operator = env.task.operator(env, seed)
        episode = roll_out(env, operator, cameras, "expert")
        if episode.labels.success and not operator.retries:
            return episode
    raise RuntimeError(f"no clean success in {_MAX_ATTEMPTS} attempts at optimal episode {index} of {sim.task}")


_simulators: dict[tuple, tuple[Env, Cameras | None]] = {}  # of this process: a model and a GL context are made once


def _simulator(sim: SimConfig, backend: Backend | None) -> tuple[Env, Cameras | None]:
    key = (sim.task, sim.horizon, sim.image_size, backend)
    if key not in _simulators:
        env = Env(sim.task, sim.horizon)
        cameras = Cameras(env.model, sim.image_size, sim.image_size, backend) if backend else None
        if cameras:
            atexit.register(cameras.close)  # while there is still a GL library to close it with
        _simulators[key] = env, cameras
    return _simulators[key]
