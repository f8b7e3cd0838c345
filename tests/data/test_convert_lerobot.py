"""lerobot itself opens our datasets, and every value in them is the recordings'."""

import importlib.util
import os

import numpy as np
import pytest

from hvd.data.convert import ConvertConfig, convert
from hvd.data.lerobot_stats import ImageStats
from hvd.data.lerobot_writer import Feature, LeRobotWriter, Segment
from hvd.data.video import encode_video
from tests.data import joylo

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("lerobot") is None, reason="needs the `lerobot` extra: uv sync --extra lerobot"
    ),
    pytest.mark.filterwarnings("ignore"),  # of lerobot and what it imports
]


@pytest.fixture
def lerobot(tmp_path, monkeypatch):
    """Opens a dataset with lerobot, offline, its cache in the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from datasets import config
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def opened(root, **kw):
        return LeRobotDataset("me/set", root=root, video_backend="pyav", **kw)

    return opened


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_every_value(tmp_path, lerobot, codec):
    lengths = (30, 7, 22)
    raw = tmp_path / "raw"
    truths = joylo.write_folder(raw, lengths, failures=(1,), environment=True, size=(48, 64))
    truths += joylo.write_merged(tmp_path / "merged.hdf5", (9,), environment=True, size=(48, 64))
    lengths += (9,)
    config = ConvertConfig((str(raw), str(tmp_path / "merged.hdf5")), "me/set", root=str(tmp_path / "set"), codec=codec)
    root = convert(config).root
    dataset = lerobot(root)
    assert (dataset.num_episodes, dataset.num_frames, dataset.fps) == (4, 68, 10)
    assert dataset.meta.robot_type == "r1"
    rows = list(dataset.meta.episodes)
    assert [row["success"] for row in rows] == [True, False, True, True]
    assert [row["quality"] for row in rows] == ["expert", "teleop", "expert", "expert"]
    ours = {
        camera: joylo.read_video(root / f"videos/observation.images.{camera}/chunk-000/file-000.mp4")
        for camera in truths[0].images
    }
    index = 0
    for episode, (length, truth) in enumerate(zip(lengths, truths, strict=True)):
        assert (rows[episode]["dataset_from_index"], rows[episode]["dataset_to_index"]) == (index, index + length)
        success = episode != 1
        for t in range(length):
            item = {key: value if isinstance(value, str) else value.numpy() for key, value in dataset[index].items()}
            np.testing.assert_array_equal(item["observation.state"], truth.state[t])
            np.testing.assert_array_equal(item["observation.environment_state"], truth.environment[t])
            np.testing.assert_array_equal(item["action"], truth.actions[t])
            last, half = t == length - 1, t == length // 2 - 1
            assert item["next.reward"] == float(half or (last and success))
            assert item["terminal"] == (last and success) and item["truncated"] == (last and not success)
            assert item["timestamp"] == np.float32(t / 10)
            assert (item["frame_index"], item["episode_index"], item["index"]) == (t, episode, index)
            assert item["task"] == "stack the boxes" and item["task_index"] == 0
            for camera, images in truth.images.items():
                image = item[f"observation.images.{camera}"].transpose(1, 2, 0)
                assert image.dtype == np.float32
                np.testing.assert_array_equal(np.round(image * 255), ours[camera][index])
                assert np.abs(image * 255 - images[t]).mean() < 6
            index += 1
    assert index == len(dataset)


def test_features_are_those_that_lerobot_would_have_written(tmp_path, lerobot):
    """The same dataset made by lerobot: same columns, types, shapes and info, but for the encoder's settings."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    truths = joylo.write_folder(tmp_path / "raw", (6, 5), size=(48, 64))
    ours = lerobot(convert(ConvertConfig((str(tmp_path / "raw"),), "me/set", root=str(tmp_path / "set"))).root)
    index = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    features = {
        key: {name: feature[name] for name in ("dtype", "shape", "names")}
        for key, feature in ours.meta.features.items()
        if key not in index
    }
    theirs = LeRobotDataset.create("me/theirs", 10, features, root=tmp_path / "theirs", robot_type="r1")
    for truth, success in zip(truths, (True, True), strict=True):
        length = len(truth.state)
        for t in range(length):
            last = t == length - 1
            frame = {f"observation.images.{camera}": images[t] for camera, images in truth.images.items()}
            frame |= {"observation.state": truth.state[t], "action": truth.actions[t], "task": "stack the boxes"}
            frame["next.reward"] = np.array([last or t == length // 2 - 1], np.float32)
            frame |= {"terminal": np.array([last and success]), "truncated": np.array([False])}
            theirs.add_frame(frame)
        theirs.save_episode()
    theirs.finalize()
    theirs = lerobot(tmp_path / "theirs")
    assert list(ours.meta.features) == list(theirs.meta.features)
    for key, feature in theirs.meta.features.items():
        mine = dict(ours.meta.features[key])
        their_info, my_info = feature.get("info") or {}, mine.pop("info", None) or {}
        assert mine == {name: value for name, value in feature.items() if name != "info"}
        assert set(my_info) == set(their_info)
        encoder = {"video.codec", "video.preset", "video.crf"}
        assert {k: v for k, v in my_info.items() if k not in encoder} == {
            k: v for k, v in their_info.items() if k not in encoder
        }
    assert ours.hf_dataset.features == theirs.hf_dataset.features
    for mine, their in zip(ours.meta.episodes, theirs.meta.episodes, strict=True):
        assert {key: value for key, value in mine.items() if key not in ("success", "quality")} == their
    compare_stats(ours.meta.stats, theirs.meta.stats)


def compare_stats(mine, theirs):
    """Equal but for what lerobot estimates: quantiles by 5000 bins, images' moments by sums in float32."""
    assert set(mine) == set(theirs)
    for key in theirs:
        assert set(mine[key]) == set(theirs[key])
        width = np.asarray(theirs[key]["max"]) - np.asarray(theirs[key]["min"])
        for name, value in theirs[key].items():
            assert np.shape(mine[key][name]) == np.shape(value), (key, name)
            about = 1e-3 if name.startswith("q") or "images" in key else 1e-5
            tolerance = about * (width if name.startswith("q") else np.maximum(np.abs(value), width))
            difference = np.abs(np.asarray(mine[key][name]) - value)
            assert np.all(difference <= tolerance + 1e-6), (key, name, difference.max())


def test_statistics_of_each_episode(tmp_path, lerobot):
    """Against lerobot's own function, episode by episode; long enough that images are sampled."""
    import pyarrow.parquet as pq
    from lerobot.datasets.compute_stats import compute_episode_stats, get_feature_stats, sample_indices

    truths = joylo.write_folder(tmp_path / "raw", (130, 1), size=(48, 64), cameras=("head",))
    config = ConvertConfig((str(tmp_path / "raw"),), "me/set", root=str(tmp_path / "set"), cameras=("head",))
    root = convert(config).root
    rows = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    for row, truth in zip(rows, truths, strict=True):
        columns = {"observation.state": truth.state, "action": truth.actions}
        features = {key: {"dtype": "float32", "shape": (21,)} for key in columns}
        expected = compute_episode_stats(columns, features)
        images = truth.images["head"][sample_indices(len(truth.state))].transpose(0, 3, 1, 2)
        image_stats = get_feature_stats(images, axis=(0, 2, 3), keepdims=True)
        expected["observation.images.head"] = {
            name: value if name == "count" else np.squeeze(value / 255.0, axis=0) for name, value in image_stats.items()
        }
        mine = {
            key: {name: np.asarray(row[f"stats/{key}/{name}"]) for name in stats} for key, stats in expected.items()
        }
        compare_stats(mine, expected)
        exact = np.moveaxis(images / 255.0, 1, -1).reshape(-1, 3)
        for name in ("min", "max", "mean", "std"):
            value = getattr(exact, name)(axis=0)
            np.testing.assert_allclose(mine["observation.images.head"][name].ravel(), value, rtol=1e-9, atol=1e-12)


def test_chunks_of_actions(tmp_path, lerobot):
    truths = joylo.write_folder(tmp_path / "raw", (8, 6), cameras=())
    root = convert(ConvertConfig((str(tmp_path / "raw"),), "me/set", root=str(tmp_path / "set"), cameras=())).root
    dataset = lerobot(root, delta_timestamps={"action": [i / 10 for i in range(4)]})
    item = dataset[6]
    np.testing.assert_array_equal(item["action"].numpy(), truths[0].actions[[6, 7, 7, 7]])
    assert item["action_is_pad"].tolist() == [False, False, True, True]


def test_many_files(tmp_path, lerobot):
    """Limits of a few kilobytes: data, episodes and videos are spread over several files each."""
    rng = np.random.default_rng(0)
    features = {"observation.images.head": Feature("video", (48, 64, 3)), "action": Feature("float32", (21,))}
    actions, images = [], []
    with LeRobotWriter(
        tmp_path / "set", fps=10, robot_type="r1", features=features, data_mb=0.01, video_mb=0.02
    ) as out:
        for i in range(12):
            length = int(rng.integers(5, 30))
            actions.append(rng.normal(size=(length, 21)).astype(np.float32))
            images.append(joylo.moving_images(length, (48, 64), i))
            path = tmp_path / f"{i}.mp4"
            encode_video(path, iter([images[-1]]), 10)
            stats = ImageStats(length)
            stats.add(0, images[-1])
            segment = Segment(path, length, path.stat().st_size, stats.result())
            out.add_episode({"action": actions[-1]}, f"task {i % 3}", {"observation.images.head": segment})
    files = [len(list((tmp_path / "set" / kind).rglob("file-*"))) for kind in ("data", "videos")]
    assert min(files) >= 3, files
    assert os.path.getsize(tmp_path / "set/meta/tasks.parquet") > 0
    dataset = lerobot(tmp_path / "set")
    index = 0
    for i, (action, frames) in enumerate(zip(actions, images, strict=True)):
        for t in range(len(action)):
            item = dataset[index]
            np.testing.assert_array_equal(item["action"].numpy(), action[t])
            assert item["task"] == f"task {i % 3}"
            image = item["observation.images.head"].numpy().transpose(1, 2, 0) * 255
            assert np.abs(image - frames[t]).mean() < 6, (i, t)
            index += 1
