"""Who records the mixed set: which mistakes, made at the same time, and who only waits."""

import dataclasses
import json

import numpy as np
import pytest

from hvd.configs import SIM_TASKS, Experiment, SimConfig
from hvd.errors import UserError
from hvd.robots import get_robot
from hvd.sim import operators, record
from hvd.sim.env import Env
from hvd.sim.mistakes import LEVELS, Log, PlannedMistake
from hvd.sim.tasks import get_task
from tests.benchmarks.sim_table import episode

DIMS = {level.name: list(level.dims) for level in get_robot("r1").levels}
BASE = PlannedMistake("base", "off_to_side", "approach", 0, (0.0, 0.5), 25)
TORSO = PlannedMistake("torso", "late_bend", "approach", 0, (0.0, 0.0), 20)


def run(plans):
    """Success, the log, and the actions of an episode of tote with concurrent mistakes."""
    env, operator, actions = episode("tote", *plans, together=True)
    return env.success, operator.log, actions


def frames(spans, level: str) -> set[int]:
    return {frame for span in spans if span.level == level for frame in range(span.start, span.end)}


def test_two_levels_err_at_the_same_time_and_the_third_waits():
    success, log, _ = run([BASE, TORSO])
    assert success
    both = frames(log.mistakes, "base") & frames(log.mistakes, "torso")
    assert len(both) > 5
    assert len(frames(log.mistakes, "base")) == 25  # as many as the plan says until it is noticed
    waiting = frames(log.waiting, "arms")
    assert waiting and not frames(log.mistakes, "arms")
    for level in LEVELS:
        assert not frames(log.waiting, level) & frames(log.mistakes, level)


def test_the_others_go_on_while_a_level_errs():
    """The base does not bring the tote to the table; torso and arms have lifted it in the meantime, as they would."""
    side = PlannedMistake("base", "off_to_side", "advance", 0, (0.0, 0.4), 20)
    success, log, wrong = run([side])
    _, _, right = run([])
    first = next(iter(sorted(frames(log.mistakes, "base"))))
    np.testing.assert_allclose(wrong[:first], right[:first], atol=1e-9)
    np.testing.assert_allclose(wrong[first][DIMS["torso"]], right[first][DIMS["torso"]], atol=1e-9)
    assert success and len(wrong) - len(right) < 30
    assert min(frames(log.waiting, "torso")) > first + 12 < min(frames(log.waiting, "arms"))  # longer than usual


@pytest.mark.parametrize("task", SIM_TASKS)
def test_every_task_has_opportunities_for_every_level(task):
    """The phases are those of the operator, and some mistake of every level ends the attempt."""
    found = get_task(task).opportunities
    assert {o.level for o in found} == {o.level for o in found if o.final or o.hopeless} == set(LEVELS)
    for opportunity in found:
        assert all(hasattr(get_task(task).operator, f"phase_{phase}") for phase in opportunity.phases)
    made = [plan for seed in range(50) for plan in get_task(task).mistakes(np.random.default_rng(seed))]
    assert {plan.level for plan in made} == set(LEVELS) and 0.2 < np.mean([plan.noticed for plan in made]) < 0.8


def test_nobody_waits_where_nobody_errs():
    success, log, _ = run([])
    assert success and not log.waiting and not log.mistakes


def test_a_mistake_that_is_not_noticed_ends_the_attempt():
    success, log, actions = run([dataclasses.replace(BASE, frames=0)])
    assert not success and len(actions) < 60
    assert max(frames(log.mistakes, "base")) == len(actions) - 1
    assert max(frames(log.waiting, "arms")) == len(actions) - 1  # it stands still only because the base does


def test_waiting_joins_neighbouring_frames():
    log = Log()
    for level, frame in (("arms", 3), ("torso", 4), ("arms", 4), ("arms", 7)):
        log.waits(level, frame)
    assert [(w.level, w.start, w.end) for w in log.waiting] == [("arms", 3, 5), ("torso", 4, 5), ("arms", 7, 8)]


def plans(operator: str, index: int, **changes) -> tuple[PlannedMistake, ...]:
    sim = SimConfig(task="tote", operator=operator, **changes)
    rng = np.random.default_rng(index)
    return operators.operator_of(sim).plans(rng, get_task("tote"), sim, index)


def test_the_bad_levels_err_at_each_of_their_opportunities():
    for index in range(6):
        assert {plan.level for plan in plans("bad_level", index)} == {LEVELS[index % 3]}
        assert {plan.level for plan in plans("bad_levels", index)} == set(LEVELS) - {LEVELS[index % 3]}
    assert [plan.phase for plan in plans("bad_level", 0)] == ["approach", "sidestep", "advance"]
    assert not plans("bad_level", 0, mistake_rate=0.0)


@pytest.mark.parametrize("operator", ["bad_level", "bad_levels"])
def test_who_notices(operator):
    """What ends the attempt is noticed with sim.noticed; what does not, always."""
    every = [plan for index in range(30) for plan in plans(operator, index, noticed=1.0)]
    assert all(plan.noticed for plan in every if plan.kind != "releases_early")
    never = [plan for index in range(30) for plan in plans(operator, index, noticed=0.0)]
    unnoticed = {(plan.level, plan.kind) for plan in never if not plan.noticed}
    assert {"no_bend", "stops_short", "off_to_side", "too_high", "releases_early"} <= {kind for _, kind in unnoticed}
    assert not {"detour", "hesitates", "late_rise", "late_bend"} & {kind for _, kind in unnoticed}


def test_recordings_of_a_bad_level(tmp_path):
    sim = SimConfig(task="tote", operator="bad_level", num_optimal=1, num_mixed=1, image_size=0, workers=1)
    clumsy = record.record_episode(sim, "mixed", 0, Env("tote"), None)
    steady = record.record_episode(dataclasses.replace(sim, operator_noise="steady"), "mixed", 0, Env("tote"), None)
    for each in (clumsy, steady):
        assert {mistake.level for mistake in each.labels.mistakes} == {"base"} and each.labels.waiting
    assert abs(np.diff(steady.action[:20, 17], axis=0)).min() == 0 < abs(np.diff(clumsy.action[:20, 17], axis=0)).min()


def test_the_stamp_says_who_recorded(tmp_path):
    sim = SimConfig(task="tote", num_optimal=1, num_mixed=1)
    root = tmp_path / "recordings"
    root.mkdir()
    (root / "simulation.json").write_text(json.dumps({"task": "tote", "seed": 0, "image_size": 96, "horizon": 200}))
    record._check_folder(root, sim)  # older than the operators: casual
    with pytest.raises(UserError, match=r"sim\.operator casual, not bad_level"):
        record._check_folder(root, dataclasses.replace(sim, operator="bad_level"))


def test_an_operator_that_is_not_there_or_not_for_the_task(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"unknown 'badlevel'; nearest: bad_level"):
        record.main(Experiment("x", runs_dir=str(tmp_path), sim=SimConfig(task="tote", operator="badlevel")))
    plain = dataclasses.replace(get_task("tote"), opportunities=())
    monkeypatch.setattr(operators, "get_task", lambda name: plain)
    with pytest.raises(UserError, match="task tote names no opportunities to err; use casual"):
        operators.operator_of(SimConfig(task="tote", operator="bad_levels"))
    assert not list(tmp_path.iterdir())
