"""The simulated R1. Importing this package picks the OpenGL platform, which must be known before mujoco is imported."""

import ctypes
import os
import sys


def _pick_opengl() -> str:
    """EGL or OSMesa when their libraries are on this machine, else "disable" (pictures are then ray cast: render.py)."""
    for platform, library in (("egl", "libEGL.so.1"), ("osmesa", "libOSMesa.so.8")):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return platform
    return "disable"


if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
    os.environ["MUJOCO_GL"] = _pick_opengl()
