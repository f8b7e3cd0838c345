"""Shared by the tests of training: the tiny experiment, trained once, and a compilation cache for all processes."""

import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest

from hvd.configs import Experiment
from tests.train import factory


@pytest.fixture(scope="session", autouse=True)
def _quick_compilation():
    """One compilation cache, and no optimisation, for this process and the children that tests start."""
    with tempfile.TemporaryDirectory(prefix="hvd-jax-cache-") as folder:
        changed = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        os.environ |= changed
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_disable_most_optimizations", True)  # compiling costs more than the few steps of a test
        yield
        jax.config.update("jax_disable_most_optimizations", False)
        jax.config.update("jax_compilation_cache_dir", before)
        for name in changed:
            os.environ.pop(name, None)  # a test of another folder, in between, may have done it


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    """Both datasets and their norm stats; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    factory.make_data(folder)
    return folder


@pytest.fixture(scope="session")
def trained(data_folder) -> Experiment:
    """The experiment with its value and policy run complete; read only."""
    from hvd.method import policy, value

    cfg = factory.experiment(data_folder)
    value.main(cfg)
    policy.main(cfg)
    return cfg


@pytest.fixture
def fresh(data_folder, tmp_path):
    """cfg = fresh(**changes): the experiment with the shared data and runs of its own."""

    def make(**changes) -> Experiment:
        return factory.experiment(data_folder, runs_dir=str(tmp_path / "runs"), **changes)

    return make


@pytest.fixture
def copied(trained, tmp_path) -> Experiment:
    """The trained experiment in folders of its own, to be damaged."""
    shutil.copytree(trained.exp_dir, tmp_path / "runs" / trained.name)
    return factory.experiment(Path(trained.runs_dir).parent, runs_dir=str(tmp_path / "runs"))
