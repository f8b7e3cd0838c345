"""OPERATORS: who records the mixed set (--sim.operator), by the mistakes that the scripted teleoperator is to make."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hvd.configs import SimConfig
from hvd.errors import UserError, nearest
from hvd.sim.mistakes import LEVELS, PlannedMistake
from hvd.sim.tasks import Task, get_task


@dataclass(frozen=True)
class Operator:
    """What --sim.operator chooses.

    Attributes:
        plans: (random generator, task, cfg, number of the episode) -> the mistakes of the episode.
        concurrent: levels err independently, and a mistake of one does not stop the others (hvd.sim.slots).
    """

    plans: Callable[[np.random.Generator, Task, SimConfig, int], tuple[PlannedMistake, ...]]
    concurrent: bool = True


def casual(rng: np.random.Generator, task: Task, sim: SimConfig, index: int) -> tuple[PlannedMistake, ...]:
    """Mostly one mistake, at a random level, sometimes a second one, rarely none."""
    return task.mistakes(rng)


def bad_level(rng: np.random.Generator, task: Task, sim: SimConfig, index: int) -> tuple[PlannedMistake, ...]:
    """One level errs, at each of its opportunities: another one in each episode."""
    return _at_opportunities(rng, task, sim, {LEVELS[index % 3]}, sim.noticed)


def bad_levels(rng: np.random.Generator, task: Task, sim: SimConfig, index: int) -> tuple[PlannedMistake, ...]:
    """Two of the three levels err, at each of their opportunities: others in each episode. A pair of
    mistakes is noticed as often as one of bad_level, and later: clean frames of all levels at once are rare."""
    return _at_opportunities(rng, task, sim, set(LEVELS) - {LEVELS[index % 3]}, sim.noticed**0.5, slowly=1.5)


OPERATORS: dict[str, Operator] = {
    "casual": Operator(casual, concurrent=False),
    "bad_level": Operator(bad_level),
    "bad_levels": Operator(bad_levels),
}


def operator_of(sim: SimConfig) -> Operator:
    """The one that `sim` names; UserError where there is none, or where the task says no opportunities for it."""
    if sim.operator not in OPERATORS:
        raise UserError(f"sim.operator: unknown {sim.operator!r}{nearest(sim.operator, OPERATORS)}")
    chosen = OPERATORS[sim.operator]
    if chosen.concurrent and not get_task(sim.task).opportunities:
        raise UserError(f"sim.operator {sim.operator}: task {sim.task} names no opportunities to err; use casual")
    return chosen


def _at_opportunities(
    rng: np.random.Generator, task: Task, sim: SimConfig, levels: set[str], noticed: float, slowly: float = 1.0
) -> tuple[PlannedMistake, ...]:
    used = [o for o in task.opportunities if o.level in levels and rng.random() < sim.mistake_rate * o.share]
    return tuple(opportunity.plan(rng, noticed, slowly) for opportunity in used)
