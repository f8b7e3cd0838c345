"""Structured mistakes: each changes the actions of its own level only, in the frames that the log names."""

import collections

import numpy as np
import pytest

from hvd.robots import get_robot
from hvd.sim.mistakes import Log, PlannedMistake
from hvd.sim.tasks import get_task
from tests.benchmarks.sim_table import FATAL, episode

LEVELS = {level.name: list(level.dims) for level in get_robot("r1").levels}


@pytest.mark.parametrize(
    ("task", "plan"),
    [(task, plan) for task in FATAL for plan in FATAL[task]],
    ids=lambda x: x if isinstance(x, str) else f"{x.level}-{x.kind}-{x.phase}",
)
def test_a_mistake_that_is_not_noticed_fails_and_is_logged(task, plan):
    env, operator, actions = episode(task, plan)
    assert not env.success
    (mistake,) = operator.log.mistakes
    assert (mistake.level, mistake.kind) == (plan.level, plan.kind)
    assert 0 <= mistake.start < mistake.end <= len(actions)


def first_difference(task: str, plan: PlannedMistake) -> tuple[set[str], int, Log]:
    """Levels whose action differs from the clean episode's at the first frame that differs, that frame, the log."""
    _, operator, wrong = episode(task, plan)
    _, _, clean = episode(task)
    both = min(len(wrong), len(clean))
    differs = np.abs(wrong[:both] - clean[:both]) > 1e-9
    frame = int(np.flatnonzero(differs.any(axis=1))[0])
    return {name for name, dims in LEVELS.items() if differs[frame, dims].any()}, frame, operator.log


@pytest.mark.parametrize(
    "plan",
    [
        PlannedMistake("base", "stops_short", "approach", 0, (-0.4, 0.0), 20),
        PlannedMistake("base", "off_to_side", "approach", 0, (0.0, 0.35), 20),
        PlannedMistake("base", "detour", "approach", 4, (-0.35, 0.5), 16),
        PlannedMistake("torso", "late_bend", "approach", 0, (0.0, 0.0), 20),
        PlannedMistake("torso", "late_rise", "lift", 0, (0.0, 0.0), 20),
        PlannedMistake("arms", "too_high", "reach", 0, (0.0, 0.15), 20),
        PlannedMistake("arms", "too_wide", "reach", 0, (0.05, 0.0), 20),
        PlannedMistake("arms", "hesitates", "reach", 2, (0.0, 0.0), 15),
        PlannedMistake("arms", "releases_early", "lift", 5, (0.0, 0.0), 15),
    ],
    ids=lambda plan: plan.kind,
)
def test_only_the_level_at_fault_acts_differently(plan):
    levels, frame, log = first_difference("tote", plan)
    assert levels == {plan.level}
    (mistake,) = log.mistakes
    # a mistake is logged from when it matters; arms are at fault from the first frame that differs
    assert frame <= mistake.start <= frame + (0 if plan.level == "arms" else 12)


@pytest.mark.parametrize(
    ("task", "plan"),
    [
        ("tote", PlannedMistake("base", "stops_short", "approach", 0, (-0.4, 0.0), 20)),
        ("tote", PlannedMistake("torso", "late_rise", "lift", 0, (0.0, 0.0), 20)),
        ("pick", PlannedMistake("arms", "too_wide", "reach", 0, (0.06, 0.0), 20)),
        ("pick", PlannedMistake("base", "detour", "sidestep", 4, (-0.35, 0.5), 16)),
    ],
    ids=lambda x: x if isinstance(x, str) else x.kind,
)
def test_a_mistake_that_is_noticed_is_recovered_from(task, plan):
    env, operator, actions = episode(task, plan)
    assert env.success
    (mistake,) = operator.log.mistakes
    assert mistake.end < len(actions) - 20


@pytest.mark.parametrize("task", ["tote", "pick"])
def test_every_level_errs_often_and_in_several_ways(task):
    kinds = collections.defaultdict(collections.Counter)
    counts, noticed = collections.Counter(), []
    for seed in range(600):
        plans = get_task(task).mistakes(np.random.default_rng(seed))
        counts[len(plans)] += 1
        for plan in plans:
            kinds[plan.level][plan.kind] += 1
            noticed.append(plan.noticed)
        assert len({plan.level for plan in plans}) == len(plans)
    assert 0.05 < counts[0] / 600 < 0.2 and counts[2] > 60
    for level in LEVELS:
        assert sum(kinds[level].values()) > 170 and len(kinds[level]) >= 3
    assert 0.3 < np.mean(noticed) < 0.7
    assert get_task(task).mistakes(np.random.default_rng(599)) == plans


def test_log_joins_the_frames_of_one_mistake():
    log = Log()
    plan = PlannedMistake("torso", "late_bend", "approach", frames=3)
    for frame in (4, 5, 7):
        log.wrong(plan, frame)
    log.close()
    log.close()
    (mistake,) = log.mistakes
    assert (mistake.level, mistake.start, mistake.end, mistake.kind) == ("torso", 4, 8, "late_bend")
