"""The order of samples: every row once per epoch, disjoint shards, resumable anywhere, for any sizes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd.data.order import Order
from hvd.errors import UserError


@st.composite
def setups(draw):
    processes = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    shares = [draw(st.integers(0, 9)) for _ in sizes]
    shares[0] += -sum(shares) % processes
    if not sum(shares):
        shares[0] = processes
    resumes = draw(st.lists(st.integers(0, 30), max_size=3))
    return draw(st.integers(0, 2**32)), sizes, shares, processes, resumes


@settings(deadline=None, max_examples=150)
@given(setups())
def test_every_row_once_per_epoch_in_disjoint_shards(setup):
    seed, sizes, shares, processes, resumes = setup
    rows = [np.arange(n, dtype=np.int64) * 3 + 100 * i for i, n in enumerate(sizes)]
    bounds = sorted({0, *resumes, 31})
    visited = [[] for _ in sizes]
    for begin, end in itertools.pairwise(bounds):
        workers = [Order(rows, shares, seed) for _ in range(processes)]  # each start is a new set of processes
        for step in range(begin, end):
            slices = [order.slice(step, p, processes) for p, order in enumerate(workers)]
            source = np.concatenate([s for s, _ in slices])
            batch = np.concatenate([r for _, r in slices])
            np.testing.assert_array_equal(batch, Order(rows, shares, seed).batch_rows(step)[1])
            assert {len(s) for s, _ in slices} == {sum(shares) // processes}
            for i in range(len(sizes)):
                assert (source == i).sum() == shares[i]
                visited[i].extend(batch[source == i].tolist())
    for i, n in enumerate(sizes):
        assert len(visited[i]) == 31 * shares[i]
        for start in range(0, len(visited[i]) - n + 1, n):
            assert sorted(visited[i][start : start + n]) == rows[i].tolist()


def test_epochs_sources_and_seeds_differ():
    rows = [np.arange(50, dtype=np.int64)] * 2
    order = Order(rows, (50, 50), 0)
    first, second = order.batch_rows(0)[1], order.batch_rows(1)[1]
    assert not np.array_equal(first[:50], first[50:]) and not np.array_equal(first, second)
    assert not np.array_equal(first, Order(rows, (50, 50), 1).batch_rows(0)[1])
    np.testing.assert_array_equal(order.batch_rows(0)[1], first)  # going back is no problem


def test_impossible_batches():
    with pytest.raises(UserError, match="batch_size 6 is not divisible by 4 processes"):
        Order([np.arange(9)], (6,), 0).slice(0, 0, 4)
    with pytest.raises(UserError, match="dataset 1 has no rows"):
        Order([np.arange(9), np.zeros(0, np.int64)], (3, 3), 0)
    Order([np.arange(9), np.zeros(0, np.int64)], (3, 0), 0).batch_rows(0)
