"""The flow-matching loss: its pieces, its level weights, and what must not count."""

import jax
import jax.numpy as jnp
import numpy as np

from hvd.method.flow import after_prefix, interpolate, level_errors, policy_loss, sample_time, shares

LEVELS = ((2, 3), (0,), (1, 4))  # 5 robot dims in a 7-dim padded action


def _random(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def test_time_distribution():
    t = np.asarray(sample_time(jax.random.key(0), 200_000))
    assert t.min() >= 0.001 and t.max() <= 1.0
    np.testing.assert_allclose(t.mean(), 0.001 + 0.999 * 1.5 / 2.5, atol=2e-3)


def test_interpolate_ends():
    noise, actions = _random(2, 3, 4), _random(2, 3, 5)[..., :4]
    x, u = interpolate(noise, actions, jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(x[0], actions[0], rtol=1e-6)
    np.testing.assert_allclose(x[1], noise[1], rtol=1e-6)
    np.testing.assert_allclose(x + (jnp.array([1.0, 0.0])[:, None, None]) * u, noise, rtol=1e-5, atol=1e-6)


def test_given_actions_are_at_their_end_and_do_not_count():
    mask = jnp.array([[True] * 4, [True, True, True, False]])
    time, counted = after_prefix(jnp.array([0.5, 0.25]), mask, jnp.array([0, 2]))
    assert time.tolist() == [[0.5] * 4, [0, 0, 0.25, 0.25]]
    assert counted.tolist() == [[True] * 4, [False, False, True, False]]
    noise, actions = _random(2, 4, 7), _random(2, 4, 9)[..., :7]
    x, _ = interpolate(noise, actions, time)
    np.testing.assert_array_equal(x[1, :2], actions[1, :2])
    np.testing.assert_allclose(x[1, 2:], interpolate(noise, actions, jnp.array([0.5, 0.25]))[0][1, 2:])


def test_level_errors_count_only_real_dims_and_actions():
    velocity, target = _random(2, 4, 7), _random(2, 4, 9)[..., :7]
    mask = jnp.array([[True] * 4, [True, True, False, False]])
    got = np.asarray(level_errors(velocity, target, mask, LEVELS))
    for b, real in ((0, 4), (1, 2)):
        for i, dims in enumerate(LEVELS):
            squares = np.square(np.asarray(velocity - target)[b, :real])[:, list(dims)]
            np.testing.assert_allclose(got[b, i], squares.sum() / real / 5, rtol=1e-5)
    changed = velocity.at[:, :, 5:].add(100.0).at[1, 2:].add(100.0)
    np.testing.assert_array_equal(got, level_errors(changed, target, mask, LEVELS))


def test_a_level_weight_moves_only_its_dims():
    velocity, target, mask = _random(2, 4, 7), _random(2, 4, 9)[..., :7], jnp.ones((2, 4), bool)
    imitated = jnp.array([False, False])

    def loss(v, weights):
        return policy_loss(level_errors(v, target, mask, LEVELS), weights, imitated, 1.0)[0]

    ones = jax.grad(loss)(velocity, jnp.ones((2, 3)))
    doubled = jax.grad(loss)(velocity, jnp.ones((2, 3)).at[:, 1].set(2.0))
    ratio = np.asarray(doubled / jnp.where(ones == 0, 1.0, ones))
    np.testing.assert_allclose(ratio[..., 0], 2.0, rtol=1e-5)
    np.testing.assert_allclose(ratio[..., 1:5], 1.0, rtol=1e-5)
    np.testing.assert_array_equal(ones[..., 5:], 0.0)


def test_sides_and_lambda():
    errors = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    weights = jnp.array([[9.0, 9.0], [0.5, 2.0], [1.0, 0.0]])
    loss, parts = policy_loss(errors, weights, jnp.array([True, False, False]), 0.5)
    np.testing.assert_allclose(parts["loss_bc"], 3.0)
    np.testing.assert_allclose(parts["loss_rl"], (0.5 * 3 + 2 * 4 + 5) / 2)
    np.testing.assert_allclose(loss, parts["loss_rl"] + 0.5 * 3.0)
    alone, parts = policy_loss(errors, weights, jnp.array([True] * 3), 1.0)
    np.testing.assert_allclose(alone, np.mean([3.0, 7.0, 11.0]), rtol=1e-6)
    assert float(parts["loss_rl"]) == 0.0
    gradient = jax.grad(lambda w: policy_loss(errors, w, jnp.array([False] * 3), 1.0)[0])(weights)
    np.testing.assert_array_equal(gradient, 0.0)


def test_flat_weights_are_the_plain_flow_loss():
    """One weight for all dims, all ones: the mean squared error over the robot's dims."""
    velocity, target, mask = _random(3, 4, 7), _random(3, 4, 9)[..., :7], jnp.ones((3, 4), bool)
    flat = level_errors(velocity, target, mask, ((0, 1, 2, 3, 4),))
    split = level_errors(velocity, target, mask, LEVELS)
    np.testing.assert_allclose(flat[:, 0], jnp.sum(split, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(
        flat[:, 0], np.square(np.asarray(velocity - target))[..., :5].mean(axis=(1, 2)), rtol=1e-5
    )


def test_parts_of_a_batch_average_to_its_loss():
    """Whatever the sets' shares of a part are; one of these parts has rows of one set only."""
    errors, weights = jnp.square(_random(6, 3)), jnp.square(_random(6, 4))[:, :3]
    imitated = jnp.array([True, True, True, False, True, False])
    share = shares(imitated)
    np.testing.assert_allclose(share, [1.5, 1.5, 1.5, 3.0, 1.5, 3.0])
    whole, names = policy_loss(errors, weights, imitated, 0.5)
    parts = [policy_loss(errors[at], weights[at], imitated[at], 0.5, share[at]) for at in (slice(0, 3), slice(3, 6))]
    np.testing.assert_allclose(np.mean([loss for loss, _ in parts]), whole, rtol=1e-6)
    for name, value in names.items():
        np.testing.assert_allclose(np.mean([found[name] for _, found in parts]), value, rtol=1e-6)
