"""The expert ratio on a small world whose mistakes are known: it finds them, at the level that errs."""

import numpy as np
import pytest

from hvd.evaluate.credit import separation
from hvd.method import ratio

FRAMES, HORIZON = 24, 8


def world(episodes: int, wrong: bool, seed: int, noise=0.3, styles=(0.0,), speed=1.0, place=0.0):
    """(state, actions [n, 8, 2], episode, wrong [n, 2]): two levels, each of which follows two dims of the state; with
    `wrong` one level of each episode is off in two fifths of its chunks. A style is an offset of right actions."""
    rng = np.random.default_rng(seed)
    n = episodes * FRAMES
    state = (rng.normal(size=(n, 6)) + place).astype(np.float32)
    episode = np.repeat(np.arange(episodes), FRAMES)
    aims = state @ np.array([[1, -0.5, 0, 0, 0, 0], [0, 0, 1, 0.5, 0, 0]]).T
    errs = (rng.random((n, 2)) < 0.4) & (np.arange(2) == (episode % 2)[:, None]) & wrong
    style = np.array(styles)[episode // 2 % len(styles), None]
    aims = speed * aims + style + errs * rng.choice([-1.5, 1.5], (n, 2))
    actions = np.repeat(aims[:, None], HORIZON, 1) + noise * rng.normal(size=(n, HORIZON, 2))
    return state, actions.astype(np.float32), episode, errs


def auc(score, positive) -> float:
    found = separation(np.asarray(score, np.float32), np.arange(len(score)), positive, ~positive)
    assert found is not None
    return found["mean"]


def joined(experts, mixed, known=0) -> ratio.Rows:
    """`known`: how many numbers a model says about each episode, which it has learned by heart."""
    state, actions = (np.concatenate([experts[i], mixed[i]]) for i in (0, 1))
    episode = np.concatenate([experts[2], mixed[2] + 1000])
    expert = np.arange(len(state)) < len(experts[0])
    patches, real = ratio.patches(actions, np.ones(actions.shape[:2], bool))
    number = np.unique(episode, return_inverse=True)[1]
    seen = np.random.default_rng(9).normal(size=(number.max() + 1, known)).astype(np.float32)[number]
    return ratio.Rows(state, seen, patches, real, episode, expert, ~expert)


@pytest.fixture(scope="module")
def fitted():
    with pytest.MonkeyPatch.context() as quick:
        quick.setattr(ratio, "_STEPS", 500)
        quick.setattr(ratio, "REPEATS", 1)
        mixed = world(40, True, 2)
        rows = joined(world(15, False, 1), mixed)
        return rows, ratio.fit(rows, [(0,), (1,)], 0), mixed[3]


def test_wrong_chunks_have_the_lower_ratio(fitted):
    rows, found, errs = fitted
    joint = found.prefix[~rows.expert, -1]
    assert auc(-joint, errs.any(axis=1)) > 0.9
    assert found.prefix[rows.expert, -1].mean() > joint[~errs.any(axis=1)].mean() - 0.5 > joint[errs.any(axis=1)].mean()


@pytest.mark.parametrize("level", [0, 1])
def test_each_levels_ratio_says_who_erred(fitted, level):
    rows, found, errs = fitted
    chain = np.diff(found.prefix, axis=1, prepend=np.float32(0))
    one = errs.any(axis=1)
    for of_levels in (found.alone, chain):
        assert auc(-of_levels[~rows.expert][one, level], errs[one, level]) > 0.9


def test_the_chain_sums_to_the_whole(fitted):
    _, found, _ = fitted
    chain = np.diff(found.prefix, axis=1, prepend=np.float32(0))
    np.testing.assert_allclose(chain.sum(axis=1), found.prefix[:, -1], atol=1e-5)
    np.testing.assert_array_equal(found.alone[:, 0], found.prefix[:, 0])


def test_logits_are_calibrated():
    """Logits three times too large, and moved, become the log odds that they are of."""
    rng = np.random.default_rng(0)
    odds = rng.normal(size=20_000)
    truth = rng.random(20_000) < 1 / (1 + np.exp(-odds))
    scale, shift = ratio._platt(3 * odds + 1, truth)
    assert scale == pytest.approx(1 / 3, rel=0.1) and shift == pytest.approx(-1 / 3, abs=0.1)


def test_no_network_is_trained_on_an_episode_that_it_judges():
    rows, rng = joined(world(9, False, 3), world(12, True, 4)), np.random.default_rng(0)
    fold = ratio._folds(rng, rows)
    assert all(len(set(fold[rows.episode == e])) == 1 for e in rows.episode)
    for out in (fold == f for f in range(ratio.FOLDS)):
        drawn = ratio._draw(rng, out, rows.expert, ~rows.expert)
        assert not out[drawn].any() and rows.expert[drawn].mean() == 0.5


def test_a_ratio_that_trusts_one_episode_says_so():
    rows = joined(world(2, False, 5), world(20, False, 6))
    joint = np.zeros(len(rows.episode), np.float32)
    joint[rows.episode == 1003] = 1
    assert ratio._effective_episodes(rows, joint) == pytest.approx(1 / 20)
    joint = np.random.default_rng(0).normal(size=len(joint)).astype(np.float32)
    assert ratio._effective_episodes(rows, joint) > 0.7


def test_what_is_not_real_counts_for_nothing():
    actions = np.arange(12, dtype=np.float32).reshape(1, 6, 2)
    mask = np.array([[True, True, True, False, False, False]])
    patches, real = ratio.patches(actions, mask)
    np.testing.assert_array_equal(patches, [[[2, 3], [0, 0]]])
    np.testing.assert_array_equal(real, [[0.75, 0]])


def test_a_model_that_knows_every_episode_by_heart_does_not_drown_the_actions(monkeypatch):
    monkeypatch.setattr(ratio, "_STEPS", 300)
    monkeypatch.setattr(ratio, "REPEATS", 1)
    rows = joined(world(15, False, 1), mixed := world(40, True, 2), known=128)
    found = ratio.fit(rows, [(0,), (1,)], 0)
    assert auc(-found.prefix[~rows.expert, -1], mixed[3].any(axis=1)) > 0.65  # .91 without; .51 at full size


def test_one_demonstration_is_enough(monkeypatch):
    monkeypatch.setattr(ratio, "_STEPS", 100)
    rows = joined(world(1, False, 7), world(6, True, 8))
    assert np.isfinite(ratio.fit(rows, [(0,), (1,)], 0).prefix).all()


@pytest.mark.slow
@pytest.mark.parametrize("style, fails", [(0.0, False), (1.5, True)])
def test_demonstrations_of_another_style_are_noticed(monkeypatch, style, fails):
    monkeypatch.setattr(ratio, "_STEPS", 300)
    monkeypatch.setattr(ratio, "REPEATS", 1)
    rows = joined(world(15, False, 1, styles=(style,)), mixed := world(40, True, 2))
    found = ratio.fit(rows, [(0,), (1,)], 0)
    area = auc(-found.prefix[~rows.expert, -1], mixed[3].any(axis=1))
    assert (area < 0.6, found.overlap < 0.05) == (fails, fails), (area, found.overlap)
