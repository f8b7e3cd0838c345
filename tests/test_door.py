"""`import hvd`: what a notebook needs, against what the run itself has; and that the import costs nothing."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import hvd
from hvd.configs import DataConfig, KeyMap
from hvd.data.dataset import Dataset
from hvd.errors import UserError
from tests.folders import ROOT


def test_the_import_loads_nothing():
    code = "import sys, hvd; heavy = {'jax', 'numpy', 'pyarrow', 'flax'} & set(sys.modules); print(dir(hvd), heavy)"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.endswith(" set()\n")
    assert all(repr(name) in told for name in hvd.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'load_polcy'"):
        hvd.load_polcy  # noqa: B018


def test_a_dataset_by_its_folder_or_its_name(trained, monkeypatch):
    folder = trained.suboptimal_data.path()
    monkeypatch.setenv("HF_LEROBOT_HOME", str(folder.parent))
    configured = Dataset.open(trained.suboptimal_data, cameras=())
    for where in (folder, str(folder), folder.name, trained.suboptimal_data):
        dataset = hvd.open_dataset(where, cameras=())
        assert dataset.digest == configured.digest and len(dataset.episodes) == 6
        np.testing.assert_array_equal(dataset.rewards, configured.rewards)
    other = hvd.open_dataset(DataConfig(root=str(folder), keys=KeyMap(state=("action[0:2]",))), cameras=())
    assert other.state.shape == (dataset.num_frames, 2)


def test_cameras_have_the_datasets_names(g1_data):
    dataset = hvd.open_dataset(g1_data)
    (camera,) = dataset.cameras
    assert camera == "observation.images.cam_high"
    assert dataset.frames(camera, np.array([0, 5])).shape == (2, 480, 640, 3)
    assert dataset.rewards.sum() == len(dataset.episodes), "no reward column: one at the end of each success"


def test_a_policy_acts_and_a_value_function_is_asked(trained):
    dataset = hvd.open_dataset(trained.suboptimal_data.path())
    state, prompts = dataset.state[:3], [dataset.task_of(row) for row in range(3)]
    chunk = hvd.load_policy(trained.policy_dir).act(state, {}, prompts, jax.random.key(0))
    horizon = trained.model.action_horizon
    assert chunk.shape == (3, horizon, 21) and np.isfinite(chunk).all()

    value = hvd.load_value(trained.value_dir)
    v, q = value.ask(state, {}, prompts, chunk)
    assert v.shape == (3,) and q.shape == (3, len(value.levels)) and np.isfinite(q).all()
    again, other = value.ask(state, {}, prompts, chunk + 1.0)
    np.testing.assert_allclose(again, v, rtol=1e-5)  # V sees no action
    assert np.abs(other - q).max() > 1e-6


def test_curves_of_a_run(trained):
    steps, losses = hvd.read_metrics(trained.value_dir)["train"]["loss_q"]
    assert steps.tolist() == [4, 8, 12] and np.isfinite(losses).all()


def test_the_table_of_an_experiment_or_of_its_run(trained):
    table = hvd.read_advantages(trained.exp_dir)
    assert table.levels == trained.level_names() and len(table.v) == len(table.omega) > 100
    np.testing.assert_array_equal(hvd.read_advantages(trained.policy_dir).a, table.a)


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        hvd.load_policy(tmp_path)
    with pytest.raises(UserError, match=r"info\.json"):
        hvd.open_dataset(tmp_path)
    with pytest.raises(UserError, match="run `hvd advantages`"):
        hvd.read_advantages(tmp_path)
