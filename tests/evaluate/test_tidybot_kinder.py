"""The operator of docs/examples/tidybot_kinder.py, without KinDER: it moves as it says, nothing is in the way."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

FILE = Path(__file__).parents[2] / "docs" / "examples" / "tidybot_kinder.py"


@pytest.mark.parametrize("sizes", [{"base": 0.1}, {"height": 0.05}, {"aside": 0.3}, {"delay": 5}])
def test_only_the_level_that_errs_acts_otherwise_and_is_labelled(sizes):
    spec = importlib.util.spec_from_file_location("tidybot_kinder", FILE)
    assert spec and spec.loader
    spec.loader.exec_module(kinder := importlib.util.module_from_spec(spec))
    level = {"base": "base", "delay": "gripper"}.get(*sizes, "arm")
    operator = kinder.Operator(kinder.task_of("KinematicShelf3D-o1"), 0.0)
    book = SimpleNamespace(position=(0.5, -0.5, 0.025))
    operator.begin(SimpleNamespace(get_object_pose=lambda _: book, get_object_half_extents=lambda _: [0.025] * 3), 0)
    operator.slips = {0: kinder.Slip(level, "wrong", **sizes)}
    seen, differs = np.zeros(11), []
    while operator.moves:
        right, _ = operator.action(seen, operator.moves[0], None)
        done = operator.act(seen)
        differs.append({name for name, dims in kinder.LEVELS.items() if np.abs(done - right)[dims].max() > 0.01})
        seen[:10] += done[:10]
    frames = {frame for label in operator.labels() for frame in range(label["start"], label["end"])}
    assert frames == {frame for frame, names in enumerate(differs) if names} and 2 < len(frames) < len(differs)
    assert set.union(*differs) == {level} == {label["level"] for label in operator.labels()}
