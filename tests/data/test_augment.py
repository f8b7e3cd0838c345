"""Augmentation on the device: range, own randomness per camera and sample, and no geometry for wrist cameras."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hvd.configs import PolicyConfig
from hvd.models import augment


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.linspace(0, 255, 40), np.linspace(0, 255, 30))
    smooth = np.stack([x, y, 255 - x], -1).astype(np.uint8)
    noise = rng.integers(0, 256, smooth.shape, np.uint8)
    batch = np.stack([smooth] * 6 + [noise] * 2)
    return {name: jnp.asarray(batch) for name in ("base_0_rgb", "base_1_rgb", "left_wrist_0_rgb")}


@jax.jit
def augment_images(key, images):
    """Images alone, with the stage's usual settings."""
    observation = {"state": jnp.zeros((len(next(iter(images.values()))), 1)), "images": images}
    return augment_observation(key, observation, PolicyConfig(), 1)["images"]


def augment_observation(key, observation, own, state_dims):
    return augment.augment(observation, augment.draw(key, observation, own, state_dims), own)


@pytest.fixture(scope="module")
def augmented(images):
    with jax.numpy_dtype_promotion("strict"):
        return augment_images(jax.random.key(0), images)


def test_shape_type_and_range(images, augmented):
    assert augmented.keys() == images.keys()
    for camera, x in augmented.items():
        assert x.shape == images[camera].shape and x.dtype == jnp.float32
        assert float(x.min()) >= -1 and float(x.max()) <= 1 and float(x.std()) > 0.2


def test_each_sample_and_camera_has_its_own_randomness(augmented):
    same_input = [augmented[c][i] for c in ("base_0_rgb", "base_1_rgb") for i in range(6)]
    for i, a in enumerate(same_input):
        for b in same_input[:i]:
            assert float(jnp.abs(a - b).max()) > 0.01


def test_same_key_same_images(images, augmented):
    again, other = (augment_images(jax.random.key(seed), images) for seed in (0, 1))
    for camera in images:
        np.testing.assert_array_equal(again[camera], augmented[camera])
        assert float(jnp.abs(other[camera] - augmented[camera]).max()) > 0.01


@pytest.mark.parametrize(("camera", "words"), [("left_wrist_0_rgb", ("wrist",)), ("left_palm", ("wrist", "palm"))])
def test_wrist_cameras_keep_their_geometry(images, camera, words):
    """Colour jitter is a map of colours; where it is not applied, nothing changes."""
    many = jnp.tile(images["left_wrist_0_rgb"][:1], (64, 1, 1, 1))
    observation, own = {"state": jnp.zeros((64, 1)), "images": {camera: many}}, PolicyConfig(wrist_cameras=words)
    got = augment_observation(jax.random.key(0), observation, own, 1)["images"][camera]
    unchanged = np.abs(np.asarray(got) - (np.asarray(many) / 127.5 - 1)).max((1, 2, 3)) < 1e-5
    assert 16 < unchanged.sum() < 48


def test_no_crop_and_no_turn_is_the_identity(images):
    image = images["base_0_rgb"][7].astype(jnp.float32) / 255
    same = jax.jit(partial(augment._crop_and_rotate, crop=1.0, rotation=0.0))(jnp.asarray([0.3, 0.7, 0.9]), image)
    np.testing.assert_allclose(same, image, atol=1e-5)


def test_crop_and_turn_move_little(images):
    """At the centre a smooth picture moves by at most the crop's 2.5% of a side."""
    image = images["base_0_rgb"][0].astype(jnp.float32) / 255
    u = jax.random.uniform(jax.random.key(0), (32, 3))
    crop_and_rotate = partial(augment._crop_and_rotate, crop=0.95, rotation=5.0)
    moved = np.asarray(jax.jit(jax.vmap(crop_and_rotate, (0, None)))(u, image))
    assert np.abs(moved[:, 15, 20] - np.asarray(image)[15, 20]).max() < 0.06
    corners = moved[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 0).all(-1).mean() > 0.2  # rotation brings in black corners


def test_the_crop_has_its_size(images):
    """A ramp from left to right, cropped to half and scaled back, rises half as much."""
    ramp = jnp.tile(jnp.linspace(0, 1, 40)[None, :, None], (30, 1, 3))
    half = np.asarray(augment._crop_and_rotate(jnp.asarray([0.5, 0.5, 0.5]), ramp, 0.5, 30.0))
    np.testing.assert_allclose(np.ptp(half[15, 2:-2, 0]), 0.5 * np.ptp(np.asarray(ramp)[15, 2:-2, 0]), rtol=0.02)


def test_noise_on_the_state_has_its_size_and_leaves_the_padding_and_all_else(images):
    observation = {"state": jnp.full((4096, 6), 2.0), "images": {}, "prompt": jnp.arange(3)}
    got = augment_observation(jax.random.key(0), observation, PolicyConfig(state_noise=0.5), state_dims=4)
    noise = np.asarray(got["state"]) - 2.0
    np.testing.assert_array_equal(noise[:, 4:], 0.0)
    np.testing.assert_allclose(noise[:, :4].std(0), 0.5, rtol=0.05)
    np.testing.assert_allclose(np.corrcoef(noise[:, :4].T), np.eye(4), atol=0.06)
    assert got["prompt"] is observation["prompt"]


@pytest.mark.parametrize("wanted", [True, False])
def test_an_observation_is_augmented_as_asked(images, wanted):
    observation = {"state": jnp.ones((8, 6)), "images": {"base_0_rgb": images["base_0_rgb"]}}
    got = augment_observation(jax.random.key(0), observation, PolicyConfig(augment_images=wanted), state_dims=4)
    np.testing.assert_array_equal(got["state"], observation["state"])
    assert (got["images"]["base_0_rgb"].dtype == jnp.float32) == wanted
    assert (got["images"]["base_0_rgb"] is images["base_0_rgb"]) != wanted


def test_a_part_of_a_batch_is_augmented_as_in_the_whole(images):
    observation = {"state": jnp.ones((8, 6)), "images": images}
    own = PolicyConfig(state_noise=0.5)
    drawn = augment.draw(jax.random.key(0), observation, own, 4)
    whole = augment.augment(observation, drawn, own)
    observation, drawn = jax.tree.map(lambda x: x[2:5], (observation, drawn))
    part = augment.augment(observation, drawn, own)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[2:5], atol=1e-6), part, whole)
