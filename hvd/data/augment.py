"""Image augmentation on the device: random crop, small rotation, colour jitter; own key per camera and per sample."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

CROP = 0.95  # side of the random crop
ROTATION = 5.0  # degrees, either way
BRIGHTNESS, CONTRAST, SATURATION = 0.3, 0.4, 0.5
JITTER_PROBABILITY = 0.5  # openpi's augmax applies the jitter to half of the images


def to_float(images: Mapping[str, UInt8[Array, "b h w 3"]]) -> dict[str, Float[Array, "b h w 3"]]:
    """uint8 0..255 -> float32 in [-1, 1], without augmentation."""
    return {camera: x.astype(jnp.float32) / 127.5 - 1.0 for camera, x in images.items()}


def augment_images(
    key: Key[Array, ""], images: Mapping[str, UInt8[Array, "b h w 3"]]
) -> dict[str, Float[Array, "b h w 3"]]:
    """Augmented float32 images in [-1, 1].

    Cameras whose name holds "wrist" keep their geometry: their view is fixed to the hand. The others get a random crop
    of 95% of each side, scaled back, and a rotation within 5 degrees (outside is black). All get colour jitter, half of
    the time.
    """
    out = {}
    for number, camera in enumerate(sorted(images)):
        keys = jax.random.split(jax.random.fold_in(key, number), images[camera].shape[0])
        one = _augment_wrist if "wrist" in camera else _augment
        out[camera] = jax.vmap(one)(keys, images[camera].astype(jnp.float32) / 255.0) * 2.0 - 1.0
    return out


def _augment_wrist(key: Key[Array, ""], image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    return _jitter(key, image)


def _augment(key: Key[Array, ""], image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    geometry, colour = jax.random.split(key)
    return _jitter(colour, _crop_and_rotate(geometry, image))


def _crop_and_rotate(key: Key[Array, ""], image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    """Crop, scaling and rotation as one bilinear sampling."""
    h, w, _ = image.shape
    where, turn = jax.random.split(key)
    corner = jax.random.uniform(where, (2,)) * (1.0 - CROP) * jnp.asarray([h, w], jnp.float32)
    angle = jnp.deg2rad(jax.random.uniform(turn, (), minval=-ROTATION, maxval=ROTATION))
    rows, columns = jnp.arange(h, dtype=jnp.float32), jnp.arange(w, dtype=jnp.float32)
    y, x = jnp.meshgrid(rows - (h - 1) / 2, columns - (w - 1) / 2, indexing="ij")
    turned_y = jnp.cos(angle) * y - jnp.sin(angle) * x
    turned_x = jnp.sin(angle) * y + jnp.cos(angle) * x
    inside = (jnp.abs(turned_y) <= (h - 1) / 2 + 0.5) & (jnp.abs(turned_x) <= (w - 1) / 2 + 0.5)
    at_y = corner[0] + (turned_y + h / 2) * CROP - 0.5
    at_x = corner[1] + (turned_x + w / 2) * CROP - 0.5
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


def _jitter(key: Key[Array, ""], image: Float[Array, "h w 3"]) -> Float[Array, "h w 3"]:
    """Brightness, contrast and saturation, each scaled by 1 +- its strength; contrast about the image's mean grey."""
    apply, b, c, s = jax.random.split(key, 4)
    grey_weights = jnp.asarray([0.299, 0.587, 0.114], jnp.float32)
    out = image * jax.random.uniform(b, (), minval=1 - BRIGHTNESS, maxval=1 + BRIGHTNESS)
    mean = jnp.mean(out @ grey_weights)
    out = mean + (out - mean) * jax.random.uniform(c, (), minval=1 - CONTRAST, maxval=1 + CONTRAST)
    grey = (out @ grey_weights)[..., None]
    out = grey + (out - grey) * jax.random.uniform(s, (), minval=1 - SATURATION, maxval=1 + SATURATION)
    return jnp.where(jax.random.bernoulli(apply, JITTER_PROBABILITY), jnp.clip(out, 0.0, 1.0), image)
