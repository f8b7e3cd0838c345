"""The simulated R1. Importing this package picks the OpenGL platform, which must be known before mujoco is imported."""

import ctypes
import os
import sys

_LIBRARIES = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so.8"}


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _pick_opengl(wanted: str) -> str:
    """The platform `wanted` by the user if it can be loaded (importing mujoco fails otherwise), else EGL or OSMesa,
    else "disable": pictures are then ray cast (render.py)."""
    if wanted and wanted not in _LIBRARIES:
        return wanted
    for platform in (wanted, *_LIBRARIES) if wanted else _LIBRARIES:
        if _loads(_LIBRARIES[platform]):
            return platform
    return "disable"


if sys.platform == "linux":
    os.environ["MUJOCO_GL"] = _pick_opengl(os.environ.get("MUJOCO_GL", "").lower())
