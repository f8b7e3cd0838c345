"""Augmentation on the device. Images: random crop, small rotation, colour jitter, drawn per camera and per sample; the
state: Gaussian noise.

The random numbers are drawn for a whole batch, before it is split into micro-batches; the images stay uint8 until then.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from hvd.configs import StageConfig

BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.4, 0.5
JITTER_PROBABILITY = 0.5  # openpi's augmax applies the jitter to half of the images


def draw(
    key: Key[Array, ""], observation: Mapping[str, Any], stage: StageConfig, state_dims: int
) -> dict[str, Float[Array, "b _"]]:
    """The random numbers of `augment`, one row per sample: seven uniform ones per camera, and the state's noise.

    Args:
        stage: augment_images, and state_noise in the units of the normalised state.
        state_dims: dims of the robot's state; the padding behind them gets no noise.
    """
    drawn: dict[str, Array] = {}
    image_key, state_key = jax.random.split(key)
    rows = observation["state"].shape[0]
    if stage.augment_images:
        for i, camera in enumerate(sorted(observation["images"])):
            drawn[camera] = jax.random.uniform(jax.random.fold_in(image_key, i), (rows, 7))
    if stage.state_noise > 0:
        noise = stage.state_noise * jax.random.normal(state_key, observation["state"].shape)
        drawn["state"] = noise * (jnp.arange(noise.shape[-1]) < state_dims)[None]
    return drawn


def augment(
    observation: Mapping[str, Any], drawn: Mapping[str, Float[Array, "b _"]], stage: StageConfig
) -> dict[str, Any]:
    """`observation` (hvd.data.transforms.Observation) with augmented images (float32) and a noisy state, as `drawn`;
    where nothing was drawn it is left as it is.
    """
    out = dict(observation)
    cameras = [camera for camera in out["images"] if camera in drawn]
    if cameras:
        images = {camera: out["images"][camera] for camera in cameras}
        out["images"] = dict(out["images"]) | augment_images({c: drawn[c] for c in cameras}, images, stage)
    if "state" in drawn:
        out["state"] = out["state"] + drawn["state"]
    return out


def augment_images(
    drawn: Mapping[str, Float[Array, "b 7"]], images: Mapping[str, UInt8[Array, "b h w 3"]], stage: StageConfig
) -> dict[str, Float[Array, "b h w 3"]]:
    """Augmented float32 images in [-1, 1]; all cameras have the same size. `drawn`: uniform numbers by camera.

    Cameras whose name holds a word of `stage.wrist_cameras` keep their geometry: their view is fixed to the hand. The
    others get a random crop of `stage.crop` of each side, scaled back, and a rotation of at most `stage.rotation`
    degrees either way (outside is black). All get colour jitter, half of the time.
    """
    cameras = sorted(images)
    out: dict[str, Array] = {}
    for wrist in (False, True):
        group = [camera for camera in cameras if any(word in camera for word in stage.wrist_cameras) == wrist]
        if not group:
            continue
        # One vectorised function for all cameras of the group, which are put side by side and not one after the other:
        # rows that lie on several devices would change places
        pictures = jnp.stack([images[c] for c in group], axis=1).astype(jnp.float32) / 255.0
        change = _jitter if wrist else functools.partial(_augment, crop=stage.crop, rotation=stage.rotation)
        done = jax.vmap(jax.vmap(change))(jnp.stack([drawn[c] for c in group], axis=1), pictures) * 2.0 - 1.0
        out |= {camera: done[:, i] for i, camera in enumerate(group)}
    return {camera: out[camera] for camera in images}


def _augment(
    u: Float[Array, "7"], image: Float[Array, "h w 3"], *, crop: float, rotation: float
) -> Float[Array, "h w 3"]:
    return _jitter(u, _crop_and_rotate(u[4:], image, crop, rotation))


def _crop_and_rotate(
    u: Float[Array, "3"], image: Float[Array, "h w 3"], crop: float, rotation: float
) -> Float[Array, "h w 3"]:
    """Crop, scaling and rotation as one bilinear sampling; `u` uniform in [0, 1): the crop's corner and the angle."""
    h, w, _ = image.shape
    top, left = u[0] * (1.0 - crop) * h, u[1] * (1.0 - crop) * w
    angle = jnp.deg2rad(rotation) * (2.0 * u[2] - 1.0)
    y = jnp.arange(h, dtype=jnp.float32)[:, None] - (h - 1) / 2
    x = jnp.arange(w, dtype=jnp.float32)[None, :] - (w - 1) / 2
    turned_y = jnp.cos(angle) * y - jnp.sin(angle) * x
    turned_x = jnp.sin(angle) * y + jnp.cos(angle) * x
    inside = (jnp.abs(turned_y) <= h / 2) & (jnp.abs(turned_x) <= w / 2)
    at_y = top + (turned_y + h / 2) * crop - 0.5
    at_x = left + (turned_x + w / 2) * crop - 0.5
    return jnp.where(inside[..., None], _bilinear(image, at_y, at_x), 0.0)


def _bilinear(image: Float[Array, "h w 3"], y: Float[Array, "h w"], x: Float[Array, "h w"]) -> Float[Array, "h w 3"]:
    h, w, _ = image.shape
    y, x = jnp.clip(y, 0.0, h - 1.0), jnp.clip(x, 0.0, w - 1.0)
    dy, dx = (y - jnp.floor(y))[..., None], (x - jnp.floor(x))[..., None]
    top, left = jnp.floor(y).astype(jnp.int32), jnp.floor(x).astype(jnp.int32)
    bottom, right = jnp.minimum(top + 1, h - 1), jnp.minimum(left + 1, w - 1)
    upper = image[top, left] * (1 - dx) + image[top, right] * dx
    lower = image[bottom, left] * (1 - dx) + image[bottom, right] * dx
    return upper * (1 - dy) + lower * dy


def _jitter(u: Float[Array, "7"], image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    """Brightness, contrast and saturation, each scaled by 1 +- its strength; contrast about the image's mean grey.

    `u` uniform in [0, 1): whether at all, then one number for each of the three.
    """
    grey_weights = jnp.asarray([0.299, 0.587, 0.114], jnp.float32)
    brightness, contrast, saturation = (
        1.0 + strength * (2.0 * u[i] - 1.0) for i, strength in enumerate((BRIGHTNESS, CONTRAST, SATURATION), start=1)
    )
    out = image * brightness
    mean = jnp.mean(out @ grey_weights)
    out = mean + (out - mean) * contrast
    grey = (out @ grey_weights)[..., None]
    out = grey + (out - grey) * saturation
    return jnp.where(u[0] < JITTER_PROBABILITY, jnp.clip(out, 0.0, 1.0), image)
