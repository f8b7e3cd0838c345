"""The recipes of docs/extending.md, each followed once from a file of this folder to its end."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd import configs, robots
from hvd.configs import DataConfig, Experiment, KeyMap, SimConfig
from hvd.data import convert as converting
from hvd.data import layout, recordings
from hvd.data.convert import ConvertConfig, convert
from hvd.data.dataset import Dataset
from hvd.data.labels import Labels, sidecar_path, write_labels
from hvd.errors import UserError
from hvd.robots import Level, Part, Robot
from hvd.sim import record, tasks
from hvd.sim.rollouts import RolloutSpec, roll_out_group
from tests.data.joylo import Here, moving_images

HERE = Path(__file__).parent


@pytest.fixture
def add(monkeypatch):
    """add(package, folder): the modules of tests/newcomers/<folder> belong to `package` during the test."""

    def put(package, folder):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(HERE / folder)])

    for package in (recordings, layout):
        package.formats.cache_clear()
    yield put
    for package in (recordings, layout):
        package.formats.cache_clear()


@pytest.fixture
def read_here(monkeypatch):
    """Recordings are read in this process, which alone knows the test's formats and robots."""
    monkeypatch.setattr(converting, "Isolated", Here)


def write_npz(path: Path, length: int, dims: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(length)
    state, action = (rng.normal(size=(length, dims)).astype(np.float32) for _ in range(2))
    np.savez(path, state=state, action=action, head=moving_images(length, (32, 48), length))
    write_labels(sidecar_path(path), Labels("wave", True))
    return state, action


def test_a_recording_format(add, read_here, tmp_path):
    add(recordings, "recordings")
    written = [write_npz(tmp_path / f"{i}.npz", length, 26) for i, length in enumerate((9, 7))]
    config = ConvertConfig(
        (str(tmp_path),), "me/set", root=str(tmp_path / "set"), robot="g1", cameras=("head",), workers=1
    )
    assert convert(config).num_episodes == 2
    keys = KeyMap(images={"base_0_rgb": "observation.images.head"})
    dataset = Dataset.open(DataConfig(root=str(tmp_path / "set"), keys=keys), cameras=("base_0_rgb",), robot="g1")
    np.testing.assert_array_equal(dataset.state, np.concatenate([state for state, _ in written]))
    np.testing.assert_array_equal(dataset.actions, np.concatenate([action for _, action in written]))
    assert dataset.fps == 5 and dataset.tasks == ("wave",)
    got, images = dataset.frames("base_0_rgb", np.arange(9)), moving_images(9, (32, 48), 9)
    assert np.abs(got.astype(int) - images).mean() < 6

    np.savez(tmp_path / "2.npz", other=np.zeros(3))
    with pytest.raises(UserError, match=r"2\.npz: no array called action"):
        recordings.episodes_of(tmp_path / "2.npz")
    with pytest.raises(UserError, match=r"files ending in \.hdf5 or \.h5 or \.npz"):
        recordings.recording_files(HERE)


def test_a_dataset_format(add, tmp_path):
    add(layout, "layout")
    rng, lengths = np.random.default_rng(0), (6, 4)
    episodes = [{"length": length, "task": "wave", "success": i == 0} for i, length in enumerate(lengths)]
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_text(json.dumps({"codebase_version": "npz-1", "fps": 5, "features": {}}))
    (tmp_path / "meta/episodes.json").write_text(json.dumps(episodes))
    written = [(rng.normal(size=(n, 3)).astype(np.float32), rng.normal(size=(n, 2))) for n in lengths]
    for i, (state, action) in enumerate(written):
        np.savez(tmp_path / f"{i}.npz", **{"observation.state": state, "action": action})
    dataset = Dataset.open(DataConfig(root=str(tmp_path), reward="success_at_end"), cameras=())
    np.testing.assert_array_equal(dataset.state, np.concatenate([state for state, _ in written]))
    np.testing.assert_array_equal(dataset.actions, np.concatenate([x for _, x in written]).astype(np.float32))
    assert dataset.version == "npz-1" and dataset.rewards.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_a_robot(monkeypatch, read_here, tmp_path):
    arm = Part(("shoulder", "elbow"), "action/joints", "obs/joints")
    robot = Robot(
        "waver",
        ("x", "shoulder", "elbow"),
        (Level("base", (0,)), Level("arm", (1, 2))),
        position_dims=(1, 2),
        parts=(Part(("x",), "action/base", "obs/base"), arm),
    )
    monkeypatch.setattr(robots, "ROBOTS", {**robots.ROBOTS, "waver": robot})
    state, action = np.random.default_rng(0).normal(size=(2, 8, 3)).astype(np.float32)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for group, values in (("obs", state), ("action", action)):
            file[f"{group}/base"], file[f"{group}/joints"] = values[:, 0], values[:, 1:]
    write_labels(sidecar_path(tmp_path / "a.hdf5"), Labels("wave", True))
    convert(ConvertConfig((str(tmp_path),), "me/set", root=str(tmp_path / "set"), robot="waver", cameras=(), workers=1))
    dataset = Dataset.open(DataConfig(root=str(tmp_path / "set")), cameras=(), robot="waver")
    np.testing.assert_array_equal(dataset.state, state)
    np.testing.assert_array_equal(dataset.actions, action)
    cfg = Experiment("mine", robot="waver")
    assert cfg.levels() == ((0,), (1, 2)) and cfg.level_names() == ("base", "arm")


def test_a_simulated_task(add, monkeypatch, tmp_path):
    add(tasks, "sim_tasks")
    monkeypatch.setattr(configs, "SIM_TASKS", (*configs.SIM_TASKS, "touch"))
    monkeypatch.setattr(tasks, "SIM_TASKS", configs.SIM_TASKS)
    sim = SimConfig(task="touch", num_optimal=1, num_mixed=1, image_size=0, workers=1)
    record.main(Experiment("mine", runs_dir=str(tmp_path), sim=sim))
    folder = tmp_path / "mine/recordings"
    for name in ("optimal", "mixed"):
        config = ConvertConfig((str(folder / name),), "x/y", root=str(tmp_path / name), cameras=(), workers=1)
        assert convert(config).num_successes == 1
    optimal, mixed = (Dataset.open(DataConfig(root=str(tmp_path / n)), cameras=()) for n in ("optimal", "mixed"))
    assert optimal.tasks == ("touch the yellow bar",) and optimal.rewards.sum() == 1 and optimal.rewards[-1] == 1
    assert mixed.num_frames > 0 and len(list((tmp_path / "mixed/labels").iterdir())) == 1

    def still(state, images, prompts, noise):
        return np.zeros((len(state), 5, 21))

    (rollout,) = roll_out_group(RolloutSpec("touch", 10, 5), [0], still)
    assert rollout.stage == 0 and not rollout.success
