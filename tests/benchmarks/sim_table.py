"""How hard are the simulated tasks? Success of the scripted teleoperator by quality, of each structured mistake, and of
controls that must fail. Prints the tables; takes about 10 CPU-minutes with n = 100.

    python -m tests.benchmarks.sim_table [--n 100] [--tasks tote pick drawer stow] [--workers 2]
"""

import argparse
from collections.abc import Iterator

import numpy as np

from hvd.sim import scene
from hvd.sim.env import Env
from hvd.sim.mistakes import PlannedMistake
from hvd.sim.workers import run_jobs

QUALITIES = ((0.0, True), (0.5, True), (1.0, True), (1.0, False), (1.5, True), (1.5, False))
FROZEN = {
    "base": (scene.BASE, np.zeros(3)),
    "torso": (scene.TORSO, scene.HOME_TORSO),
    "left arm": (scene.LEFT_ARM, scene.HOME_LEFT),
    "right arm": (scene.RIGHT_ARM, scene.HOME_RIGHT),
}
# Mistakes that are never noticed, with the phase they begin in.
CARRY = (
    PlannedMistake("base", "off_to_side", "advance", 0, (0.0, 0.36)),
    PlannedMistake("torso", "no_bend", "approach"),
    PlannedMistake("torso", "no_rise", "lift"),
    PlannedMistake("arms", "releases_early", "sidestep", 4),
)
ADVANCE = (PlannedMistake("base", "stops_short", "advance", 0, (-0.36, 0.0)), *CARRY)
FATAL = {
    "tote": (
        PlannedMistake("base", "stops_short", "approach", 0, (-0.65, 0.0)),
        PlannedMistake("base", "off_to_side", "approach", 0, (0.0, 0.65)),
        PlannedMistake("arms", "too_high", "reach", 0, (0.0, 0.15)),
        PlannedMistake("arms", "too_wide", "reach", 0, (0.05, 0.0)),
        *ADVANCE,
    ),
    "pick": (
        PlannedMistake("base", "stops_short", "approach", 0, (-0.76, 0.0)),
        PlannedMistake("base", "off_to_side", "approach", 0, (0.0, -0.76)),
        PlannedMistake("arms", "too_high", "reach", 0, (0.0, 0.13)),
        PlannedMistake("arms", "too_wide", "reach", 0, (0.06, 0.0)),
        *ADVANCE,
    ),
    "stow": (
        PlannedMistake("base", "stops_short", "approach", 0, (-0.76, 0.0)),
        PlannedMistake("arms", "too_high", "reach", 0, (0.0, 0.13)),
        *CARRY,
    ),
    "drawer": (
        PlannedMistake("base", "stops_short", "approach", 0, (-0.6, 0.0)),
        PlannedMistake("base", "stops_short", "pull", 0, (0.3, 0.0)),
        PlannedMistake("torso", "no_bend", "approach"),
        PlannedMistake("torso", "leans", "pull", 4, (0.35, 0.0)),
        PlannedMistake("arms", "too_wide", "reach", 0, (0.06, 0.0)),
        PlannedMistake("arms", "releases_early", "pull", 4),
    ),
}


def episode(
    task: str, *plans: PlannedMistake, seed: int = 0, quality: float = 0.0, retries: bool = True, together: bool = False
):
    """Of the teleoperator, whose mistakes come one by one or together: env, operator, actions as followed [T, 21]."""
    env = Env(task)
    env.reset(seed)
    operator = env.task.operator(env, seed, quality, retries, plans, concurrent=together)
    actions = []
    while True:
        step = env.step(operator.act())
        actions.append(env.as_action(env.command))
        if step.done or operator.done:
            operator.log.close()
            return env, operator, np.array(actions)


def operator_run(task: str, seed: int, quality: float, retries: bool, *plans: PlannedMistake) -> tuple[bool, int]:
    """(success, steps) of one episode of the teleoperator."""
    env, *_ = episode(task, *plans, seed=seed, quality=quality, retries=retries)
    return env.success, env.time


def control_run(task: str, seed: int, control: str) -> tuple[bool, int]:
    """(success, steps) of "nothing", "random", or the clean teleoperator with a part of the robot frozen."""
    env = Env(task)
    env.reset(seed)
    operator, rng = env.task.operator(env, seed), np.random.default_rng(seed)
    hold = env.as_action(env.command)
    low, high = env.limits.T
    while True:
        if control == "nothing":
            action = hold
        elif control == "random":
            action = rng.uniform(low, high)
            action[scene.BASE] = rng.uniform(-1, 1, 3) * [scene.BASE_V, scene.BASE_V, scene.BASE_W]
            action[scene.GRIPPERS] = rng.uniform(0, 100, 2)
        else:
            action = operator.act()
            dims, still = FROZEN[control]
            action[dims] = still
        step = env.step(action)
        if step.done:
            return step.success, env.time


def _rate(function, jobs: list[tuple], workers: int) -> tuple[float, float]:
    results = [result for _, result in run_jobs(function, jobs, workers)]
    return float(np.mean([s for s, _ in results])), float(np.mean([t for _, t in results]))


def table(task: str, n: int, workers: int) -> Iterator[str]:
    yield f"\n{task}: teleoperator, n = {n}            success  mean steps"
    for quality, retries in QUALITIES:
        success, steps = _rate(operator_run, [(task, seed, quality, retries) for seed in range(n)], workers)
        name = f"quality {quality}" + ("" if retries else ", no retries")
        yield f"  {name:<34}{success:>8.2f}{steps:>12.0f}"
    few = max(2, n // 5)
    yield f"{task}: one mistake that is never noticed, n = {few}"
    for plan in FATAL[task]:
        success, steps = _rate(operator_run, [(task, seed, 0.0, True, plan) for seed in range(few)], workers)
        yield f"  {plan.level + ' ' + plan.kind + ' at ' + plan.phase:<34}{success:>8.2f}{steps:>12.0f}"
    yield f"{task}: controls, n = {few}"
    for control in ("nothing", "random", *(f"{part}" for part in FROZEN)):
        success, steps = _rate(control_run, [(task, seed, control) for seed in range(few)], workers)
        name = control if control not in FROZEN else f"clean teleoperator, {control} frozen"
        yield f"  {name:<34}{success:>8.2f}{steps:>12.0f}"


if __name__ == "__main__":
    from tests.benchmarks import sim_table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--tasks", nargs="+", default=["tote", "pick", "drawer", "stow"])
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    for task in args.tasks:
        for line in sim_table.table(task, args.n, args.workers):  # by a name that the workers find
            print(line, flush=True)
