"""The table of layouts in docs/data.md says what hvd and lerobot do with them."""

import importlib.util
import os
import re

import pytest

from tests.data import zoo
from tests.folders import ROOT

TEXT = (ROOT / "docs/data.md").read_text().partition(zoo.BEGIN)[2].partition(zoo.END)[0]
TABLE = {name: (hvd, lerobot) for name, hvd, lerobot in re.findall(r"^\| (.*) \| (.*) \| (.*) \|$", TEXT, re.M)[1:]}


def test_all_layouts_are_in_the_table():
    assert list(TABLE) == list(zoo.LAYOUTS) and len(TABLE) >= 60, "python -m tests.data.zoo"


@pytest.mark.parametrize("name", zoo.LAYOUTS)
def test_hvd_does_what_the_table_says(tmp_path, name):
    assert zoo.by_hvd(zoo.LAYOUTS[name](tmp_path), tmp_path / "set") == TABLE[name][0]


def test_hvd_refuses_nothing_that_lerobot_reads():
    # lerobot takes any rate, order and camera for what it is said to be, and lets NaN through
    contradictions = {"fps 30, timestamps of 10", "rows backwards", "actions with NaN", "depth camera"}
    contradictions |= {"total_frames of another dataset"}
    assert not {n for n, (hvd, lerobot) in TABLE.items() if lerobot == "read" and hvd != "read"} - contradictions


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lerobot") is None, reason="needs the `lerobot` extra")
@pytest.mark.filterwarnings("ignore")
def test_lerobot_does_what_the_table_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(os.environ, "HF_DATASETS_CACHE", str(tmp_path))
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path)
    assert zoo.rows(zoo.by_lerobot) == {name: lerobot for name, (_, lerobot) in TABLE.items()}
