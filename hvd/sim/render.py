"""Pictures of the simulated cameras: OpenGL where the machine has it, else ray casting on the CPU.

A machine with only Python and pip has no libEGL or libOSMesa, and no pip package brings one. MuJoCo's own ray casts
need no graphics library: the same scene, cameras, colours and light, about four times slower than software OpenGL.
"""

import functools
import os
from typing import Literal

import mujoco as mj
import numpy as np
from jaxtyping import Float64, UInt8

Backend = Literal["opengl", "rays"]

_AMBIENT, _HEADLIGHT_DIFFUSE = 0.1, 0.4  # MuJoCo's default headlight
_FAR = 50.0
_SKY = np.zeros(3)

# Mesa's software OpenGL is to draw in the calling thread: with a thread of its own it was seen to wait for ever (both
# threads on a futex below glReadPixels) and to crash, once in some thousands of episodes. Read when a context is made.
os.environ.setdefault("LP_NUM_THREADS", "0")


@functools.cache
def available_backend() -> Backend:
    """ "opengl" when a picture can really be drawn with it here (library, driver and context), else "rays"."""
    if os.environ.get("MUJOCO_GL", "").lower() in ("disable", "disabled", "off", "false", "0"):
        return "rays"
    spec = mj.MjSpec()
    spec.worldbody.add_geom(type=mj.mjtGeom.mjGEOM_SPHERE, size=[0.1, 0, 0])
    model = spec.compile()
    data = mj.MjData(model)
    try:
        with mj.Renderer(model, 8, 8) as renderer:
            renderer.update_scene(data)
            renderer.render()
    except (RuntimeError, ImportError, AttributeError, mj.FatalError):  # each platform fails in its own way
        return "rays"
    return "opengl"


class Cameras:
    """Draws the cameras of one model at one size; use as a context manager or call close()."""

    def __init__(self, model: mj.MjModel, height: int, width: int, backend: Backend | None = None):
        self.backend = backend or available_backend()
        self._model, self._height, self._width = model, height, width
        self._renderer = mj.Renderer(model, height, width) if self.backend == "opengl" else None

    def image(self, data: mj.MjData, camera: str) -> UInt8[np.ndarray, "h w 3"]:
        """What `camera` sees."""
        if self._renderer is None:
            return cast_image(self._model, data, camera, self._height, self._width)
        self._renderer.update_scene(data, camera)
        return self._renderer.render()

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def __enter__(self) -> "Cameras":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def cast_image(model: mj.MjModel, data: mj.MjData, camera: str, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """What `camera` sees, one ray per pixel, with OpenGL's light model (ambient, headlight, one lamp, no shadow)."""
    index = model.camera(camera).id
    rays = _rays(float(model.cam_fovy[index]), height, width) @ data.cam_xmat[index].reshape(3, 3).T
    count = len(rays)
    geom, distance, normal = np.full(count, -1, np.int32), np.zeros(count), np.zeros(3 * count)
    eye = data.cam_xpos[index]
    body = -1
    mj.mj_multiRay(model, data, eye, rays.ravel(), None, 1, body, geom, distance, normal, count, _FAR)
    normals = normal.reshape(-1, 3)
    light = _AMBIENT + _HEADLIGHT_DIFFUSE * np.maximum(-np.einsum("nc,nc->n", normals, rays), 0)
    for lamp in range(model.nlight):
        light += model.light_diffuse[lamp, 0] * np.maximum(normals @ -data.light_xdir[lamp], 0)
    colour = model.geom_rgba[geom, :3] * np.minimum(light, 1.0)[:, None]
    colour[geom < 0] = _SKY
    return (colour * 255).astype(np.uint8).reshape(height, width, 3)


@functools.lru_cache(maxsize=16)
def _rays(fovy: float, height: int, width: int) -> Float64[np.ndarray, "n 3"]:
    """Unit directions in the camera's frame (looks along -z, y up), one per pixel, row by row from the top."""
    extent = np.tan(np.deg2rad(fovy) / 2)
    up = extent * (1 - 2 * (np.arange(height) + 0.5) / height)
    right = extent * width / height * (2 * (np.arange(width) + 0.5) / width - 1)
    rays = np.empty((height, width, 3))
    rays[..., 0], rays[..., 1], rays[..., 2] = right, up[:, None], -1
    return (rays / np.linalg.norm(rays, axis=-1, keepdims=True)).reshape(-1, 3)
