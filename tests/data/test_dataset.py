"""Datasets of both versions: values, frames, prompts, rewards, filters, and one line for each kind of damage."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvd.configs import DataConfig, KeyMap
from hvd.data import columns, digest, layout, packets
from hvd.data.dataset import Dataset, split_episodes
from hvd.data.labels import Labels, Subtask, episode_path, write_labels
from hvd.errors import UserError
from hvd.robots import get_robot
from tests.data.factory import CAMERAS, KEYS, TASKS, make_dataset, write_dataset

VERSIONS = ("v2.1", "v3.0")


def replace_keys(cfg: DataConfig, **changes) -> DataConfig:
    return dataclasses.replace(cfg, keys=dataclasses.replace(cfg.keys, **changes))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ("video", "image"))
def test_reads_every_value_and_frame(tmp_path, version, kind):
    recipe = make_dataset(tmp_path / "d", version=version, kind=kind)
    dataset = Dataset.open(recipe.config, cameras=CAMERAS, robot="r1", horizon=12)
    assert (dataset.version, dataset.fps, dataset.num_frames, dataset.name) == (version, 10.0, 28, "d")
    np.testing.assert_array_equal(dataset.state, recipe.state)
    np.testing.assert_array_equal(dataset.actions, recipe.actions)
    np.testing.assert_array_equal(dataset.rewards, recipe.rewards)
    np.testing.assert_array_equal(dataset.terminal, recipe.terminal)
    np.testing.assert_array_equal(dataset.episode_of, recipe.episode_of)
    assert [(e.index, e.start, e.length, e.task) for e in dataset.episodes] == [
        (0, 0, 12, TASKS[0]),
        (1, 12, 7, TASKS[1]),
        (2, 19, 9, TASKS[0]),
    ]
    assert dataset.task_of(0) == TASKS[0] and dataset.task_of(12) == TASKS[1]
    rows = np.random.default_rng(0).integers(0, 28, 40)
    for camera in CAMERAS:
        got = dataset.frames(camera, rows).astype(int)
        assert np.abs(got - recipe.frames(camera)[rows]).max() <= (0 if kind == "image" else 4)


def test_quality_of_v30(tmp_path):
    dataset = Dataset.open(make_dataset(tmp_path / "d").config, cameras=())
    assert [e.quality for e in dataset.episodes] == ["teleop", "expert", "teleop"]


@pytest.mark.parametrize("version", VERSIONS)
def test_filters_keep_row_numbers(tmp_path, version):
    recipe = make_dataset(tmp_path / "d", version=version, success=(False, True, True), cameras=())
    dataset = Dataset.open(dataclasses.replace(recipe.config, success_only=True), cameras=())
    assert [e.index for e in dataset.episodes] == [1, 2] and dataset.num_frames == 28
    np.testing.assert_array_equal(dataset.rows(), np.arange(12, 28))
    one = Dataset.open(dataclasses.replace(recipe.config, success_only=True, max_episodes=1), cameras=())
    np.testing.assert_array_equal(one.rows(), np.arange(12, 19))


def test_rows_end_at_the_first_terminal_frame(tmp_path):
    recipe = make_dataset(tmp_path / "d", cameras=(), terminal_at={0: 4})
    dataset = Dataset.open(recipe.config, cameras=())
    np.testing.assert_array_equal(dataset.rows(), [*range(5), *range(12, 28)])


@pytest.mark.parametrize("names", [("reward", "terminal"), ("next.reward", "next.done"), ("reward", "next.terminal")])
def test_usual_reward_columns_are_found(tmp_path, names):
    recipe = make_dataset(tmp_path / "d", columns=names, cameras=())
    dataset = Dataset.open(recipe.config, cameras=())
    np.testing.assert_array_equal(dataset.rewards, recipe.rewards)
    np.testing.assert_array_equal(dataset.terminal, recipe.terminal)


def test_column_keys_are_configurable(tmp_path):
    recipe = make_dataset(tmp_path / "d", columns=("score", "over"), cameras=(), state_dim=5)
    keys = {"rewards": "score", "terminal": "over", "state": ("observation.state[0:2]", "action[7, 9]")}
    dataset = Dataset.open(replace_keys(recipe.config, **keys), cameras=())
    np.testing.assert_array_equal(dataset.rewards, recipe.rewards)
    np.testing.assert_array_equal(dataset.terminal, recipe.terminal)
    np.testing.assert_array_equal(
        dataset.state, np.concatenate([recipe.state[:, :2], recipe.actions[:, [7, 9]]], axis=1)
    )


def test_success_at_end(tmp_path):
    recipe = make_dataset(tmp_path / "d", columns=None, cameras=(), success=(True, False, True))
    dataset = Dataset.open(dataclasses.replace(recipe.config, reward="success_at_end"), cameras=())
    expected = np.zeros(28)
    expected[[11, 27]] = 1
    np.testing.assert_array_equal(dataset.rewards, expected)
    np.testing.assert_array_equal(dataset.terminal, expected > 0)


def test_success_defaults_to_true(tmp_path):
    recipe = make_dataset(tmp_path / "d", columns=None, cameras=())
    dataset = Dataset.open(dataclasses.replace(recipe.config, reward="success_at_end"), cameras=())
    assert all(e.success for e in dataset.episodes) and dataset.rewards.sum() == 3


@pytest.mark.parametrize("folder", ("", "elsewhere"))
def test_labels_beside_the_dataset(tmp_path, folder):
    recipe = make_dataset(tmp_path / "d", columns=None, cameras=())
    labels = tmp_path / folder if folder else recipe.root / "labels"
    labels.mkdir()
    write_labels(episode_path(labels, 0), Labels("t", True, (Subtask("a", 0, 5, 2.0), Subtask("b", 5, 12, 1.0))))
    write_labels(episode_path(labels, 1), Labels("t", False, terminal=True))
    write_labels(episode_path(labels, 2), Labels("t", False))
    cfg = dataclasses.replace(recipe.config, reward="labels", labels_dir=str(labels) if folder else "")
    dataset = Dataset.open(cfg, cameras=())
    assert {int(r): float(dataset.rewards[r]) for r in np.flatnonzero(dataset.rewards)} == {4: 2.0, 11: 1.0}
    np.testing.assert_array_equal(np.flatnonzero(dataset.terminal), [11, 18])
    assert [e.success for e in dataset.episodes] == [True, False, False]

    write_labels(episode_path(labels, 2), Labels("t", True))  # changed labels are seen
    assert Dataset.open(cfg, cameras=()).episodes[2].success
    episode_path(labels, 1).unlink()
    with pytest.raises(UserError, match=r"episode_000001\.labels\.json: label file is missing"):
        Dataset.open(cfg, cameras=())


def test_second_opening_reads_no_data(tmp_path, monkeypatch):
    recipe = make_dataset(tmp_path / "d")
    first = Dataset.open(recipe.config, cameras=CAMERAS)

    def never(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(columns, "_build", never)
    monkeypatch.setattr(digest, "_sampled", never)
    monkeypatch.setattr(packets, "list_packets", never)
    second = Dataset.open(recipe.config, cameras=CAMERAS)
    assert second.digest == first.digest
    np.testing.assert_array_equal(second.frames(CAMERAS[0], np.arange(3)), first.frames(CAMERAS[0], np.arange(3)))
    assert not list((recipe.root / ".hvd_cache").glob(".*"))


def test_changed_contents_change_the_digest_and_drop_the_old_cache(tmp_path):
    recipe = make_dataset(tmp_path / "d", cameras=())
    before = Dataset.open(recipe.config, cameras=())
    recipe.actions[5] += 1
    cache = recipe.root / ".hvd_cache"
    kept = tmp_path / "kept"
    shutil.move(cache, kept)
    shutil.rmtree(recipe.root)
    write_dataset(recipe)
    shutil.move(kept, cache)
    after = Dataset.open(recipe.config, cameras=())
    assert after.digest != before.digest
    np.testing.assert_array_equal(after.actions, recipe.actions)
    assert sum(p.name.startswith("columns-") for p in cache.iterdir()) == 1


def test_digest_does_not_depend_on_the_place(tmp_path):
    recipe = make_dataset(tmp_path / "d")
    value = Dataset.open(recipe.config, cameras=()).digest
    shutil.copytree(recipe.root, tmp_path / "e", ignore=shutil.ignore_patterns(".hvd_cache"))
    moved = dataclasses.replace(recipe.config, root=str(tmp_path / "e"))
    assert Dataset.open(moved, cameras=()).digest == value


def test_read_only_dataset_uses_the_users_cache(tmp_path, monkeypatch):
    recipe = make_dataset(tmp_path / "d", cameras=())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and mode != os.W_OK)
    Dataset.open(recipe.config, cameras=())
    assert not (recipe.root / ".hvd_cache").exists() and list((tmp_path / "cache/hvd").iterdir())


def test_root_defaults_to_the_lerobot_home(tmp_path, monkeypatch):
    recipe = make_dataset(tmp_path / "home/me/data", cameras=())
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "home"))
    assert Dataset.open(DataConfig(repo_id="me/data", keys=recipe.config.keys), cameras=()).num_frames == 28


def test_cameras_the_config_does_not_name_are_absent(tmp_path):
    recipe = make_dataset(tmp_path / "d")
    dataset = Dataset.open(recipe.config, cameras=(*CAMERAS, "right_wrist_0_rgb"))
    assert dataset.cameras == CAMERAS
    with pytest.raises(UserError, match="camera 'right_wrist_0_rgb' was not opened"):
        dataset.frames("right_wrist_0_rgb", np.arange(2))


def test_split_is_by_episode_and_seeded(tmp_path):
    recipe = make_dataset(tmp_path / "d", lengths=[5] * 10, cameras=())
    dataset = Dataset.open(recipe.config, cameras=())
    train, val = split_episodes(dataset, 0.2, 0)
    assert len(val) == 10 and not set(train) & set(val) and len(train) + len(val) == 50
    assert len(set(dataset.episode_of[val].tolist())) == 2
    again = split_episodes(dataset, 0.2, 0)
    np.testing.assert_array_equal(again[1], val)
    assert any(not np.array_equal(split_episodes(dataset, 0.2, s)[1], val) for s in range(1, 5))
    assert len(split_episodes(dataset, 0.0, 0)[1]) == 0
    assert len(split_episodes(dataset, 0.01, 0)[1]) == 5 and len(split_episodes(dataset, 0.99, 0)[0]) == 5


def damage(recipe, what):
    """Change one thing on disk or in the config; returns the config."""
    root, cfg = recipe.root, recipe.config
    info = json.loads((root / "meta/info.json").read_text())
    data = sorted((root / "data").rglob("*.parquet"))[-1]
    match what:
        case "no folder":
            return dataclasses.replace(cfg, root=str(root / "nowhere"))
        case "version":
            (root / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v9.9"}))
        case "info":
            (root / "meta/info.json").write_text("{")
        case "no fps":
            info.pop("fps")
            (root / "meta/info.json").write_text(json.dumps(info))
        case "action key":
            return replace_keys(cfg, actions=("actoin",))
        case "state key":
            return replace_keys(cfg, state=("observation.states",))
        case "dims":
            return replace_keys(cfg, actions=("action[0:22]",))
        case "dims syntax":
            return replace_keys(cfg, actions=("action[1:2:3]",))
        case "reward key":
            return replace_keys(cfg, rewards="rewards")
        case "camera key":
            return replace_keys(cfg, images={CAMERAS[0]: "observation.images.haed"})
        case "no camera":
            return replace_keys(cfg, images={})
        case "parquet":
            data.write_bytes(data.read_bytes()[:-100])
        case "no parquet":
            data.unlink()
        case "rows":
            pq.write_table(pq.read_table(data).slice(1), data)
        case "nan":
            table = pq.read_table(data)
            actions = np.stack(table["action"].to_numpy())
            actions[3, 2] = np.nan
            column = {"action": list(actions.astype(np.float32))}
            table = table.set_column(table.column_names.index("action"), "action", [column["action"]])
            pq.write_table(table, data)
        case "empty cells" | "ragged" | "text":
            table = pq.read_table(data)
            values = np.stack(table["action"].to_numpy()).tolist()
            values[1] = {"empty cells": None, "ragged": values[1][:-1], "text": values[1]}[what]
            values = [str(v) for v in values] if what == "text" else values
            column = pa.array(values, None if what == "text" else pa.list_(pa.float32()))
            pq.write_table(table.set_column(table.column_names.index("action"), "action", column), data)
        case "one file lacks a column":
            pq.write_table(pq.read_table(data).drop_columns("next.reward"), data)
        case "order":
            table = pq.read_table(data)
            column = pa.array(np.full(len(table), 77))
            pq.write_table(table.set_column(table.column_names.index("episode_index"), "episode_index", column), data)
        case "task":
            table = pq.read_table(data)
            column = pa.array(np.full(len(table), 77))
            pq.write_table(table.set_column(table.column_names.index("task_index"), "task_index", column), data)
        case "video":
            path = sorted(root.glob("videos/**/*.mp4"))[0]
            path.write_bytes(path.read_bytes()[:-800])
        case "no video":
            sorted(root.glob("videos/**/*.mp4"))[0].unlink()
        case "not a video":
            sorted(root.glob("videos/**/*.mp4"))[0].write_text("hello")
        case "success":
            return dataclasses.replace(cfg, success_only=True)
    return cfg


DAMAGE = [
    ("no folder", r"nowhere/meta/info\.json: not found; set the data config's root"),
    ("version", r"info\.json: dataset version 'v9\.9' is unknown; hvd reads v2\.0, v2\.1 and v3\.0"),
    ("info", r"info\.json: not valid JSON"),
    ("no fps", r"info\.json: Object missing required field `fps`"),
    ("action key", r"column 'actoin' is not in the dataset; nearest: action"),
    ("state key", r"column 'observation\.states' is not in the dataset; nearest: observation\.state"),
    ("dims", r"column 'action\[0:22\]' asks for dim 21 of 21"),
    ("dims syntax", r"column 'action\[1:2:3\]': write the dims as"),
    ("reward key", r"no reward column 'rewards' in the dataset.* set the data config's reward to"),
    ("camera key", r"camera 'observation\.images\.haed' .* is not in the dataset; nearest: observation\.images\.head"),
    ("no camera", r"keys\.images names none of the model's cameras"),
    ("parquet", r"\.parquet: damaged or truncated parquet file"),
    ("no parquet", r"\.parquet: .*missing"),
    ("rows", r"\.parquet: has \d+ rows where the episodes' description says \d+"),
    ("nan", r"\.parquet: actions is NaN or infinite in episode 2, frame 3"),
    ("empty cells", r"\.parquet: column 'action' has 1 empty cells"),
    ("ragged", r"\.parquet: column 'action' has rows of different lengths"),
    ("text", r"\.parquet: column 'action' is not numeric"),
    ("one file lacks a column", r"\.parquet: column 'next\.reward' is missing"),
    ("order", r"\.parquet: its rows do not follow the order of the episodes in meta"),
    ("task", r"meta: task_index 77 of the data is not among the tasks"),
    ("video", r"\.mp4: damaged or truncated video file"),
    ("no video", r"\.mp4: .*missing"),
    ("not a video", r"\.mp4: damaged or truncated video file"),
    ("success", r"no successful episode, and success_only is set"),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("what", "message"), DAMAGE, ids=[d[0] for d in DAMAGE])
def test_damage_is_one_line_and_leaves_nothing(tmp_path, version, what, message):
    success = (False, False, False) if what == "success" else None
    recipe = make_dataset(tmp_path / "d", version=version, success=success)
    cfg = damage(recipe, what)
    before = sorted(recipe.root.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        Dataset.open(cfg, cameras=CAMERAS, robot="r1", horizon=10)
    assert "\n" not in str(caught.value)
    if what not in ("success", "task"):  # what was read rightly may be cached, whatever was asked of it
        assert sorted(recipe.root.rglob("*")) == before


def test_a_table_of_meta_with_too_many_rows_is_not_read(tmp_path, monkeypatch):
    recipe = make_dataset(tmp_path / "d", version="v3.0")
    monkeypatch.setattr(layout, "_META_ROWS", 1)
    with pytest.raises(UserError, match="has more than 1 rows, more than such a file can have"):
        Dataset.open(recipe.config, cameras=())


@pytest.mark.parametrize("key", (*KEYS.values(), "observation.state"))
def test_only_cameras_are_cameras(tmp_path, key):
    recipe = make_dataset(tmp_path / "d")
    cfg = replace_keys(recipe.config, images={CAMERAS[0]: key})
    if key in KEYS.values():
        assert Dataset.open(cfg, cameras=CAMERAS[:1]).cameras == CAMERAS[:1]
    else:
        with pytest.raises(UserError, match="is not in the dataset"):
            Dataset.open(cfg, cameras=CAMERAS[:1])


def test_robot_and_horizon_are_checked(tmp_path):
    recipe = make_dataset(tmp_path / "d", cameras=(), action_dim=23)
    with pytest.raises(UserError, match="actions have 23 dims, robot r1 has 21"):
        Dataset.open(recipe.config, cameras=(), robot="r1")
    Dataset.open(recipe.config, cameras=(), robot="r1_pro", horizon=12)
    with pytest.raises(UserError, match=r"action_horizon 13 is longer than every episode \(the longest"):
        Dataset.open(recipe.config, cameras=(), horizon=13)


def test_missing_reward_column_offers_the_other_ways(tmp_path):
    recipe = make_dataset(tmp_path / "d", columns=None, cameras=())
    with pytest.raises(UserError, match=r"no reward column 'next\.reward'.*success_at_end"):
        Dataset.open(recipe.config, cameras=())


def test_g1_recordings(g1_data, tmp_path):
    """The real humanoid's dataset (v2.1, AV1 640x480); its folder is left as it is."""
    for name in ("meta", "data", "videos"):
        (tmp_path / name).symlink_to(g1_data / name)
    keys = KeyMap(images={"base_0_rgb": "observation.images.cam_high"})
    cfg = DataConfig(repo_id="g1", root=str(tmp_path), keys=keys, reward="success_at_end")
    dataset = Dataset.open(cfg, cameras=("base_0_rgb",), robot="g1", horizon=20)
    info = json.loads((g1_data / "meta/info.json").read_text())
    assert dataset.num_frames == info["total_frames"] and len(dataset.episodes) == info["total_episodes"]
    assert dataset.rewards.sum() == dataset.terminal.sum() == len(dataset.episodes)
    height, width, _ = info["features"]["observation.images.cam_high"]["shape"]
    rows = np.asarray([dataset.num_frames - 1, 0, 1, dataset.episodes[1].start])
    frames = dataset.frames("base_0_rgb", rows)
    assert frames.shape == (4, height, width, 3)
    assert np.abs(frames[1].astype(int) - frames[2]).mean() < 5 < np.abs(frames[1].astype(int) - frames[0]).mean()


def test_reading_data_imports_no_jax_no_torch_and_no_pandas():
    modules = "dataset, loader, normalize, transforms, transitions, image_cache"
    code = (
        f"import sys; from hvd.data import {modules}; print({{'jax', 'torch', 'pandas', 'lerobot'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_actions_in_another_robots_order_are_refused(tmp_path):
    recipe = make_dataset(tmp_path / "d", cameras=(), action_dim=23)
    info = recipe.root / "meta" / "info.json"
    plain = info.read_text()

    def call(names):
        said = json.loads(plain)
        said["features"]["action"]["names"] = names
        info.write_text(json.dumps(said))

    call(list(get_robot("r1_pro_b1k").action_names))
    with pytest.raises(
        UserError, match="dim 0 'base_vx', robot r1_pro has 'left_arm_0' there: set robot to r1_pro_b1k"
    ):
        Dataset.open(recipe.config, cameras=(), robot="r1_pro")
    Dataset.open(recipe.config, cameras=(), robot="r1_pro_b1k")
    ordered = replace_keys(recipe.config, actions=("action[7:15]", "action[0:3]", "action[15:23]", "action[3:7]"))
    Dataset.open(ordered, cameras=(), robot="r1_pro")
    call({"motors": list(reversed(get_robot("r1_pro").action_names))})
    with pytest.raises(UserError, match=r"calls action dim 0 'torso_3', .* there: order the dims in .* keys\.actions"):
        Dataset.open(recipe.config, cameras=(), robot="r1_pro")
    call([f"motor_{i}" for i in range(23)])
    Dataset.open(recipe.config, cameras=(), robot="r1_pro")
