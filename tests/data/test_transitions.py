"""Transitions against a loop that follows docs/method.md word by word."""

import dataclasses
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd.data.dataset import Dataset, Episode
from hvd.data.transitions import Transitions
from tests.data.factory import make_dataset


def naive(data, ends, row, horizon, gamma):
    """One transition, step by step."""
    end = min(e for e in ends if e > row)
    actions, mask, value, discount, over = [], [], 0.0, 1.0, False
    at = row
    for _ in range(horizon):
        if at < end and not over:
            actions.append(data.actions[at])
            mask.append(True)
            value += discount * data.rewards[at]
            discount *= gamma
            over = bool(data.terminal[at])
            at += 1
        else:
            actions.append(actions[-1])
            mask.append(False)
    return actions, mask, value, 0.0 if over else discount, min(at, end - 1)


@st.composite
def episodes(draw):
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    n = sum(lengths)
    terminal = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    rewards = draw(st.lists(st.sampled_from([0.0, 1.0, -2.5]), min_size=n, max_size=n))
    return lengths, terminal, rewards


@settings(deadline=None, max_examples=80)
@given(episodes(), st.integers(1, 9), st.sampled_from([1.0, 0.9, 0.0]))
def test_equals_the_loop(data, horizon, gamma):
    lengths, terminal, rewards = data
    n = sum(lengths)
    rng = np.random.default_rng(n)
    starts = np.cumsum([0, *lengths])
    every = tuple(Episode(i, int(starts[i]), length, "", True, "") for i, length in enumerate(lengths))
    dataset = Dataset(
        name="d",
        root=Path(),
        version="v3.0",
        fps=10.0,
        digest="",
        episodes=every,
        all_episodes=every,
        state=rng.normal(size=(n, 2)).astype(np.float32),
        actions=rng.normal(size=(n, 3)).astype(np.float32),
        rewards=np.asarray(rewards, np.float32),
        terminal=np.asarray(terminal),
        episode_of=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        task_ids=np.zeros(n, np.int32),
        tasks=("",),
        cameras=(),
        camera_frames={},
    )
    rows = rng.permutation(n)
    transitions = Transitions(dataset, horizon, gamma)
    chunk, got = transitions.chunk(rows), transitions.outcome(rows)
    ends = np.cumsum(lengths)
    for i, row in enumerate(rows):
        actions, mask, value, discount, next_row = naive(dataset, ends, row, horizon, gamma)
        np.testing.assert_array_equal(chunk.actions[i], actions)
        np.testing.assert_array_equal(chunk.action_mask[i], mask)
        np.testing.assert_allclose(got.reward[i], value, atol=1e-5)
        np.testing.assert_allclose(got.discount[i], discount, atol=1e-6)
        assert got.next_row[i] == next_row


def test_terminal_cuts_and_truncation_does_not(tmp_path):
    """The three ends by example: inside an episode, terminal at its end, recording ended (truncated)."""
    recipe = make_dataset(tmp_path / "d", lengths=(6, 6), cameras=())
    recipe.rewards[:] = 1
    dataset = Dataset.open(recipe.config, cameras=())
    dataset = dataclasses.replace(dataset, rewards=recipe.rewards, terminal=np.arange(12) == 5)
    transitions, rows = Transitions(dataset, 3, 0.5), np.asarray([0, 3, 4, 9, 10])
    chunk, out = transitions.chunk(rows), transitions.outcome(rows)
    np.testing.assert_array_equal(chunk.action_mask.sum(1), [3, 3, 2, 3, 2])
    np.testing.assert_allclose(out.reward, [1.75, 1.75, 1.5, 1.75, 1.5])
    np.testing.assert_allclose(out.discount, [0.125, 0, 0, 0.125, 0.25])
    np.testing.assert_array_equal(out.next_row, [3, 5, 5, 11, 11])
    np.testing.assert_array_equal(chunk.actions[2, 1:], np.stack([recipe.actions[5]] * 2))
