"""The simulated R1 as an environment: units, determinism, limits, what it observes, sub-tasks and rewards."""

import mujoco
import numpy as np
import pytest

from hvd.configs import SIM_TASKS
from hvd.robots import get_robot
from hvd.sim import scene
from hvd.sim.env import Env, canonical_quat
from hvd.sim.tasks import get_task


def hold(env: Env) -> np.ndarray:
    action = env.as_action(env.command)
    action[scene.BASE] = 0
    return action


def put_object(env: Env, position, quat=(1, 0, 0, 0)) -> None:
    """Teleport the object, at rest."""
    env.data.qpos[env.object_qpos : env.object_qpos + 7] = [*position, *quat]
    dof = env.model.joint("object").dofadr[0]
    env.data.qvel[dof : dof + 6] = 0
    mujoco.mj_forward(env.model, env.data)


def test_actuators_are_in_the_r1s_order():
    robot = get_robot("r1")
    assert len(scene.ACTUATED) == robot.action_dim
    for ours, name in zip(scene.ACTUATED, robot.action_names, strict=True):
        side, part = name.split("_", 1)
        if part.startswith("arm"):
            assert ours == f"{side}_{int(name[-1]) + 1}"
        elif part == "gripper":
            assert ours == f"{side}_fa"
        elif side == "torso":
            assert ours == f"torso_{int(part) + 1}"
    assert [scene.ACTUATED[i] for i in scene.BASE] == ["base_x", "base_y", "base_yaw"]
    assert dict(zip(robot.level_names, robot.level_dims, strict=True))["base"] == tuple(scene.BASE)
    env = Env("pick")
    assert tuple(env.model.actuator(i).name for i in range(env.model.nu)) == scene.ACTUATED


@pytest.mark.parametrize("task", SIM_TASKS)
def test_same_seed_same_episode(task):
    def run(seed):
        env = Env(task)
        env.reset(seed)
        states = []
        for t in range(8):
            env.step(hold(env) + 0.02 * np.sin(t + np.arange(21)))
            states.append(np.concatenate([env.state(), env.environment_state()]))
        return np.array(states)

    np.testing.assert_array_equal(run(3), run(3))
    assert not np.array_equal(run(3), run(4))
    assert not np.array_equal(run(3), run((3, 1, 0, 0)))


def test_base_drives_in_its_own_frame_and_within_its_limits():
    env = Env("tote")
    env.reset(0)
    start = env.base_pose()
    action = hold(env)
    action[scene.BASE] = [9.0, 0.0, 0.0]
    for _ in range(10):
        env.step(action)
    vx, vy, wz = env.base_velocity()
    assert vx == pytest.approx(scene.BASE_V, abs=0.03)
    assert abs(vy) < 0.03 and abs(wz) < 0.03
    np.testing.assert_allclose(env.state()[scene.BASE], [vx, vy, wz], atol=1e-5)
    moved = env.base_pose()[:2] - start[:2]
    heading = np.array([np.cos(start[2]), np.sin(start[2])])
    assert moved @ heading / np.linalg.norm(moved) > 0.999
    assert env.command[scene.BASE[0]] == scene.BASE_V


def test_actions_are_limited_to_speeds_and_joint_ranges():
    env = Env("tote")
    env.reset(0)
    before = env.command.copy()
    target = env.limit(np.full(21, 100.0))
    travel = np.abs(target - before)
    assert np.all(travel[scene.LEFT_ARM] <= scene.ARM_V * scene.CONTROL_DT + 1e-9)
    assert np.all(travel[scene.TORSO] <= scene.TORSO_V * scene.CONTROL_DT + 1e-9)
    assert np.all(target[scene.JOINTS] <= env.limits[scene.JOINTS, 1])
    assert target[scene.LEFT_GRIPPER] == pytest.approx(scene.GRIPPER_STROKE)
    np.testing.assert_allclose(env.as_action(target)[scene.GRIPPERS], 100)
    np.testing.assert_allclose(env.limit(env.as_action(target))[scene.TORSO], target[scene.TORSO])
    with pytest.raises(ValueError, match="NaN"):
        env.step(np.full(21, np.nan))


def test_grippers_are_0_to_100():
    env = Env("tote")
    env.reset(0)
    action = hold(env)
    for value in (0.0, 100.0):
        action[scene.GRIPPERS] = value
        for _ in range(15):
            env.step(action)
        np.testing.assert_allclose(env.state()[scene.GRIPPERS], value, atol=8)


def test_environment_state_is_base_pose_and_object_in_the_base_frame():
    env = Env("tote")
    env.reset(5)
    x, y, yaw = env.base_pose()
    position, _ = env.object_pose()
    got = env.environment_state()
    np.testing.assert_allclose(got[:4], [x, y, np.sin(yaw), np.cos(yaw)], atol=1e-6)
    c, s = np.cos(yaw), np.sin(yaw)
    back = np.array([x + c * got[4] - s * got[5], y + s * got[4] + c * got[5], got[6]])
    np.testing.assert_allclose(back, position, atol=1e-5)
    assert got.shape == (11,) and got.dtype == np.float32
    assert np.linalg.norm(got[7:]) == pytest.approx(1, abs=1e-5) and got[7] > 0


def test_object_that_looks_the_same_is_observed_the_same():
    for task, turns in (("tote", 2), ("pick", 4)):
        env = Env(task)
        env.reset(1)
        position, _ = env.object_pose()
        seen = []
        for k in range(turns):
            for sign in (1, -1):
                half = (0.2 + k * 2 * np.pi / turns) / 2
                put_object(env, position, sign * np.array([np.cos(half), 0, 0, np.sin(half)]))
                seen.append(env.environment_state())
        for other in seen[1:]:
            np.testing.assert_allclose(other, seen[0], atol=1e-5)


def test_canonical_quat_is_the_nearest_to_identity():
    rng = np.random.default_rng(0)
    for task in map(get_task, SIM_TASKS):
        for _ in range(50):
            quat = rng.normal(size=4)
            quat /= np.linalg.norm(quat)
            got = canonical_quat(quat, task.symmetries)
            assert got[0] >= np.abs(quat[0]) - 1e-9
            for symmetry in task.symmetries:
                twin = np.zeros(4)
                mujoco.mju_mulQuat(twin, quat, symmetry)
                np.testing.assert_allclose(canonical_quat(-twin, task.symmetries), got, atol=1e-9)


@pytest.mark.parametrize("task", SIM_TASKS)
def test_a_clean_episode_earns_each_subtask_once(task):
    env = Env(task)
    env.reset(0)
    operator = env.task.operator(env, 0)
    events = []
    while True:
        step = env.step(operator.act())
        if step.event:
            events.append((step.event, step.reward))
        if step.done:
            break
    assert events == [(name, 1.0) for name in get_task(task).subtasks]
    assert step.success and not step.dropped and env.best_stage == 4


def test_a_lost_object_takes_its_rewards_back():
    """From any state the return is what is still to be won, so dropping and grasping again earns nothing."""
    env = Env("tote")
    env.reset(0)
    operator = env.task.operator(env, 0)
    total = 0.0
    while env.stage < 3:
        total += env.step(operator.act()).reward
    assert total == 3
    put_object(env, [scene.SHELF_X, -0.4, scene.SHELF_HEIGHT + 0.07])
    lost = []
    for _ in range(8):
        step = env.step(hold(env))
        total += step.reward
        lost.append(step.event)
    assert "lost" in lost and total == env.stage < 3
    assert env.best_stage == 3 and not step.done


def test_object_on_the_floor_ends_the_episode():
    env = Env("tote")
    env.reset(0)
    put_object(env, [0.3, 1.5, 0.07])
    step = env.step(hold(env))
    assert step.dropped and step.done and not step.success


def test_placed_needs_rest_and_no_touch():
    env = Env("tote", horizon=50)
    env.reset(0)
    on_goal = [*scene.TABLE_XY, scene.TABLE_HEIGHT + 0.07]
    put_object(env, on_goal)
    steps = [env.step(hold(env)) for _ in range(3)]
    assert [s.success for s in steps] == [False, False, True]
    assert steps[-1].event == "placed" and steps[-1].reward == 4
    # In the air above the goal, or upside, or beside the goal, it is not placed
    for position, quat in (
        ([*scene.TABLE_XY, scene.TABLE_HEIGHT + 0.4], (1, 0, 0, 0)),
        ([*scene.TABLE_XY, scene.TABLE_HEIGHT + 0.09], (np.sqrt(0.5), 0, np.sqrt(0.5), 0)),
        ([scene.TABLE_XY[0], scene.TABLE_XY[1] + 0.3, scene.TABLE_HEIGHT + 0.07], (1, 0, 0, 0)),
    ):
        env.reset(0)
        put_object(env, position, quat)
        assert not any(env.step(hold(env)).success for _ in range(2))


def test_time_runs_out():
    env = Env("pick", horizon=3)
    env.reset(0)
    assert [env.step(hold(env)).done for _ in range(3)] == [False, False, True]


def slide(env: Env, opened: float) -> None:
    """Put the drawer so many metres open, at rest."""
    env.data.qpos[env.object_qpos] = -opened
    env.data.qvel[env.model.joint("object").dofadr[0]] = 0
    mujoco.mj_forward(env.model, env.data)


def test_a_drawer_is_left_open_not_closed_or_held():
    env = Env("drawer")
    env.reset(0)
    start, _ = env.object_pose()
    slide(env, 0.3)
    assert not any(env.step(hold(env)).success for _ in range(4))  # not far enough
    slide(env, 0.4)
    steps = [env.step(hold(env)) for _ in range(3)]
    assert [s.success for s in steps] == [False, False, True] and steps[-1].event == "left"
    np.testing.assert_allclose(start - env.object_pose()[0], [0.4, 0, 0], atol=1e-3)
    assert not steps[-1].dropped


def test_a_drawer_that_closes_again_takes_its_reward_back():
    env = Env("drawer")
    env.reset(0)
    operator = env.task.operator(env, 0)
    while env.stage < 3:
        env.step(operator.act())
    slide(env, 0.1)
    step = env.step(operator.act())
    assert step.event == "lost" and step.reward == -2 and env.stage == 1 and not step.done


def test_stowed_is_on_top_of_the_cabinet():
    env = Env("stow")
    env.reset(0)
    mark = env.model.geom("mark").pos
    put_object(env, [*mark[:2], mark[2] + 0.05])
    assert [env.step(hold(env)).success for _ in range(3)] == [False, False, True]
    env.reset(0)
    put_object(env, [*scene.TABLE_XY, scene.TABLE_HEIGHT + 0.05])  # pick's goal
    assert not any(env.step(hold(env)).success for _ in range(4))


def test_furniture_stands_in_its_own_task_only():
    with pytest.raises(KeyError):
        Env("pick").model.geom("cabinet")
    assert Env("stow").model.nq == Env("pick").model.nq == Env("drawer").model.nq + 6
