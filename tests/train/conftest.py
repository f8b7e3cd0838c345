"""Shared by the tests of training: the tiny experiment (tests/conftest.py trains it) in folders of a test's own."""

import shutil

import pytest

from hvd.configs import Experiment
from hvd.data.loader import Loader
from hvd.train import stage_data
from tests.train import factory


@pytest.fixture
def fresh(data_folder, tmp_path):
    """cfg = fresh(**changes): the experiment with the shared data and runs of its own."""

    def make(**changes) -> Experiment:
        return factory.experiment(data_folder, runs_dir=str(tmp_path / "runs"), **changes)

    return make


@pytest.fixture
def copied(trained, data_folder, tmp_path) -> Experiment:
    """The trained experiment in folders of its own, to be damaged."""
    shutil.copytree(trained.exp_dir, tmp_path / "runs" / trained.name)
    return factory.experiment(data_folder, runs_dir=str(tmp_path / "runs"))


@pytest.fixture
def at_step(monkeypatch):
    """at_step(n, do): before the batch of step n is handed out, `do(batch)` gives the batch to use."""

    def install(number, do):
        class Watched(Loader):
            def __next__(self):
                step, batch = super().__next__()
                return step, do(batch) if step == number else batch

        monkeypatch.setattr(stage_data, "Loader", Watched)

    return install
