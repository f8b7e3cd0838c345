"""Pictures: OpenGL and ray casting show the same scene, and what they show is useful."""

import os
import subprocess
import sys

import mujoco
import numpy as np
import pytest

from hvd import sim
from hvd.sim import render, scene
from hvd.sim.env import Env


@pytest.fixture(scope="module")
def grasping():
    env = Env("tote")
    env.reset(0)
    operator = env.task.operator(env, 0)
    for _ in range(26):
        env.step(operator.act())
    return env


def test_ray_cast_cameras_see_what_opengl_sees(grasping):
    if render.available_backend() != "opengl":
        pytest.skip("no OpenGL on this machine")
    with render.Cameras(grasping.model, 64, 64, "opengl") as opengl:
        for name in (*scene.CAMERAS, scene.OVERVIEW):
            drawn = opengl.image(grasping.data, name).astype(int)
            cast = render.cast_image(grasping.model, grasping.data, name, 64, 64).astype(int)
            assert drawn.shape == cast.shape == (64, 64, 3)
            assert np.abs(drawn - cast).mean() < 15
            # away from edges of things they agree
            assert (np.abs(drawn - cast).max(-1) < 40).mean() > 0.9


def test_each_camera_shows_the_object_at_the_grasp(grasping):
    model, data = grasping.model, grasping.data
    before = {name: render.cast_image(model, data, name, 48, 48).astype(int) for name in scene.CAMERAS}
    place = data.qpos[grasping.object_qpos : grasping.object_qpos + 7].copy()
    data.qpos[grasping.object_qpos + 2] = -3
    mujoco.mj_forward(model, data)
    try:
        for name in scene.CAMERAS:
            gone = render.cast_image(model, data, name, 48, 48).astype(int)
            assert (np.abs(before[name] - gone).max(-1) > 20).mean() > 0.03, name
    finally:
        data.qpos[grasping.object_qpos : grasping.object_qpos + 7] = place
        mujoco.mj_forward(model, data)


def test_without_opengl_rays_are_used(monkeypatch):
    render.available_backend.cache_clear()
    monkeypatch.setenv("MUJOCO_GL", "disable")
    assert render.available_backend() == "rays"
    monkeypatch.setenv("MUJOCO_GL", "egl")
    render.available_backend.cache_clear()

    def broken(*_):
        raise RuntimeError("no driver")

    monkeypatch.setattr(mujoco, "Renderer", broken)
    assert render.available_backend() == "rays"
    render.available_backend.cache_clear()


@pytest.mark.parametrize(
    ("wanted", "present", "picked"),
    [
        ("", {"libEGL.so.1", "libOSMesa.so.8"}, "egl"),
        ("", {"libOSMesa.so.8"}, "osmesa"),
        ("", set(), "disable"),
        ("osmesa", {"libEGL.so.1", "libOSMesa.so.8"}, "osmesa"),
        ("egl", set(), "disable"),
        ("egl", {"libOSMesa.so.8"}, "osmesa"),
        ("glfw", set(), "glfw"),
    ],
)
def test_platform_is_one_that_can_be_loaded(monkeypatch, wanted, present, picked):
    monkeypatch.setattr(sim, "_loads", lambda library: library in present)
    assert sim._pick_opengl(wanted) == picked


@pytest.mark.skipif(sys.platform != "linux", reason="other systems bring their own OpenGL")
def test_a_machine_without_graphics_libraries_draws_by_rays():
    """In a fresh interpreter, where no library can be loaded."""
    program = """
import ctypes
load = ctypes.CDLL
def refuse(name, *args, **kwargs):
    if name and ("EGL" in str(name) or "OSMesa" in str(name) or "libGL" in str(name)):
        raise OSError(name)
    return load(name, *args, **kwargs)
ctypes.CDLL = refuse
from hvd.sim import render
from hvd.sim.env import Env
env = Env("pick"); env.reset(0)
with render.Cameras(env.model, 24, 24) as cameras:
    print(cameras.backend, cameras.image(env.data, "head").std() > 10)
"""
    environment = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["rays", "True"]


def test_software_opengl_draws_without_threads_of_its_own():
    if render.available_backend() != "opengl":
        pytest.skip("no OpenGL on this machine")
    program = """
from pathlib import Path
from hvd.sim import render
from hvd.sim.env import Env
env = Env("pick"); env.reset(0)
with render.Cameras(env.model, 24, 24, "opengl") as cameras:
    cameras.image(env.data, "head")
    print([path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")])
"""
    environment = {k: v for k, v in os.environ.items() if k != "LP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "python" in done.stdout and "llvmpipe" not in done.stdout
