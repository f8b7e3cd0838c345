"""The operator of docs/examples/sawyer_metaworld.py, without Meta-World: one that always does the same."""

import importlib.util
from pathlib import Path

import numpy as np

FILE = Path(__file__).parents[2] / "docs" / "examples" / "sawyer_metaworld.py"


def test_only_the_level_that_errs_acts_otherwise_and_is_labelled():
    spec = importlib.util.spec_from_file_location("sawyer_metaworld", FILE)
    assert spec and spec.loader
    spec.loader.exec_module(sawyer := importlib.util.module_from_spec(spec))
    right, seen = np.array([0.5, -2.0, 0.0, 0.6]), np.zeros(39)
    operator = sawyer.Operator(lambda _: right, 1.0)
    operator.begin(seed=3)
    done = np.stack([operator.act(seen) for _ in range(400)])
    differs = np.abs(done - np.clip(right, -1, 1)) > 0.01
    wrong = {name: set(np.flatnonzero(differs[:, dims].any(1)).tolist()) for name, dims in sawyer.LEVELS.items()}
    labelled = {name: set() for name in sawyer.LEVELS}
    for label in operator.labels():
        labelled[label["level"]] |= set(range(label["start"], label["end"]))
    assert labelled == wrong and not wrong["arm"] & wrong["gripper"]
    assert 100 < sum(map(len, wrong.values())) < 300 and all(wrong.values()) and np.abs(done).max() <= 1
    operator = sawyer.Operator(lambda _: right, 0.0)
    operator.begin(seed=3)
    np.testing.assert_array_equal(operator.act(seen), np.clip(right, -1, 1))
    assert not operator.labels()
