"""The scripted teleoperator: clean success, what quality and retries do, and controls that must fail.

Small numbers here; tests/benchmarks/sim_table.py prints the tables with n = 100.
"""

import numpy as np
import pytest

from hvd.configs import SIM_TASKS
from hvd.sim.env import Env
from hvd.sim.kinematics import BODY, BodyIK, rot_x, rot_y, rot_z, wrap
from tests.benchmarks.sim_table import control_run, operator_run


@pytest.mark.parametrize("task", SIM_TASKS)
def test_clean_operator_succeeds(task):
    runs = [operator_run(task, seed, 0.0, True) for seed in (11, 12, 13)]
    assert all(success for success, _ in runs)
    assert all(60 < steps < 160 for _, steps in runs)


@pytest.mark.parametrize("task", SIM_TASKS)
@pytest.mark.parametrize("control", ["nothing", "random", "base", "torso"])
def test_controls_fail(task, control):
    assert not control_run(task, 21, control)[0]


@pytest.mark.parametrize("arm", ["left arm", "right arm"])
def test_the_tote_takes_both_arms(arm):
    assert not control_run("tote", 22, arm)[0]


def test_clumsiness_costs_and_retries_help():
    """On these seeds; the table has the rates."""
    seeds = (0, 4)
    assert not any(operator_run("pick", seed, 1.0, False)[0] for seed in seeds)
    assert all(operator_run("pick", seed, 1.0, True)[0] for seed in seeds)


def test_operator_is_deterministic_and_its_noise_follows_the_seed():
    def actions(seed):
        env = Env("tote")
        env.reset(1)
        operator = env.task.operator(env, seed, quality=1.0)
        return np.stack([operator.act() for _ in range(3)])

    np.testing.assert_array_equal(actions(5), actions(5))
    assert not np.array_equal(actions(5), actions(6))


def test_hands_reach_their_targets():
    env = Env("tote")
    env.reset(2)
    ik = BodyIK(env)
    goals = {
        side: (env.hand_position(side) + [0.05, 0.02, -0.05], env.data.site(f"{side}_hand").xmat.reshape(3, 3).copy())
        for side in ("left", "right")
    }
    torso = env.command[BODY][:4].copy()
    q = env.command[BODY]
    for _ in range(8):
        q, error = ik.solve(q, goals, torso)
    assert error < 0.005
    low, high = env.limits[BODY].T
    assert np.all((q >= low) & (q <= high))
    still, _ = ik.solve(env.command[BODY], goals, torso, torso_free=False)
    np.testing.assert_array_equal(still[:4], env.command[BODY][:4])


def test_rotations():
    np.testing.assert_allclose(rot_z(np.pi / 2) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(rot_x(np.pi / 2) @ [0, 1, 0], [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(rot_y(np.pi / 2) @ [0, 0, 1], [1, 0, 0], atol=1e-12)
    assert wrap(3 * np.pi) == pytest.approx(-np.pi)
