"""hvd evaluate: rollouts with injected policies, action errors on held-out episodes, credit assignment. No training."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from hvd.configs import DataConfig, EvaluateConfig, Experiment, KeyMap, ModelConfig, PolicyConfig, SimConfig
from hvd.data.dataset import Dataset, split_episodes
from hvd.data.labels import Labels, Mistake, write_labels
from hvd.data.lerobot_writer import Feature, LeRobotWriter
from hvd.errors import UserError
from hvd.evaluate import command as evaluate
from hvd.evaluate import credit as evaluate_credit
from hvd.evaluate import offline as evaluate_offline
from hvd.evaluate.policies import nothing
from hvd.evaluate.results import observes_text
from hvd.method import advantages
from hvd.robots import get_robot
from hvd.sim.env import Env
from hvd.train.value_pass import Values

KEYS = KeyMap(state=("observation.state", "observation.environment_state"))
LEVELS = get_robot("r1").level_names


def experiment(folder: Path, **changes) -> Experiment:
    cfg = Experiment(
        "test",
        runs_dir=str(folder),
        model=ModelConfig(action_horizon=4, cameras=(), tokenizer="words"),
        optimal_data=DataConfig(keys=KEYS),
        policy=PolicyConfig(weighting="none"),
        evaluate=EvaluateConfig(num_rollouts=3, execute_steps=4, workers=1, videos=1),
        sim=SimConfig(task="pick", horizon=8),
    )
    return dataclasses.replace(cfg, **changes)


def drives(cfg: Experiment):
    """A policy that drives forward as its noise tells it, so that results depend on the seeds and the calls."""

    def act(state, images, prompts, noise):
        chunk = np.repeat(state[:, None, :21], cfg.model.action_horizon, axis=1)
        chunk[..., 7:10] = np.random.default_rng(noise).uniform(-1, 1, 3)
        return chunk

    return act


def operator(cfg: Experiment):
    """The teleoperator as a policy, in environments of its own that run in step with the rolled-out ones."""
    twins = []

    def act(state, images, prompts, noise):
        if noise[1] == 0:
            twins[:] = [Env(cfg.sim.task, cfg.sim.horizon) for _ in state]
            for i, env in enumerate(twins):
                env.reset(noise[0] + i)
                env.pilot = env.task.operator(env, 0)
        chunks = np.zeros((len(state), cfg.model.action_horizon, 21))
        for i, env in enumerate(twins):
            for k in range(cfg.model.action_horizon):
                chunks[i, k] = env.pilot.act()
                if not env.success:
                    env.step(chunks[i, k])
        return chunks

    return act


# ---- rollouts


def test_a_good_policy_gets_a_good_result(tmp_path, capsys):
    cfg = experiment(tmp_path, sim=SimConfig(task="pick"))
    cfg = dataclasses.replace(cfg, evaluate=dataclasses.replace(cfg.evaluate, num_rollouts=2))
    evaluate.main(cfg, operator)
    folder = tmp_path / "test" / "evaluation"
    results = json.loads((folder / "policy" / "results.json").read_text())
    assert results["kind"] == "rollouts" and results["task"] == "pick" and results["weighting"] == "none"
    assert results["success"]["count"] == results["success"]["n"] == 2 and results["success"]["mean"] == 1
    assert results["stage"]["mean"] == 4 and set(results["subtasks"].values()) == {1.0}
    assert results["observes"] == {"proprioception": True, "object_pose": True, "images": []}
    assert [e["seed"] for e in results["episodes"]] == [1_000_000, 1_000_001]
    assert [e["video"] for e in results["episodes"]] == ["videos/rollout_1000000.mp4", ""]
    assert (folder / "policy" / results["episodes"][0]["video"]).stat().st_size > 1000
    control = json.loads((folder / "doing_nothing" / "results.json").read_text())
    assert control["success"]["count"] == 0 and control["stage"]["mean"] == 0 and control["seeds"] == results["seeds"]
    header, ours, theirs = capsys.readouterr().out.splitlines()[-3:]
    assert header.startswith("task") and "2/2 = 1.00" in ours and "state with object pose, no cameras" in ours
    assert "doing nothing" in theirs and "0/2 = 0.00" in theirs
    assert not [p for p in folder.rglob("*") if p.name.endswith(".tmp")]


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_processes(tmp_path):
    runs = []
    for workers in (1, 2):
        cfg = experiment(tmp_path / str(workers), evaluate=EvaluateConfig(12, 7, 2, workers, videos=0))
        runs.append(evaluate.roll_out(cfg, "policy", drives, {"digest": "", "step": 0}))
    assert runs[0]["episodes"] == runs[1]["episodes"]
    assert [e["seed"] for e in runs[0]["episodes"]] == list(range(7, 19))


def test_the_control_is_run_once_and_again_when_the_seeds_change(tmp_path):
    cfg = experiment(tmp_path)
    path = tmp_path / "test/evaluation/doing_nothing/results.json"
    evaluate.main(cfg, nothing)
    first = path.stat().st_mtime_ns
    evaluate.main(cfg, nothing)
    assert path.stat().st_mtime_ns == first
    evaluate.main(dataclasses.replace(cfg, evaluate=dataclasses.replace(cfg.evaluate, seed=5)), nothing)
    assert path.stat().st_mtime_ns != first


def test_a_policy_that_is_not_complete_is_not_evaluated(tmp_path):
    with pytest.raises(UserError, match="train it first"):
        evaluate.main(experiment(tmp_path))
    assert not list(tmp_path.iterdir())


def test_more_steps_than_a_chunk_has(tmp_path):
    cfg = experiment(tmp_path, evaluate=EvaluateConfig(execute_steps=5))
    with pytest.raises(UserError, match="execute_steps 5 and delay 0 are more than the 4 of a chunk"):
        evaluate.main(cfg, nothing)
    assert not list(tmp_path.iterdir())


def test_what_the_policy_observes_in_words():
    assert observes_text(None) == "-"
    seen = {"proprioception": True, "object_pose": False, "images": ["base_0_rgb"]}
    assert observes_text(seen) == "state without object pose, 1 camera"


# ---- action errors on held-out episodes


def write_dataset(root: Path, episodes: int = 4, frames: int = 30) -> None:
    """Actions are random walks, each the next frame's state; the last episode fails."""
    rng = np.random.default_rng(0)
    features = {
        "observation.state": Feature("float32", (21,)),
        "action": Feature("float32", (21,)),
        "next.reward": Feature("float32", (1,)),
        "terminal": Feature("bool", (1,)),
        "truncated": Feature("bool", (1,)),
    }
    with LeRobotWriter(root, fps=10, robot_type="r1", features=features) as writer:
        for episode in range(episodes):
            success = episode < episodes - 1
            walk = np.cumsum(rng.normal(size=(frames + 1, 21)) * 0.1, axis=0).astype(np.float32)
            last = np.arange(frames) == frames - 1
            columns = {
                "observation.state": walk[:-1],
                "action": walk[1:],
                "next.reward": (last & success).astype(np.float32),
                "terminal": last & success,
                "truncated": last & (not success),
            }
            writer.add_episode(columns, task="walk", extra={"success": success, "quality": "teleop"})


@pytest.fixture
def walks(tmp_path) -> Experiment:
    write_dataset(tmp_path / "walks")
    data = DataConfig(repo_id="walks", root=str(tmp_path / "walks"))
    cfg = experiment(tmp_path / "runs", sim=SimConfig(), optimal_data=data, suboptimal_data=data)
    return dataclasses.replace(cfg, evaluate=EvaluateConfig(val_fraction=0.5))


def truth(cfg: Experiment):
    """Knows the data: the chunk that follows each state."""
    dataset = Dataset.open(cfg.optimal_data, cameras=())

    def act(state, images, prompts, noise):
        assert prompts == ["walk"] * len(state)
        rows = [int(np.flatnonzero((dataset.state == s).all(1))[0]) for s in state]
        at = np.asarray(rows)[:, None] + np.arange(cfg.model.action_horizon)
        return dataset.actions[np.minimum(at, dataset.num_frames - 1)]

    return act


def test_the_right_actions_have_no_error_and_the_baselines_have_theirs(walks, capsys):
    results = evaluate_offline.main(walks, truth)
    assert list(results["datasets"]) == ["optimal"]  # the same set in both roles is judged once
    found = results["datasets"]["optimal"]
    errors = found["action_error"]
    assert errors["policy"] == {"normalised": 0.0, "raw": 0.0}
    dataset = Dataset.open(walks.optimal_data, cameras=())
    train, held_out = split_episodes(dataset, 0.5, walks.seed)
    assert found["chunks"] == len(held_out) == 60 and len(found["episodes"]) == 2
    # by hand: hold the joints, stop the base; and the mean action of the training episodes
    hold, mean = [], []
    for row in held_out:
        end = dataset.all_episodes[dataset.episode_of[row]].stop
        chunk = dataset.actions[row : min(row + 4, end)]
        pose = dataset.state[row].copy()
        pose[7:10] = 0
        hold += [np.abs(chunk - pose).mean(1)]
        mean += [np.abs(chunk - dataset.actions[train].mean(0)).mean(1)]
    assert errors["hold the current pose"]["raw"] == pytest.approx(np.concatenate(hold).mean(), rel=1e-5)
    assert errors["mean action"]["raw"] == pytest.approx(np.concatenate(mean).mean(), rel=1e-5)
    out = capsys.readouterr().out
    assert "hold the current pose" in out and "mean action" in out and "no complete value run" in out
    saved = json.loads((Path(walks.exp_dir) / "evaluation/policy/results.json").read_text())
    assert saved == json.loads(json.dumps(results))


def test_the_mean_of_samples_is_judged_beside_one_sample(walks):
    """Samples that lie symmetrically around the truth: one errs, their mean does not."""
    cfg = dataclasses.replace(walks, evaluate=dataclasses.replace(walks.evaluate, action_samples=4))

    def around_the_truth(cfg):
        exact = truth(cfg)
        return lambda *inputs: exact(*inputs) + np.float32((-1) ** inputs[3][1])

    errors = evaluate_offline.main(cfg, around_the_truth)["datasets"]["optimal"]["action_error"]
    assert errors["policy"]["raw"] == pytest.approx(1.0, rel=1e-5)
    assert errors["policy, mean of 4 samples"]["raw"] == pytest.approx(0.0, abs=1e-5)


def test_v_is_ranked_along_successful_held_out_episodes(walks):
    dataset = Dataset.open(walks.optimal_data, cameras=())
    rows = dataset.rows()
    frame = np.concatenate([np.arange(e.length) for e in dataset.episodes])
    values = Values(rows, np.sqrt(frame).astype(np.float32), np.zeros((len(rows), 3, 2), np.float32))
    cfg = dataclasses.replace(walks, policy=PolicyConfig())
    _, held_out = split_episodes(dataset, 0.5, cfg.seed)
    advantages.weigh(cfg, "suboptimal", dataset, values, held_out).write(cfg.advantages_dir, {})
    rank = evaluate_offline.main(cfg, truth)["datasets"]["optimal"]["value_rank"]
    numbers = {int(dataset.episode_of[row]) for row in held_out}
    assert set(rank["episodes"]) == {str(n) for n in numbers if dataset.all_episodes[n].success}
    assert rank["mean"] == pytest.approx(1) and rank["n"] == len(rank["episodes"]) >= 1


def test_nothing_held_out_is_said(walks):
    cfg = dataclasses.replace(walks, evaluate=EvaluateConfig(val_fraction=0.0))
    with pytest.raises(UserError, match="no episode is held out"):
        evaluate.main(cfg, truth)


# ---- credit assignment


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    monkeypatch.setattr(evaluate_credit, "_RESAMPLES", 40)  # of these few episodes; 200 say the same in 5 s


def test_share_of_a_chunk_that_is_a_mistake():
    mistakes = (Mistake("torso", 4, 7, "late"), Mistake("arms", 6, 8, "high"))
    by_level, anywhere = evaluate_credit.chunk_shares(mistakes, LEVELS, 10, 4)
    torso, arms = by_level[:, LEVELS.index("torso")], by_level[:, LEVELS.index("arms")]
    np.testing.assert_allclose(torso, [0, 0.25, 0.5, 0.75, 0.75, 0.5, 0.25, 0, 0, 0])
    # chunks are cut at the episode's end: frame 8 has two actions left, frame 9 one
    np.testing.assert_allclose(arms, [0, 0, 0, 0.25, 0.5, 0.5, 0.5, 1 / 3, 0, 0])
    np.testing.assert_allclose(anywhere, [0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 1 / 3, 0, 0])
    assert not by_level[:, LEVELS.index("base")].any()


def credit_experiment(tmp_path: Path, blame) -> Experiment:
    """Labels of ten episodes with mistakes at changing levels, and a table with blame(level at fault [n], rng) as A."""
    write_dataset(tmp_path / "data", episodes=10)
    data = DataConfig(repo_id="data", root=str(tmp_path / "data"))
    cfg = experiment(tmp_path / "runs", suboptimal_data=data, policy=PolicyConfig())
    dataset = Dataset.open(data, cameras=())
    fault = np.full(dataset.num_frames, -1)
    (dataset.root / "labels").mkdir()
    for episode in dataset.all_episodes:
        level = episode.index % 3
        mistake = Mistake(LEVELS[level], 10, 20, "x")
        labels = Labels("walk", episode.success, mistakes=(mistake,) if episode.index < 9 else ())
        write_labels(dataset.root / "labels" / f"episode_{episode.index:06d}.labels.json", labels)
        if episode.index < 9:
            fault[episode.start + 8 : episode.start + 20] = level  # chunks of 4 that begin before it hold half of it
    a = blame(fault, np.random.default_rng(0)).astype(np.float32)
    rows = np.arange(dataset.num_frames)
    values = Values(rows, np.zeros(len(rows), np.float32), np.repeat(a[:, :, None], 2, axis=2))
    advantages.weigh(cfg, "suboptimal", dataset, values, rows[:0]).write(cfg.advantages_dir, {})
    return cfg


def test_credit_of_advantages_that_blame_the_level_at_fault(tmp_path, capsys):
    def right(fault, rng):
        return np.stack([-2.0 * (fault == level) + 0.1 * rng.random(len(fault)) for level in range(3)], 1)

    cfg = credit_experiment(tmp_path, right)
    result = evaluate_credit.main(cfg)
    assert result == json.loads((Path(cfg.exp_dir) / "evaluation/credit.json").read_text())
    assert result["levels"] == list(LEVELS) and set(result["mistake_frames"]) == set(LEVELS)
    for level in LEVELS:
        for name in LEVELS:
            pair = result["auc"][level][f"A_{name}"]
            if name == level:
                assert pair["rest"]["mean"] > 0.95 and pair["other"]["mean"] > 0.95
                assert pair["rest"]["low"] <= pair["rest"]["mean"] <= pair["rest"]["high"]
            else:
                assert 0.35 < pair["rest"]["mean"] < 0.65
        whole = result["auc_whole"][level][f"A_{level}"]
        assert whole["rest"]["mean"] > 0.95 and whole["other"]["mean"] > 0.95
        assert result["omega"][level]["whole"] < 0.7 * result["omega"][level]["rest"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines if line.startswith("mistakes at")] == ["A_base", "M_base", "A_base"]


def test_the_marginal_advantage_finds_the_level_where_the_cumulative_one_blames_all_below(tmp_path):
    """Q_i knows the parents' actions: a mistake of the base lowers every Q, but only the base's own share of it."""

    def cumulative(fault, rng):
        own = np.stack([-2.0 * (fault == level) + 0.1 * rng.random(len(fault)) for level in range(3)], 1)
        return np.cumsum(own, axis=1)

    result = evaluate_credit.main(credit_experiment(tmp_path, cumulative))
    assert result["auc"]["base"]["A_arms"]["rest"]["mean"] > 0.95
    assert result["auc"]["arms"]["A_arms"]["other"]["mean"] < 0.55
    for level in LEVELS:
        for name in LEVELS:
            found = result["auc_marginal"][level][f"M_{name}"]
            assert (found["rest"]["mean"] > 0.95) == (found["other"]["mean"] > 0.95) == (name == level)


def test_onset_is_from_half_a_chunk_before_the_mistake(tmp_path):
    cfg = credit_experiment(tmp_path, lambda fault, rng: np.zeros((len(fault), 3)))
    frames = evaluate_credit.read_frames(cfg)
    first = frames.episode == 0  # a mistake of the base in frames 10..19, chunks of 4 actions
    np.testing.assert_array_equal(np.flatnonzero(frames.onset[first, 0]), [8, 9, 10, 11])
    assert not frames.onset[first, 1:].any()
    np.testing.assert_array_equal(np.flatnonzero(frames.share[first, 0] >= 0.5), np.arange(8, 19))
    np.testing.assert_array_equal(np.flatnonzero(~frames.clean[first]), np.arange(7, 20))
    assert frames.clean[frames.episode == 9].all()


@pytest.mark.slow
def test_credit_of_advantages_that_know_nothing(tmp_path):
    cfg = credit_experiment(tmp_path, lambda fault, rng: rng.normal(size=(len(fault), 3)))
    result = evaluate_credit.main(cfg)
    for level in LEVELS:
        for pair in result["auc"][level].values():
            assert 0.3 < pair["rest"]["mean"] < 0.7


def test_credit_of_a_flat_value_has_one_column(tmp_path):
    cfg = credit_experiment(
        tmp_path, lambda fault, rng: -1.0 * (fault >= 0)[:, None] + 0.1 * rng.random((len(fault), 3))
    )
    frames = evaluate_credit.read_frames(cfg)
    flat = dataclasses.replace(frames, a=frames.a[:, :1], marginal=frames.a[:, :1], omega=frames.omega[:, :1])
    result = evaluate_credit.tables(flat, LEVELS, ("all",))
    assert "auc_marginal" not in result
    assert all(list(pairs) == ["A_all"] for pairs in result["auc"].values())
    assert result["auc_whole"]["base"]["A_all"]["rest"]["mean"] > 0.95
    assert 0.3 < result["auc_whole"]["base"]["A_all"]["other"]["mean"] < 0.7


def test_no_table_no_credit(tmp_path):
    assert evaluate_credit.main(experiment(tmp_path)) is None
    assert not list(tmp_path.iterdir())
