"""Scores of chunks whose mistakes are known: what is told apart, and which weight is left on wrong chunks."""

import dataclasses

import numpy as np
import pytest

from hvd import overrides
from hvd.evaluate import scores
from hvd.evaluate.credit import Frames
from hvd.method.table import Advantages
from hvd.train import stage_data
from tests.published import PUBLISHED

N, NAMES = 60, ("base", "torso", "arms")
LEVEL = np.arange(N) % 4  # who errs: a level, or nobody (3)
EPISODE = np.repeat(np.arange(10), 6)
WRONG = LEVEL[:, None] == np.arange(3)


def table(**columns) -> Advantages:
    zeros, rows = np.zeros((N, 3), np.float32), np.arange(N)
    names = np.full(N, "suboptimal", object)
    split = np.full(N, "train")
    return Advantages(NAMES, names, split, EPISODE, rows, rows, zeros[:, 0], zeros, zeros, zeros + 1, **columns)


def frames() -> Frames:
    zeros = np.zeros((N, 3), np.float32)
    clean, success = LEVEL == 3, EPISODE < 5
    waiting = np.roll(WRONG, 1, axis=1) * 0.5 * (EPISODE < 1)[:, None]  # the next level, in the first episode
    return Frames(EPISODE, zeros, zeros, zeros, WRONG, WRONG * 0.5, clean, success, np.arange(N), waiting)


def config(*words: str):
    return overrides.experiment(["--config", "demo", *PUBLISHED, *words])


def test_a_score_that_knows_is_told_from_one_that_does_not():
    knows, blind = -WRONG.astype(np.float32), np.zeros((N, 3), np.float32)
    assert scores.judged(frames(), knows)["all"]["mean"] == scores.judged(frames(), knows)["success"]["mean"] == 1.0
    assert scores.judged(frames(), blind)["all"]["mean"] == 0.5
    assert scores.judged(frames(), knows)["success"]["n"] == (WRONG.any(axis=1) & (EPISODE < 5)).sum()


def test_the_scores_of_a_table():
    assert [name for name, _ in scores.scores(config(), table())] == ["td own", "td chain", "td joint", "td mean"]
    ratio = -np.cumsum(WRONG, axis=1).astype(np.float32)
    found = dict(scores.scores(config(), table(ratio=ratio, alone=-WRONG.astype(np.float32))))
    assert len(found) == 12 and found["ratio joint"].shape == (N, 1)
    np.testing.assert_array_equal(found["ratio chain"], -WRONG.astype(np.float32))


def test_what_is_left_of_wrong_chunks(monkeypatch):
    """A filter by a score that knows leaves none of a level's own; even weights leave their share."""
    data = dataclasses.make_dataclass("Data", ("all_episodes", "episode_of", "rewards"))
    episode = dataclasses.make_dataclass("Episode", ("start", "length", "success"))
    opened = data([episode(6 * i, 6, True) for i in range(10)], EPISODE, np.zeros(N))
    monkeypatch.setattr(stage_data, "open_dataset", lambda cfg, name: opened)
    knows = table(ratio=-WRONG.astype(np.float32), alone=-WRONG.astype(np.float32))
    cfg = config("--policy.extractor", "filter", "--policy.score", "ratio")
    found = scores.weights(cfg, frames(), knows, NAMES)
    for name in NAMES:
        assert found[name]["wrong"] == 0 and found[name]["wrong_even"] == pytest.approx(0.25)
        assert found[name]["effective"] == pytest.approx(0.75)
    even = scores.weights(config(), frames(), knows, NAMES)
    assert even["arms"]["wrong"] == pytest.approx(0.25) and even["arms"]["effective"] == pytest.approx(1.0)


def test_waiting_is_counted_apart(monkeypatch):
    """A score that dislikes waiting is not blamed for it: waiting chunks are neither wrong nor clean."""
    data = dataclasses.make_dataclass("Data", ("all_episodes", "episode_of", "rewards"))
    episode = dataclasses.make_dataclass("Episode", ("start", "length", "success"))
    opened = data([episode(6 * i, 6, True) for i in range(10)], EPISODE, np.zeros(N))
    monkeypatch.setattr(stage_data, "open_dataset", lambda cfg, name: opened)
    found = dataclasses.replace(frames(), share=np.zeros((N, 3)), clean=np.ones(N, bool))
    waits = np.any(found.waiting > 0, axis=1)
    judged = scores.judged(found, -waits[:, None].astype(np.float32))
    assert judged["all"] is None and judged["waiting"]["mean"] == 1.0 and judged["waiting"]["n"] == waits.sum()
    idle = (LEVEL == 3) & (EPISODE < 1)
    found = dataclasses.replace(frames(), waiting=idle[:, None] * np.array([0, 0.5, 0]))
    assert scores.judged(found, -(WRONG | idle[:, None]).astype(np.float32))["all"]["mean"] == 1.0
    found = frames()
    even = scores.weights(config(), found, table(), NAMES)
    assert even["torso"]["waiting"] == pytest.approx((found.waiting[:, 1] > 0).mean()) and even["torso"]["waiting"] > 0
