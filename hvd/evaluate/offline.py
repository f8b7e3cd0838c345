"""Evaluation without a simulator: on held-out episodes, how far the policy's actions are from the recorded ones, and
whether V rises along an episode.

Two baselines that know nothing about the task: "hold the current pose" (joints stay where they are, velocities are
zero) and "mean action" (of the training episodes). Errors are mean absolute errors over action dims and the real steps
of a chunk, raw and divided by each dim's standard deviation over the training episodes. A policy that samples
pays twice for what cannot be known, once for the demonstrator's choice and once for its own; so the error of the mean
of several sampled chunks is given beside that of one.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from hvd.configs import DataConfig, Experiment
from hvd.data.dataset import Dataset, Episode, split_episodes
from hvd.data.transitions import Transitions
from hvd.errors import UserError
from hvd.evaluate.policies import Loader, trained
from hvd.evaluate.results import folder, observes, print_rows, write_json
from hvd.evaluate.statistics import bootstrap, spearman
from hvd.method import extraction
from hvd.method.table import Advantages
from hvd.robots import get_robot
from hvd.train.complete import check_complete

POLICY, HOLD, MEAN = "policy", "hold the current pose", "mean action"
_MAX_CHUNKS = 512  # of a dataset: evenly spaced over its held-out frames
_BATCH = 32


def main(cfg: Experiment, load: Loader | None = None) -> dict:
    """Evaluate on the held-out episodes of every dataset of the experiment; write results.json, print the tables."""
    started = time.monotonic()
    run = {"digest": "", "step": 0}
    if load is None:
        found = check_complete(cfg.policy_dir, stage="policy", cfg=cfg)
        run = {"digest": found.digest, "step": found.step}
    act = (load or trained)(cfg)
    datasets: dict[str, Any] = {}
    roles: dict[tuple, list[str]] = {}
    for role, data in cfg.datasets():
        roles.setdefault((str(data.path()), data.success_only, data.max_episodes), []).append(role)
    for same in roles.values():  # one set in both roles is judged once
        datasets[same[0]] = evaluate_dataset(cfg, same, dict(cfg.datasets())[same[0]], act)
    if not datasets:
        raise UserError(f"config {cfg.name}: neither optimal_data nor suboptimal_data is set; nothing to evaluate on")
    results = {
        "kind": "offline",
        "run_name": cfg.policy.run_name,
        "config": cfg.name,
        "weighting": extraction.label(cfg),
        "observes": observes(cfg),
        "action_horizon": cfg.model.action_horizon,
        "policy_digest": run["digest"],
        "policy_step": run["step"],
        "num_chunks": sum(d["chunks"] for d in datasets.values()),
        "datasets": datasets,
        "wall_s": round(time.monotonic() - started, 1),
    }
    write_json(folder(cfg, cfg.policy.run_name) / "results.json", results)
    rows = [("held-out data", "actions", "error / std", "error (raw units)")]
    for role, found in datasets.items():
        for name, error in found["action_error"].items():
            rows.append((role, name, f"{error['normalised']:.3f}", f"{error['raw']:.4f}"))
    print_rows(rows)
    for role, found in datasets.items():
        print(f"V along held-out {role} episodes: {rank_text(found['value_rank'])}", flush=True)
    return results


def rank_text(rank: dict | None) -> str:
    if rank is None:
        return "no successful held-out episode, or no complete value run"
    return (
        f"rank correlation with progress {rank['mean']:.2f} [{rank['low']:.2f}, {rank['high']:.2f}], "
        f"{rank['n']} episode{'s' * (rank['n'] != 1)}"
    )


def evaluate_dataset(cfg: Experiment, roles: list[str], data: DataConfig, act) -> dict[str, Any]:
    """Action errors and V's rank correlation on the held-out episodes of one dataset, which has these roles."""
    dataset = Dataset.open(data, cameras=cfg.model.cameras, robot=cfg.robot, horizon=cfg.model.action_horizon)
    train, held_out = split_episodes(dataset, cfg.evaluate.val_fraction, cfg.seed)
    if not len(held_out):
        raise UserError(f"{dataset.name}: no episode is held out; it needs two, and evaluate.val_fraction above 0")
    numbers = np.unique(dataset.episode_of[held_out])
    episodes = [dataset.all_episodes[i] for i in numbers]
    rows = held_out[np.linspace(0, len(held_out) - 1, min(_MAX_CHUNKS, len(held_out))).round().astype(int)]
    return {
        "episodes": [e.index for e in episodes],
        "chunks": len(rows),
        "action_error": action_errors(cfg, dataset, train, rows, act),
        "value_rank": value_rank(cfg, roles, dataset, episodes),
    }


def action_errors(
    cfg: Experiment, dataset: Dataset, train: np.ndarray, rows: np.ndarray, act
) -> dict[str, dict[str, float]]:
    """{guess: {"normalised", "raw"}} over the chunks that begin at `rows`, for the policy and the baselines."""
    robot, horizon = get_robot(cfg.robot), cfg.model.action_horizon
    chunk = Transitions(dataset, horizon).chunk(rows)
    actions = dataset.actions[train]
    mean, std = actions.mean(0), np.maximum(actions.std(0), max(cfg.norm.std_floor, 1e-6))
    samples = predict(cfg, dataset, rows, act)
    guesses = {POLICY: samples[0]}
    if len(samples) > 1:
        guesses[f"{POLICY}, mean of {len(samples)} samples"] = samples.mean(0)
    if dataset.state.shape[1] >= robot.action_dim:
        hold = np.zeros((len(rows), robot.action_dim), np.float32)
        joints = list(robot.position_dims)
        hold[:, joints] = dataset.state[rows][:, joints]
        guesses[HOLD] = np.broadcast_to(hold[:, None], chunk.actions.shape)
    guesses[MEAN] = np.broadcast_to(mean, chunk.actions.shape)
    found = {}
    for name, guess in guesses.items():
        error = np.abs(guess - chunk.actions)
        found[name] = {"normalised": _masked(error / std, chunk.action_mask), "raw": _masked(error, chunk.action_mask)}
    return found


def predict(cfg: Experiment, dataset: Dataset, rows: np.ndarray, act) -> Float[np.ndarray, "s n k a"]:
    """The policy's chunks at `rows`, s = evaluate.action_samples of each, in batches of one size (compiled once)."""
    num_samples, parts = cfg.evaluate.action_samples, []
    for i, (batch, real) in enumerate(_batches(rows)):
        images = {name: dataset.frames(name, batch) for name in cfg.model.cameras if name in dataset.cameras}
        inputs = dataset.state[batch], images, [dataset.task_of(row) for row in batch]
        parts.append([act(*inputs, (cfg.evaluate.seed, i * num_samples + j))[:real] for j in range(num_samples)])
    return np.concatenate(parts, axis=1)


def value_rank(cfg: Experiment, roles: list[str], dataset: Dataset, episodes: list[Episode]) -> dict[str, Any] | None:
    """Spearman's rank correlation of V with the frame number in each successful held-out episode, and its mean.

    V is taken from the table of advantages, else computed with the value run; None when neither is there.
    """
    values = _values(cfg, roles, dataset, [e for e in episodes if e.success])
    if not values:
        return None
    by_episode = {str(number): spearman(np.arange(len(v)), v) for number, v in values.items()}
    return {**bootstrap(np.array(list(by_episode.values()))).as_dict(), "episodes": by_episode}


def _values(cfg: Experiment, roles: list[str], dataset: Dataset, episodes: list[Episode]) -> dict[int, np.ndarray]:
    """V per frame, by episode number."""
    table = Advantages.find(cfg.advantages_dir)
    table = table.of(*roles) if table is not None else None
    if table is not None and len(table.row):
        known = table.by_row("v", dataset.num_frames)
        wanted = {e.index: dataset.rows((e,)) for e in episodes}
        if all(np.isfinite(known[rows]).all() for rows in wanted.values()):
            return {number: known[rows] for number, rows in wanted.items()}
    try:
        check_complete(cfg.value_run_dir, stage="value")
    except UserError:
        return {}
    return _computed(cfg, dataset, episodes)


def _computed(cfg: Experiment, dataset: Dataset, episodes: list[Episode]) -> dict[int, np.ndarray]:
    from hvd.data.loader import Batcher, SampleSpec, Source
    from hvd.train.inference import load_value

    function = load_value(cfg.value_run_dir)
    spec = SampleSpec(function.transform, num_levels=len(function.levels), image_cache=cfg.image_cache)
    batcher = Batcher([Source(dataset, dataset.rows(), 1)], spec)
    found = {}
    for episode in episodes:
        parts = []
        for batch, real in _batches(dataset.rows((episode,))):
            inputs = batcher.batch(np.zeros(len(batch), np.int32), batch)
            v, _ = function(inputs["observation"], inputs["actions"], inputs["action_mask"])
            parts.append(np.asarray(v)[:real])
        found[episode.index] = np.concatenate(parts)
    return found


def _batches(rows: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of _BATCH rows and how many of them are real: the last one is filled up with its last row."""
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        yield np.concatenate([batch, np.full(_BATCH - len(batch), batch[-1])]), len(batch)


def _masked(error: Float[np.ndarray, "n k a"], mask: Bool[np.ndarray, "n k"]) -> float:
    return float(error.mean(-1)[mask].mean())
