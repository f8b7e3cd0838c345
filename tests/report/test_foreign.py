"""Files of a run that somebody else has written or damaged: one line that names the file, nothing forged."""

import dataclasses
import json

import numpy as np
import pytest

from hvd.errors import UserError
from hvd.method.table import META, PARQUET, Advantages
from hvd.report import results as report
from hvd.train import run_dir as runs
from hvd.train.metrics import read_metrics
from tests.train import factory

ESTIMATE = {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4}
OFFLINE = {
    "kind": "offline",
    "run_name": "policy",
    "datasets": {"optimal": {"action_error": {"policy": {"normalised": 0.5, "raw": 0.1}}, "value_rank": ESTIMATE}},
}


def test_an_error_is_one_line_without_control_characters():
    text = str(UserError("a\nb \x1b[2J\u202e " + "x" * 200_000 + " do this"))
    assert text.startswith("a b \\x1b[2J\\u202e") and text.endswith("do this") and len(text) < 5_000


@pytest.mark.parametrize(
    "change",
    [{"kind": "other"}, {"run_name": "../value"}, {"datasets": None}, {"datasets": {"optimal": {"action_error": {}}}}],
)
def test_results_of_another_form(tmp_path, change):
    path = tmp_path / "e/evaluation/policy/results.json"
    path.parent.mkdir(parents=True)
    cfg = dataclasses.replace(factory.experiment(tmp_path), runs_dir=str(tmp_path), exp_name="e")
    path.write_text(json.dumps(OFFLINE))
    assert report.read(cfg) == [OFFLINE]
    path.write_text(json.dumps(OFFLINE | change))
    with pytest.raises(UserError, match=r"results.json.*hvd evaluate"):
        report.read(cfg)


@pytest.mark.parametrize("line", ['{"loss": 1}', '{"step": "x"}', '{"step": 1, "loss": null}', '{"step": -1}'])
def test_metrics_of_another_form(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n' + "[" * 5_000 + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"metrics.jsonl"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("data", [b"stage: \xff", b"[" * 5_000, b"a: 2020-99-99", b"stage: policy\nconfig: null", b"5"])
def test_a_config_of_another_form(tmp_path, data):
    (tmp_path / "config.yaml").write_bytes(data)
    with pytest.raises(UserError, match=r"config.yaml is not the config of a run"):
        runs.read(tmp_path)


@pytest.mark.parametrize("column, value", [("omega", np.nan), ("v", np.inf), ("row", -3), ("split", "test")])
def test_advantages_with_values_that_cannot_be(tmp_path, column, value):
    n, rng = 5, np.random.default_rng(0)
    numbers, floats = np.arange(n), rng.normal(size=(n, 2)).astype(np.float32)
    table = Advantages(
        ("base", "arms"),
        np.full(n, "optimal"),
        np.full(n, "train"),
        numbers,
        numbers,
        numbers,
        floats[:, 0],
        *[floats] * 3,
    )
    table.write(tmp_path, {})
    assert len(Advantages.read(tmp_path).v) == n
    wrong = getattr(table, column).copy()
    wrong[0] = value
    dataclasses.replace(table, **{column: wrong}).write(tmp_path, {})
    with pytest.raises(UserError, match=PARQUET):
        Advantages.read(tmp_path)
    (tmp_path / META).write_text("[]")
    assert Advantages.find(tmp_path) is None
