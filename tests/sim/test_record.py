"""`hvd simulate`: recordings as a user's own would be, resumable, atomic, reproducible."""

import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hvd.configs import Experiment, SimConfig
from hvd.data.labels import load_labels, sidecar_path
from hvd.data.recordings import CAMERAS, episodes_of, open_recording, recording_files
from hvd.errors import UserError
from hvd.robots import get_robot
from hvd.sim import record
from hvd.sim.env import Env
from hvd.sim.record import main, record_episode

SIM = SimConfig(task="tote", num_optimal=1, num_mixed=2, image_size=16, workers=1)


def experiment(folder: Path, **changes) -> Experiment:
    return Experiment("test", runs_dir=str(folder), sim=dataclasses.replace(SIM, **changes))


def columns(path: Path) -> dict[str, np.ndarray]:
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[...]}) if isinstance(item, h5py.Dataset) else None)
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    main(experiment(folder))
    return folder / "test" / "recordings"


def test_both_sets_are_written_and_nothing_else(recorded):
    assert [p.name for p in recording_files(recorded / "optimal")] == ["demo_0000.hdf5"]
    assert [p.name for p in recording_files(recorded / "mixed")] == ["demo_0000.hdf5", "demo_0001.hdf5"]
    assert not [p for p in recorded.rglob("*") if p.name.endswith(".tmp")]


def test_recordings_go_through_the_same_door_as_a_users(recorded):
    for path in recorded.rglob("*.hdf5"):
        (ref,) = episodes_of(path)
        with open_recording(ref, get_robot("r1")) as recording:
            environment, sizes = recording.environment_state(), [recording.image_size(camera) for camera in CAMERAS]
            state, actions = recording.state(), recording.actions()
            images = np.concatenate(list(recording.frames("head")))
        assert recording.fps == 10 and environment.shape[1] == 11 and sizes == [(16, 16)] * 3
        assert len(images) == len(state) and images.std() > 10
        grippers = [6, 16]
        assert -5 < state[:, grippers].min() and 20 < state[:, grippers].max() < 105
        assert actions[:, grippers].min() >= 0 and actions[:, grippers].max() <= 100
        assert np.abs(actions[:, 7:9]).max() <= 0.6 + 1e-6 and np.abs(actions[:, 9]).max() <= 1.2 + 1e-6
        # joints follow their targets: the next state is near the action
        joints = np.setdiff1d(np.arange(21), [*grippers, 7, 8, 9])
        assert np.median(np.abs(state[1:, joints] - actions[:-1, joints])) < 0.05
        assert np.median(np.abs(state[1:, 7:10] - actions[:-1, 7:10])) < 0.05


def test_labels_say_how_it_went(recorded):
    labels = {}
    for path in recorded.rglob("*.hdf5"):
        with h5py.File(path) as file:
            frames = int(file.attrs["horizon"])
            assert file["obs/odom/orientation"].shape == (frames, 4)
            np.testing.assert_allclose(np.linalg.norm(file["obs/odom/orientation"], axis=1), 1, atol=1e-5)
        labels[path.parent.name, path.stem] = found = load_labels(sidecar_path(path), frames)
        assert found.task.startswith("carry the red tote")
        rewards = found.rewards(frames)
        assert rewards.sum() == 4 if found.success else rewards.sum() < 4
        if found.success:
            assert found.is_terminal and rewards[-1] > 0
    optimal = labels["optimal", "demo_0000"]
    assert optimal.success and optimal.quality == "expert" and not optimal.mistakes
    assert [s.name for s in optimal.subtasks] == ["reached", "grasped", "lifted", "placed"]
    assert {labels["mixed", f"demo_000{i}"].quality for i in range(2)} <= {"teleop", "rollout"}


def test_images_have_a_chunk_per_frame(recorded):
    with h5py.File(recorded / "mixed" / "demo_0000.hdf5") as file:
        data = file["obs/rgb/head/img"]
        assert data.chunks == (1, 16, 16, 3) and data.compression == "lzf"


def test_a_second_run_makes_only_what_is_missing(recorded, capsys):
    path = recorded / "mixed" / "demo_0001.hdf5"
    before, other = columns(path), recorded / "mixed" / "demo_0000.hdf5"
    untouched = other.stat().st_mtime_ns
    path.unlink()
    (path.parent / ".demo_0001.hdf5.123.tmp").write_bytes(b"half")
    main(experiment(recorded.parent.parent))
    after = columns(path)
    assert before.keys() == after.keys()
    for key, values in before.items():
        np.testing.assert_array_equal(after[key], values, err_msg=key)
    assert other.stat().st_mtime_ns == untouched
    assert not list(path.parent.glob(".*.tmp"))
    main(experiment(recorded.parent.parent))
    assert "all 1 optimal and 2 mixed episodes" in capsys.readouterr().out


def test_processes_write_the_same_bytes(recorded, tmp_path):
    main(experiment(tmp_path, num_mixed=1, workers=2))
    again = columns(tmp_path / "test/recordings/mixed/demo_0000.hdf5")
    for key, values in columns(recorded / "mixed" / "demo_0000.hdf5").items():
        np.testing.assert_array_equal(again[key], values, err_msg=key)


def test_a_failure_leaves_no_recording(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hvd.sim.recording._fill", full)
    with pytest.raises(OSError):
        main(experiment(tmp_path, num_mixed=1))
    assert not list(tmp_path.rglob("*.hdf5")) and not list(tmp_path.rglob("*.hdf5*tmp"))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"task": "pick"}, "was recorded with sim.task tote, not pick"),
        ({"seed": 7}, "was recorded with sim.seed 0, not 7"),
        ({"num_mixed": 1}, "holds 2 recordings, sim.num_mixed is 1"),
    ],
)
def test_another_simulation_does_not_mix_in(recorded, changes, line):
    before = sorted(p.name for p in recorded.rglob("*"))
    with pytest.raises(UserError, match=line):
        main(experiment(recorded.parent.parent, **changes))
    assert sorted(p.name for p in recorded.rglob("*")) == before


def test_a_config_without_simulation_says_so(tmp_path):
    with pytest.raises(UserError, match=r"sim\.task is not set"):
        main(Experiment("real", runs_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_optimal_tries_seeds_until_a_clean_success(monkeypatch):
    env = Env("tote", 200)
    seen = []
    real = record.roll_out

    def first_fails(env, operator, cameras, quality):
        episode = real(env, operator, cameras, quality)
        seen.append(episode.base_pose[0])
        if len(seen) == 1:
            return dataclasses.replace(
                episode, labels=dataclasses.replace(episode.labels, success=False, terminal=None)
            )
        return episode

    monkeypatch.setattr(record, "roll_out", first_fails)
    episode = record_episode(SIM, "optimal", 0, env, None)
    assert episode.labels.success and len(seen) == 2
    assert not np.array_equal(seen[0], seen[1])


def test_evaluation_never_sees_a_recorded_start():
    """Seeds of recordings are four numbers, those of rollouts are one."""
    env = Env("tote")
    starts = set()
    for seed in [(0, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), 1_000_000, 1_000_001]:
        env.reset(seed)
        starts.add(tuple(env.environment_state().tolist()))
    assert len(starts) == 5


def test_state_only_recordings_have_no_camera_group(tmp_path):
    main(experiment(tmp_path, num_mixed=1, image_size=0))
    with h5py.File(tmp_path / "test/recordings/mixed/demo_0000.hdf5") as file:
        assert "obs/rgb" not in file and "obs/sim/environment_state" in file
    stamp = json.loads((tmp_path / "test/recordings/simulation.json").read_text())
    who = {"operator": "casual", "mistake_rate": 1.0, "noticed": 0.5, "operator_noise": "clumsy"}
    assert stamp == {"task": "tote", "seed": 0, "image_size": 0, "horizon": 200, **who}
