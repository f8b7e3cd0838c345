import pytest

from hvd.errors import UserError
from hvd.experiments import CONFIGS, get_config
from hvd.robots import ROBOTS, Level, Robot, get_robot


def test_layouts_are_the_published_ones():
    r1 = get_robot("r1")
    assert r1.action_dim == 21 and r1.level_names == ("base", "torso", "arms")
    assert r1.level_dims == ((7, 8, 9), (17, 18, 19, 20), (0, 1, 2, 3, 4, 5, 6, 10, 11, 12, 13, 14, 15, 16))
    assert (
        r1.action_names[6] == "left_gripper"
        and r1.action_names[16] == "right_gripper"
        and r1.action_names[9] == "base_wz"
    )
    assert get_robot("r1_pro").action_dim == 23 and get_robot("g1").action_dim == 26
    assert get_robot("g1").level_dims == (tuple(range(7)), tuple(range(7, 14)), tuple(range(14, 26)))


@pytest.mark.parametrize("name", ROBOTS)
def test_every_dim_is_named_and_in_one_level(name):
    robot = ROBOTS[name]
    assert len(set(robot.action_names)) == robot.action_dim
    assert sorted(d for dims in robot.level_dims for d in dims) == list(range(robot.action_dim))


def test_base_velocities_are_not_positions():
    mask = get_robot("r1").delta_mask()
    assert sum(mask) == 18 and not any(mask[7:10])


def test_a_layout_with_a_missing_dim_is_refused():
    with pytest.raises(ValueError, match="exactly once"):
        Robot("x", ("a", "b"), (Level("all", (0,)),), (0,))


def test_unknown_robot_offers_the_nearest():
    with pytest.raises(UserError, match="unknown robot 'r1pro'; nearest: r1_pro"):
        get_robot("r1pro")


@pytest.mark.parametrize("name", CONFIGS)
def test_named_configs_are_sound(name):
    cfg = get_config(name).resolved()
    assert cfg.name == name
    robot = get_robot(cfg.robot)
    assert robot.action_dim <= cfg.model.action_dim
    assert sorted(d for dims in cfg.levels() for d in dims) == list(range(robot.action_dim))
    assert cfg.model.action_horizon % cfg.model.action_patch == 0
    assert cfg.datasets()


def test_simulated_datasets_lie_in_the_experiment():
    import dataclasses

    cfg = dataclasses.replace(get_config("demo"), exp_name="mine", runs_dir="out").resolved()
    assert (
        cfg.optimal_data.root == "out/mine/datasets/optimal" and cfg.suboptimal_data.root == "out/mine/datasets/mixed"
    )


def test_flat_q_is_one_level():
    import dataclasses

    cfg = get_config("demo")
    flat = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, network_type="q"))
    assert flat.levels() == (tuple(range(21)),) and flat.level_names() == ("all",)
