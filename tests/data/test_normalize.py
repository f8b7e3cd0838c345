"""Normalisation against openpi's numbers, statistics against plain numpy, and that an experiment shares them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd.configs import DataConfig, Experiment, KeyMap, ModelConfig, NormConfig
from hvd.data import normalize
from hvd.data.dataset import Dataset
from hvd.data.normalize import NormStats, RunningStats
from hvd.data.running_stats import BINS
from hvd.data.transitions import Transitions
from hvd.errors import UserError
from hvd.robots import get_robot
from tests.data.factory import make_dataset, write_dataset
from tests.folders import golden_files

FIELDS = ("mean", "std", "q01", "q99")
MODES = {"z": "z_score", "q": "quantile"}


def stats_of(golden) -> NormStats:
    return NormStats(*(golden[k].astype(np.float64) for k in FIELDS))


def close(a, b):
    """1e-5 of the larger of 1 and the value: a constant dim is divided by 1e-6 and reaches millions."""
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", golden_files("normalize.npz"), ids=lambda p: p.name)
def test_golden_running_stats(path):
    golden = np.load(path)
    running = RunningStats()
    for batch in golden["data"]:
        running.update(batch)
    for name in FIELDS:
        close(getattr(running.result(), name), golden[name])


@pytest.mark.parametrize("path", golden_files("normalize.npz"), ids=lambda p: p.name)
@pytest.mark.parametrize("prefix", MODES)
def test_golden_normalize(path, prefix):
    golden, mode = np.load(path), MODES[prefix]
    stats = stats_of(golden)
    for name in ("state", "actions", "short"):
        close(normalize.normalize(golden[name], stats, mode), golden[f"{prefix}_{name}"])
    close(normalize.unnormalize(golden["state"], stats, mode), golden[f"u{prefix}_state"])
    dims = stats.dim  # we cut the padding, openpi carries it along
    padded = golden["actions_padded"][..., :dims]
    close(normalize.unnormalize(padded, stats, mode), golden[f"u{prefix}_actions_padded"][..., :dims])


@pytest.mark.parametrize("path", golden_files("normalize_json_stats.npz"), ids=lambda p: p.name)
@pytest.mark.parametrize("prefix", MODES)
def test_golden_stats_file(path, prefix, tmp_path):
    """openpi's own norm_stats.json gives its numbers, and survives being read and written."""
    stats = normalize.load(epath.Path(path.parent / "norm_stats.json"))
    state = np.load(path.parent / "normalize.npz")["state"]
    close(normalize.normalize(state, stats["state"], MODES[prefix]), np.load(path)[f"{prefix}_state"])
    copy = epath.Path(tmp_path / "a/norm_stats.json")
    normalize.save(copy, stats)
    assert json.loads(copy.read_text()) == json.loads((path.parent / "norm_stats.json").read_text())


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["z_score", "quantile"]), st.sampled_from([0.0, 0.01, 5.0]))
def test_unnormalize_is_the_inverse(seed, mode, std_floor):
    rng = np.random.default_rng(seed)
    data = (rng.normal(size=(50, 3)) * [1, 100, 0] + [0, 5, 2]).astype(np.float32)
    running = RunningStats()
    running.update(data)
    stats = running.result()
    x = normalize.normalize(data, stats, mode, std_floor)
    np.testing.assert_allclose(normalize.unnormalize(x, stats, mode, std_floor), data, atol=1e-4)


def test_std_floor_tames_a_constant_dim():
    running = RunningStats()
    running.update(np.full((10, 1), 2.0))
    moved = np.asarray([[2.5]])
    for mode in ("z_score", "quantile"):
        assert abs(normalize.normalize(moved, running.result(), mode)[0, 0]) > 1e5
        assert abs(normalize.normalize(moved, running.result(), mode, std_floor=0.1)[0, 0]) < 10


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(2, 3000), st.integers(1, 5))
def test_statistics_in_any_batches(seed, n, batches):
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(n, 4)) ** 3
    running = RunningStats(data.min(0), data.max(0))
    for part in np.array_split(data, batches):
        running.update(part)
    stats = running.result()
    np.testing.assert_allclose(stats.mean, data.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(stats.std, data.std(0), rtol=1e-6, atol=1e-9)
    width = np.ptp(data, axis=0) / BINS
    for q, got in ((0.01, stats.q01), (0.99, stats.q99)):
        exact = np.quantile(data, q, axis=0, method="inverted_cdf")
        assert np.all(np.abs(got - exact) <= 1.001 * width + 1e-9)


def experiment(tmp_path, *recipes, **changes) -> Experiment:
    data = [r.config for r in recipes] + [DataConfig()] * (2 - len(recipes))
    return Experiment(
        name="test",
        assets_dir=str(tmp_path / "assets"),
        model=ModelConfig(action_horizon=5, cameras=()),
        optimal_data=data[0],
        suboptimal_data=data[1],
        **changes,
    )


@pytest.mark.parametrize("delta", (False, True))
def test_compute_is_one_pass_over_the_offered_rows(tmp_path, delta):
    recipe = make_dataset(tmp_path / "d", state_dim=21, terminal_at={0: 6}, cameras=())
    dataset = Dataset.open(recipe.config, cameras=())
    robot = get_robot("r1")
    stats = normalize.compute([dataset], NormConfig(delta_actions=delta), robot, 5)
    rows = dataset.rows()
    np.testing.assert_allclose(stats["state"].mean, recipe.state[rows].mean(0), atol=1e-6)
    if delta:
        chunk = Transitions(dataset, 5).chunk(rows)
        values = [
            step - np.where(robot.delta_mask(), recipe.state[row], 0)
            for row, steps, mask in zip(rows, chunk.actions, chunk.action_mask, strict=True)
            for step in steps[mask]
        ]
    else:
        values = recipe.actions[rows]
    np.testing.assert_allclose(stats["actions"].mean, np.mean(values, 0), atol=1e-6)
    np.testing.assert_allclose(stats["actions"].std, np.std(values, 0), atol=1e-6)


def test_main_writes_the_optimal_sets_stats_for_both(tmp_path, capsys):
    optimal = make_dataset(tmp_path / "optimal", cameras=(), seed=1)
    mixed = make_dataset(tmp_path / "mixed", cameras=(), seed=2)
    cfg = experiment(tmp_path, optimal, mixed)
    normalize.main(cfg)
    paths = [normalize.path_for(cfg, name) for name in ("optimal", "mixed")]
    assert paths[0].read_text() == paths[1].read_text()
    assert paths[0] == epath.Path(tmp_path / "assets/test/optimal/norm_stats.json")
    np.testing.assert_allclose(normalize.load_shared(cfg)["actions"].mean, optimal.actions.mean(0), atol=1e-6)
    out = capsys.readouterr().out
    assert "optimal: 28 frames, state of 4 dims, absolute actions of 21" in out and out.count("written") == 2
    normalize.main(cfg)
    assert capsys.readouterr().out.count("unchanged") == 2
    paths[1].write_text("{}")
    normalize.main(cfg)
    assert "replaced" in capsys.readouterr().out
    assert not [p for p in (tmp_path / "assets").rglob("*") if p.name.startswith(".")]


def test_main_needs_no_suboptimal_set_yet(tmp_path):
    optimal = make_dataset(tmp_path / "optimal", cameras=())
    cfg = experiment(tmp_path, optimal)
    absent = dataclasses.replace(optimal.config, repo_id="mixed", root=str(tmp_path / "mixed"))
    normalize.main(dataclasses.replace(cfg, suboptimal_data=absent))
    assert (tmp_path / "assets/test/mixed/norm_stats.json").exists()


def test_main_refuses_what_cannot_be_shared(tmp_path):
    optimal = make_dataset(tmp_path / "optimal", cameras=())
    other_state = make_dataset(tmp_path / "a", cameras=(), state_dim=5)
    other_robot = make_dataset(tmp_path / "b", cameras=(), action_dim=20)
    with pytest.raises(UserError, match="a: state has 5 dims, that of optimal has 4"):
        normalize.main(experiment(tmp_path, optimal, other_state))
    with pytest.raises(UserError, match="b: actions have 20 dims, robot r1 has 21"):
        normalize.main(experiment(tmp_path, optimal, other_robot))
    with pytest.raises(UserError, match="action_horizon 13 is longer than every episode"):
        cfg = experiment(tmp_path, optimal)
        normalize.main(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, action_horizon=13)))
    with pytest.raises(UserError, match="delta_actions needs a state that begins with the dims of robot r1"):
        normalize.main(experiment(tmp_path, optimal, norm=NormConfig(delta_actions=True)))
    with pytest.raises(UserError, match="config test: no dataset"):
        normalize.main(experiment(tmp_path))
    assert not (tmp_path / "assets").exists()


def saved(cfg, repo_id, dims, shift=0.0):
    one = np.ones(dims)
    stats = NormStats(one * shift, one, -one, one)
    normalize.save(normalize.path_for(cfg, repo_id), {"state": stats, "actions": stats})


def test_load_shared_errors(tmp_path):
    recipes = [make_dataset(tmp_path / name, lengths=(5,), cameras=()) for name in ("optimal", "mixed")]
    cfg = experiment(tmp_path, *recipes)
    with pytest.raises(UserError, match=r"optimal/norm_stats\.json: .*missing; run `hvd norm-stats --config test`"):
        normalize.load_shared(cfg)
    saved(cfg, "optimal", 21)
    saved(cfg, "mixed", 21, shift=1e-9)
    with pytest.raises(UserError, match=r"optimal/norm_stats\.json and .*mixed/norm_stats\.json: different statistics"):
        normalize.load_shared(cfg)
    saved(cfg, "mixed", 21)
    assert normalize.load_shared(cfg)["state"].dim == 21
    for name in ("optimal", "mixed"):
        saved(cfg, name, 23)
    with pytest.raises(UserError, match=r"norm stats of another robot \(23 action dims, r1 has 21\)"):
        normalize.load_shared(cfg)


ONE = {"mean": [0], "std": [1], "q01": [-1], "q99": [1]}


def numbers(state=ONE, actions=ONE, **more) -> str:
    return json.dumps({"norm_stats": {"state": state, "actions": actions}, **more})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "truncated"),
        ("[]", "Expected `object`, got `array`"),
        ("{}", "missing required field `norm_stats`"),
        ('{"x": ' + "[" * 100_000, "nested too deeply"),
        (numbers(state={}), r"missing required field `mean` - at `\$.norm_stats.state`"),
        (numbers(state={"mean": [1], "std": [1], "q01": [0], "q99": [1, 2]}), "state: .*lists of one length"),
        (numbers(state={"mean": [float("nan")], "std": [1]}), "invalid character"),
        (numbers(state={"mean": ["a"], "std": [1]}), r"got `str` - at `\$.norm_stats.state.mean"),
        (numbers(actions={"mean": [0, 0], "std": [1, -1]}), r">= 0.0 - at `\$.norm_stats.actions.std"),
        (numbers(actions={"mean": [1e38], "std": [1]}), r"norm_stats.actions.mean"),
        (numbers(actions={"mean": [0], "std": [1e300]}), r"norm_stats.actions.std"),
        (
            numbers(actions={"mean": [0, 0], "std": [1, 1], "q01": [0, 2], "q99": [1, 1]}),
            r"actions: q01\[1\] is above q99\[1\]",
        ),
        (numbers(made_of={"dataset": 3}), "made_of.dataset"),
    ],
)
def test_bad_stats_file(tmp_path, text, message):
    path = epath.Path(tmp_path / "norm_stats.json")
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        normalize.load(path)
    assert "norm_stats.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("quantiles", [{}, {"q01": None, "q99": None}, {"q99": [1.0] * 21}])
def test_quantiles_are_needed_by_their_own_mode_alone(tmp_path, quantiles):
    recipe = make_dataset(tmp_path / "optimal", cameras=())
    cfg = experiment(tmp_path, recipe)
    path = normalize.path_for(cfg, "optimal")
    path.parent.mkdir(parents=True)
    block = {"mean": [0.0] * 21, "std": [2.0] * 21, **quantiles}
    path.write_text(json.dumps({"norm_stats": {"state": block, "actions": block}}))
    stats = normalize.load_shared(cfg)["actions"]
    np.testing.assert_allclose(normalize.normalize(np.full((1, 21), 4.0), stats), 2.0, atol=1e-5)
    normalize.save(path, {"state": stats, "actions": stats})
    assert normalize.load_shared(cfg)["actions"].q01 is None
    with pytest.raises(UserError, match=r"norm_stats.json: state has no q01 and q99, which norm.mode quantile needs"):
        normalize.load_shared(dataclasses.replace(cfg, norm=NormConfig(mode="quantile")))


def changed(cfg: Experiment, **fields) -> Experiment:
    return dataclasses.replace(cfg, **fields)


def test_statistics_are_refused_where_they_do_not_belong(tmp_path):
    recipe = make_dataset(tmp_path / "optimal", state_dim=21, cameras=())
    data = dataclasses.replace(recipe.config, keys=KeyMap(images={}, state=("observation.state[0:3]", "action")))
    cfg = changed(experiment(tmp_path, recipe, norm=NormConfig(delta_actions=True)), optimal_data=data)
    normalize.main(cfg)

    def use(cfg: Experiment):
        return normalize.for_data(cfg, {"optimal": Dataset.open(cfg.optimal_data, cameras=(), horizon=5)})

    _, made_of, said = use(cfg)
    assert made_of is not None and (made_of.frames, made_of.horizon, made_of.robot, said) == (28, 5, "r1", [])
    assert made_of.state_dims[2:4] == ("observation.state[2]", "action[0]")

    def keys(*state: str) -> Experiment:
        return changed(cfg, optimal_data=dataclasses.replace(data, keys=KeyMap(images={}, state=state)))

    assert use(keys("observation.state[0,1,2]", "action"))[1] == made_of
    for other, line in (
        (changed(cfg, norm=NormConfig()), "norm.delta_actions"),
        (changed(cfg, model=dataclasses.replace(cfg.model, action_horizon=4)), "model.action_horizon 5 there, 4 here"),
        (keys("action", "observation.state[0:3]"), "keys.state"),
        (keys("observation.state[0,2,1]", "action"), "keys.state"),
        (keys("observation.state", "action"), "keys.state"),
        (changed(cfg, robot="r1_pro"), "another robot"),
        (changed(cfg, optimal_data=dataclasses.replace(data, max_episodes=2)), "number of frames 28 there, 19 here"),
    ):
        with pytest.raises(UserError, match=line) as caught:
            use(other)
        assert "norm_stats.json: " in str(caught.value) and "run `hvd norm-stats" in str(caught.value)

    recipe.actions[3, 2] += 1.0
    shutil.rmtree(recipe.root)
    write_dataset(recipe)
    with pytest.raises(UserError, match="digest of the dataset"):
        use(cfg)


def test_absolute_statistics_serve_any_horizon(tmp_path):
    cfg = experiment(tmp_path, make_dataset(tmp_path / "optimal", cameras=()))
    normalize.main(cfg)
    normalize.load_shared(changed(cfg, model=dataclasses.replace(cfg.model, action_horizon=4)))


def test_a_file_that_does_not_say_what_it_is_of_is_used_and_said(tmp_path, capsys):
    recipe = make_dataset(tmp_path / "optimal", cameras=())
    cfg = experiment(tmp_path, recipe)
    normalize.main(cfg)
    path = normalize.path_for(cfg, "optimal")
    text = json.loads(path.read_text())
    assert text.pop("made_of")["dataset"] == "optimal"
    path.write_text(json.dumps(text))
    _, made_of, said = normalize.for_data(cfg, {"optimal": Dataset.open(recipe.config, cameras=())})
    assert made_of is None and len(said) == 1 and "does not say what these norm stats are of" in said[0]
    normalize.main(cfg)
    assert "the same statistics, with a new record" in capsys.readouterr().out


def test_dims_of_the_same_names_in_another_order(tmp_path):
    """info.json names the dims; two ways to name them are no contradiction, the same names in another order are."""
    names = [f"joint_{i}" for i in range(4)]
    recipes = [make_dataset(tmp_path / name, cameras=()) for name in ("optimal", "mixed")]
    cfg = experiment(tmp_path, *recipes)

    def name(recipe, names):
        info = json.loads((recipe.root / "meta/info.json").read_text())
        info["features"]["observation.state"]["names"] = names
        (recipe.root / "meta/info.json").write_text(json.dumps(info))

    name(recipes[0], {"motors": names})
    name(recipes[1], ["a", "b", "c", "d"])
    normalize.main(cfg)
    name(recipes[1], [[*names[:2], names[3], names[2]]])
    with pytest.raises(
        UserError, match=r"mixed and optimal have the same state dims in another order \(dim\[2\] joint_2"
    ):
        normalize.main(cfg)


@pytest.mark.parametrize(("mode", "name"), [("z_score", "state"), ("z_score", "actions"), ("quantile", "state")])
def test_values_that_explode_in_another_dataset_are_named(tmp_path, capsys, mode, name):
    recipes = [make_dataset(tmp_path / name, cameras=(), lengths=(30, 30)) for name in ("optimal", "mixed")]
    values = getattr(recipes[0], name)
    values[:, 3] = 0.5
    if mode == "quantile":  # it moves in one frame of the optimal set, too
        values[7, 3] = 0.6
    for recipe in recipes:
        shutil.rmtree(recipe.root)
        write_dataset(recipe)
    cfg = experiment(tmp_path, *recipes, norm=NormConfig(mode=mode))
    normalize.main(cfg)
    column = {"state": "observation.state", "actions": "action"}[name]
    line = f"warning: mixed: {name.removesuffix('s')} dim 3 ({column}[3]) reaches "
    assert line in capsys.readouterr().out
    opened = {
        role: Dataset.open(r.config, cameras=()) for role, r in zip(("optimal", "suboptimal"), recipes, strict=True)
    }
    said = normalize.for_data(cfg, opened)[2]
    assert any(text.startswith(line) for text in said) and all("norm.std_floor" in text for text in said)
    floored = dataclasses.replace(cfg, norm=NormConfig(mode=mode, std_floor=0.5))
    assert normalize.for_data(floored, opened)[2] == []


def test_g1_statistics(g1_data, tmp_path):
    """Means of the real recordings against those that LeRobot wrote beside them."""
    for name in ("meta", "data", "videos"):
        (tmp_path / name).symlink_to(g1_data / name)
    cfg = DataConfig(repo_id="g1", root=str(tmp_path), reward="success_at_end")
    stats = normalize.compute([Dataset.open(cfg, cameras=())], NormConfig(), get_robot("g1"), 20)
    lines = [json.loads(line)["stats"] for line in (g1_data / "meta/episodes_stats.jsonl").read_text().splitlines()]
    for name, key in (("state", "observation.state"), ("actions", "action")):
        counts = np.asarray([line[key]["count"][0] for line in lines], float)
        means = np.asarray([line[key]["mean"] for line in lines])
        np.testing.assert_allclose(stats[name].mean, counts @ means / counts.sum(), atol=1e-5)


def test_a_robot_without_positions_has_nothing_that_could_be_a_delta():
    normalize.check_delta(NormConfig(delta_actions=True), get_robot("ur5e"), 3)
