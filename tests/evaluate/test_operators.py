"""The operators of docs/examples, without their simulators: only the level that errs acts wrongly, and is labelled."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest


def example(name):
    path = Path(__file__).parents[2] / "docs" / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


def frames(labels):
    """{(level, frame)} of an operator's labels."""
    return {(label["level"], frame) for label in labels for frame in range(label["start"], label["end"])}


def differing(levels, done, right):
    """The same of what was done [T, D] and what would have been right."""
    differs = {name: (np.abs(done - right) > 0.01)[:, dims].any(1) for name, dims in levels.items()}
    return {(name, frame) for name, found in differs.items() for frame in np.flatnonzero(found)}


@pytest.mark.parametrize("sizes", [{"base": 0.1}, {"height": 0.05}, {"aside": 0.3}, {"delay": 5}])
def test_tidybot(sizes):
    kinder = example("tidybot_kinder")
    level = {"base": "base", "delay": "gripper"}.get(*sizes, "arm")
    operator = kinder.Operator(kinder.task_of("KinematicShelf3D-o1"), 0.0)
    book = SimpleNamespace(position=(0.5, -0.5, 0.025))
    operator.begin(SimpleNamespace(get_object_pose=lambda _: book, get_object_half_extents=lambda _: [0.025] * 3), 0)
    operator.slips = {0: kinder.Slip(level, "wrong", **sizes)}
    seen, right, done = np.zeros(11), [], []
    while operator.moves:
        right.append(operator.action(seen, operator.moves[0], None)[0])
        done.append(operator.act(seen))
        seen[:10] += done[-1][:10]
    wrong = differing(kinder.LEVELS, np.stack(done), np.stack(right))
    assert frames(operator.labels()) == wrong and 2 < len(wrong) < len(done) and {name for name, _ in wrong} == {level}


def test_sawyer():
    sawyer = example("sawyer_metaworld")
    asked, seen = np.array([0.5, -2.0, 0.0, 0.6]), np.zeros(39)
    for mistakes, least, most in ((0.0, 0, 0), (1.0, 100, 300)):
        operator = sawyer.Operator(lambda _: asked, mistakes)
        operator.begin(seed=3)
        done = np.stack([operator.act(seen) for _ in range(400)])
        wrong = differing(sawyer.LEVELS, done, np.clip(asked, -1, 1))
        assert frames(operator.labels()) == wrong and least <= len(wrong) <= most and np.abs(done).max() <= 1
        assert len({frame for _, frame in wrong}) == len(wrong) and len({name for name, _ in wrong}) == 2 * mistakes
