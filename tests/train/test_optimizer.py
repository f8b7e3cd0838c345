"""Schedules, AdamW against its equations in numpy, clipping, moving averages."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from hvd.configs import LrSchedule, Optimizer
from hvd.errors import UserError
from hvd.train.optimizer import learning_rate, make_optimizer, moving_average, update


def test_cosine_and_rsqrt_at_known_steps():
    cosine = learning_rate(LrSchedule("cosine", warmup_steps=4, peak_lr=1.0, decay_steps=12, decay_lr=0.2))
    want = {0: 0.2, 2: 0.6, 4: 1.0, 8: 0.6, 12: 0.2, 100: 0.2}
    assert_allclose([cosine(step) for step in want], list(want.values()), rtol=1e-6)
    rsqrt = learning_rate(LrSchedule("rsqrt", warmup_steps=4, peak_lr=1.0, timescale=3.0))
    want = {0: 0.2, 4: 1.0, 7: 0.5**0.5, 13: 0.5}
    assert_allclose([rsqrt(step) for step in want], list(want.values()), rtol=1e-6)


def test_no_warmup_starts_at_the_peak():
    assert_allclose(learning_rate(LrSchedule(warmup_steps=0, peak_lr=0.5))(0), 0.5)


def test_mistakes():
    with pytest.raises(UserError, match=r"decay_steps 10 must be larger than lr_schedule.warmup_steps 10"):
        learning_rate(LrSchedule(warmup_steps=10, decay_steps=10))
    with pytest.raises(UserError, match="warmup_steps -1"):
        learning_rate(LrSchedule(warmup_steps=-1))


def test_adamw_after_clipping():
    config = Optimizer(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip_gradient_norm=1.0)
    optimizer = make_optimizer(config, learning_rate(LrSchedule(warmup_steps=0, peak_lr=0.01)))
    params = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    grads = [{"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}, {"w": jnp.array([0.1, -0.2]), "b": jnp.array(0.0)}]
    state = optimizer.init(params)
    p, m, v = np.array([1.0, -2.0, 0.5]), np.zeros(3), np.zeros(3)
    for t, grad in enumerate(grads, start=1):
        params, state, norm = update(optimizer, grad, state, params)
        g = np.array([*grad["w"], grad["b"]], np.float64)
        size = np.sqrt(np.sum(g**2))
        assert_allclose(norm, size, rtol=1e-6)
        g = g / max(size, 1.0)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        lr = float(learning_rate(LrSchedule(warmup_steps=0, peak_lr=0.01))(t - 1))
        p = p - lr * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.1 * p)
        assert_allclose([*params["w"], params["b"]], p, rtol=1e-5)


def test_moving_average():
    average = moving_average({"w": jnp.array([0.0, 1.0])}, {"w": jnp.array([1.0, 1.0])}, 0.75)
    assert_array_equal(average["w"], [0.25, 1.0])
