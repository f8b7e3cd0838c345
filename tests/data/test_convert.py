"""hvd convert: what the dataset holds, which recordings are chosen, and what a second run does."""

import dataclasses
import io
import json
import os
import sys
import time
import types
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from hvd import cli
from hvd.configs import DataConfig, KeyMap
from hvd.data import convert_plan, convert_work
from hvd.data.convert import ConvertConfig, convert, parse
from hvd.data.convert_plan import _examine as examine
from hvd.data.convert_work import encode_segment
from hvd.data.dataset import Dataset
from hvd.data.labels import Labels, load_labels, sidecar_path, write_labels
from hvd.errors import UserError
from hvd.pools import Isolated
from hvd.robots import get_robot
from tests.data import joylo


@pytest.fixture
def raw(tmp_path):
    return tmp_path / "raw"


@pytest.fixture
def run(tmp_path, raw):
    """Convert `raw`, or the folders given, into tmp_path/set."""

    def start(*folders, **options):
        folders = tuple(map(str, folders or (raw,)))
        return convert(ConvertConfig(folders, "me/set", root=str(tmp_path / "set"), **options))

    return start


def columns(root):
    table = pq.read_table(root / "data/chunk-000/file-000.parquet")
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def episodes(root):
    table = pq.read_table(root / "meta/episodes/chunk-000/file-000.parquet")
    return table.select([name for name in table.column_names if not name.startswith("stats/")]).to_pylist()


def test_every_value(run, raw):
    lengths = (12, 9, 15)
    truths = joylo.write_folder(raw, lengths, failures=(1,), environment=True)
    write_labels(sidecar_path(raw / "demo_0002.hdf5"), Labels("other", False, quality="rollout", terminal=True))
    result = run()
    assert (result.num_episodes, result.num_frames, result.num_successes) == (3, 36, 1)
    got = columns(result.root)
    np.testing.assert_array_equal(got["observation.state"], np.concatenate([t.state for t in truths]))
    np.testing.assert_array_equal(got["action"], np.concatenate([t.actions for t in truths]))
    environment = np.concatenate([t.environment for t in truths])
    np.testing.assert_array_equal(got["observation.environment_state"], environment)
    # A success: a reward for both sub-tasks, terminal. A failure: truncated, or terminal where its label says so.
    assert np.flatnonzero(got["next.reward"]).tolist() == [5, 11, 12 + 3]
    assert np.flatnonzero(got["terminal"]).tolist() == [11, 35]
    assert np.flatnonzero(got["truncated"]).tolist() == [20]
    np.testing.assert_array_equal(got["index"], np.arange(36))
    np.testing.assert_array_equal(got["episode_index"], np.repeat([0, 1, 2], lengths))
    np.testing.assert_array_equal(got["frame_index"], np.concatenate([np.arange(n) for n in lengths]))
    np.testing.assert_array_equal(got["timestamp"].astype(np.float32), (got["frame_index"] / 10).astype(np.float32))
    np.testing.assert_array_equal(got["task_index"], np.repeat([0, 0, 1], lengths))
    rows = episodes(result.root)
    assert [row["success"] for row in rows] == [True, False, False]
    assert [row["quality"] for row in rows] == ["expert", "teleop", "rollout"]
    assert [row["tasks"] for row in rows] == [["stack the boxes"], ["stack the boxes"], ["other"]]
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [(0, 12), (12, 21), (21, 36)]
    for camera in truths[0].images:
        key = f"videos/observation.images.{camera}"
        assert [row[f"{key}/from_timestamp"] for row in rows] == [0.0, 1.2, 2.1]
        frames = joylo.read_video(result.root / f"{key}/chunk-000/file-000.mp4")
        truth = np.concatenate([t.images[camera] for t in truths])
        assert np.abs(frames.astype(int) - truth).mean() < 6
    for i in range(3):
        copied = result.root / f"labels/episode_{i:06d}.labels.json"
        assert copied.read_bytes() == sidecar_path(raw / f"demo_{i:04d}.hdf5").read_bytes()


def test_the_trainers_reader_gives_it_back(run, raw):
    truths = joylo.write_folder(raw, (12, 9), failures=(1,), environment=True)
    keys = KeyMap(state=("observation.state", "observation.environment_state"))
    root = run().root
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    dataset = Dataset.open(DataConfig(repo_id="me/set", root=str(root), keys=keys), cameras=cameras)
    both = [np.concatenate([truth.state, truth.environment], axis=1) for truth in truths]
    np.testing.assert_array_equal(dataset.state, np.concatenate(both))
    np.testing.assert_array_equal(dataset.actions, np.concatenate([truth.actions for truth in truths]))
    assert np.flatnonzero(dataset.rewards).tolist() == [5, 11, 12 + 3]
    assert np.flatnonzero(dataset.terminal).tolist() == [11]
    assert [(e.length, e.task, e.success, e.quality) for e in dataset.episodes] == [
        (12, "stack the boxes", True, "expert"),
        (9, "stack the boxes", False, "teleop"),
    ]
    for camera, ours in zip(cameras, ("head", "left_wrist", "right_wrist"), strict=True):
        path = root / f"videos/observation.images.{ours}/chunk-000/file-000.mp4"
        frames = joylo.read_video(path)
        np.testing.assert_array_equal(dataset.frames(camera, np.arange(21)), frames)


def test_info(run, raw):
    joylo.write_folder(raw)
    root = run().root
    info = json.loads((root / "meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["robot_type"]) == ("v3.0", 10, "r1")
    assert info["features"]["action"]["names"] == list(get_robot("r1").action_names)
    assert info["features"]["observation.images.head"]["shape"] == [32, 48, 3]
    assert info["features"]["observation.images.head"]["info"]["video.codec"] == "h264"
    assert "observation.environment_state" not in info["features"]
    assert not list(root.parent.glob("*.partial*"))


def test_raw_and_merged_with_a_prompt_each(run, raw):
    joylo.write_folder(raw / "a", (5, 6))
    joylo.write_merged(raw / "b/merged.hdf5", (7, 4), gripper_2d=True, base_velocity=False)
    result = run(raw / "a", raw / "b", tasks=("first", "second"))
    assert [row["tasks"] for row in episodes(result.root)] == [["first"]] * 2 + [["second"]] * 2
    tasks = pq.read_table(result.root / "meta/tasks.parquet").to_pydict()
    assert tasks == {"task_index": [0, 1], "task": ["first", "second"]}
    assert load_labels(result.root / "labels/episode_000003.labels.json", 4).task == "stack the boxes"


def test_a_single_file_as_source(run, raw):
    joylo.write_merged(raw / "merged.hdf5", (7, 4))
    assert run(raw / "merged.hdf5").num_episodes == 2


def test_episodes_per_folder(run, raw):
    joylo.write_folder(raw / "a", (4, 5, 6, 7), failures=(0, 2))
    joylo.write_folder(raw / "b", (8, 9, 10))
    result = run(raw / "a", raw / "b", num_episodes=2)
    assert [row["length"] for row in episodes(result.root)] == [4, 5, 8, 9]
    assert result.failures == 0


def test_success_only_takes_the_first_successes(run, raw):
    joylo.write_folder(raw / "a", (4, 5, 6, 7), failures=(0, 2))
    joylo.write_folder(raw / "b", (8, 9, 10))
    result = run(raw / "a", raw / "b", num_episodes=2, success_only=True)
    assert [row["length"] for row in episodes(result.root)] == [5, 7, 8, 9]
    assert (result.failures, result.num_successes) == (2, 4)
    assert "2 without success left out" in result.lines()[0]


def test_fewer_episodes_than_asked_for_are_said(run, raw, capsys):
    joylo.write_folder(raw, (4, 5))
    assert run(num_episodes=3).num_episodes == 2
    assert f"{raw}: 2 of the 3 episodes asked for" in "".join(capsys.readouterr())


def test_default_success(run, raw):
    joylo.write_recording(raw / "demo_0.hdf5", 6, success=None)
    joylo.write_recording(raw / "demo_1.hdf5", 5, success=False)
    result = run(default_success=True, tasks=("lift",))
    got = columns(result.root)
    assert np.flatnonzero(got["next.reward"]).tolist() == [5, 6 + 1]  # the sidecar that is there still counts
    assert np.flatnonzero(got["terminal"]).tolist() == [5]
    assert load_labels(result.root / "labels/episode_000000.labels.json", 6) == Labels("lift", True)


def test_default_success_needs_a_prompt(run, raw):
    joylo.write_recording(raw / "demo_0.hdf5", 6, success=None)
    with pytest.raises(UserError, match=r"demo_0.labels.json: label file is missing and with it the prompt"):
        run(default_success=True)


def test_cameras(run, raw):
    joylo.write_folder(raw, (5,))
    info = json.loads((run(cameras=("left_wrist",)).root / "meta/info.json").read_text())
    assert [key for key, feature in info["features"].items() if feature["dtype"] == "video"] == [
        "observation.images.left_wrist"
    ]


def test_no_cameras(run, raw):
    joylo.write_folder(raw, (5,), cameras=())
    root = run(cameras=()).root
    assert not (root / "videos").exists()
    assert json.loads((root / "meta/info.json").read_text())["video_path"] is None


def test_rate(run, raw):
    joylo.write_folder(raw, (5,), fps=20.0)
    assert json.loads((run().root / "meta/info.json").read_text())["fps"] == 20


def test_rate_of_files_that_do_not_say(run, raw):
    joylo.write_folder(raw, (5,), fps=None)
    assert json.loads((run().root / "meta/info.json").read_text())["fps"] == 10


def test_the_default_target(tmp_path, raw, monkeypatch):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "home"))
    joylo.write_folder(raw, (5,))
    assert convert(ConvertConfig((str(raw),), "me/set")).root == tmp_path / "home/me/set"


def test_processes_write_the_same_bytes(tmp_path, raw):
    joylo.write_folder(raw, (30, 21, 25, 1), compression="gzip")
    config = ConvertConfig((str(raw),), "me/set", root=str(tmp_path / "one"), workers=1)
    one = convert(config).root
    two = convert(dataclasses.replace(config, root=str(tmp_path / "two"), workers=2)).root
    assert joylo.tree(one) == joylo.tree(two)


def test_a_second_run_does_nothing(run, raw, tmp_path):
    joylo.write_folder(raw, (5, 6), failures=(1,))
    first = run(success_only=True)
    before = joylo.tree(tmp_path)
    second = run(success_only=True)
    assert second == dataclasses.replace(first, done_before=True)
    assert "complete already" in second.lines()[0]
    assert joylo.tree(tmp_path) == before
    for file in raw.iterdir():
        file.unlink()
    raw.rmdir()  # a dataset needs its recordings no more
    assert run(success_only=True).done_before


def test_another_request_is_an_error(run, raw, tmp_path):
    joylo.write_folder(raw, (5, 6))
    run()
    before = joylo.tree(tmp_path)
    with pytest.raises(UserError, match="set: was converted with num_episodes 0, not 1; pass --overwrite"):
        run(num_episodes=1)
    joylo.write_recording(raw / "demo_0002.hdf5", 7)
    with pytest.raises(UserError, match=f"the recordings or labels in {raw} have changed since; pass --overwrite"):
        run()
    after = joylo.tree(tmp_path)
    assert {key: value for key, value in after.items() if "demo_0002" not in key} == before


def test_changed_labels_are_noticed(run, raw):
    joylo.write_folder(raw, (5, 6))
    run()
    write_labels(sidecar_path(raw / "demo_0001.hdf5"), Labels("stack the boxes", False))
    with pytest.raises(UserError, match="have changed since"):
        run()
    result = run(overwrite=True)
    assert [row["success"] for row in episodes(result.root)] == [True, False]
    assert not list(result.root.parent.glob("*.partial*"))


def test_overwrite_that_fails_keeps_the_old_dataset(run, raw, tmp_path):
    joylo.write_folder(raw, (5, 6))
    run()
    before = joylo.tree(tmp_path / "set")
    (raw / "demo_0001.hdf5").write_bytes(b"no recording")
    with pytest.raises(UserError, match=r"demo_0001.hdf5: not a readable HDF5 file"):
        run(overwrite=True)
    assert joylo.tree(tmp_path / "set") == before


def test_skip_bad(run, raw):
    joylo.write_folder(raw, (5, 6, 7, 8))
    (raw / "demo_0001.hdf5").write_bytes(b"no recording")
    write_labels(sidecar_path(raw / "demo_0003.hdf5"), Labels("x", True, quality="teleop"))
    sidecar_path(raw / "demo_0002.hdf5").write_text("{}")
    result = run(skip_bad=True)
    assert [row["length"] for row in episodes(result.root)] == [5, 8]
    lines = result.lines()
    assert lines[0].endswith("; 2 bad recordings skipped:") and len(lines) == 3
    assert "demo_0001.hdf5: not a readable HDF5 file" in lines[1]
    assert "demo_0002.labels.json: field 'task' is missing" in lines[2]


def _dies(config, ref, prompt):
    if "0001" in str(ref):
        os.abort()
    return examine(config, ref, prompt)


def _fails(config, ref, prompt):
    if "0001" in str(ref):
        raise KeyError("object header")
    return examine(config, ref, prompt)


@pytest.mark.parametrize(("reader", "why"), [(_dies, "the process that read it died"), (_fails, "cannot be read")])
def test_a_recording_that_kills_or_fails_its_reader(run, raw, tmp_path, monkeypatch, reader, why):
    joylo.write_folder(raw, (5, 6, 7))
    monkeypatch.setattr(convert_plan, "_examine", reader)
    with pytest.raises(UserError, match=rf"demo_0001.hdf5: {why}"):
        run()
    assert not (tmp_path / "set").exists()
    assert [row["length"] for row in episodes(run(skip_bad=True).root)] == [5, 7]


def _dies_encoding(job, path, on_frames):
    if "0001" in str(job.ref) and job.camera == "head":
        os.abort()
    return encode_segment(job, path, on_frames)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_recording_that_kills_its_encoder(run, raw, monkeypatch, workers):
    joylo.write_folder(raw, (5, 6, 7))
    monkeypatch.setattr(convert_work, "_encode_in_worker", _worker_dies)
    monkeypatch.setattr(convert_work, "encode_segment", _dies_encoding)
    with pytest.raises(UserError, match=r"demo_0001.hdf5: camera head: the process that encoded it died"):
        run(workers=workers)
    result = run(workers=workers, skip_bad=True)
    assert [row["length"] for row in episodes(result.root)] == [5, 7] and len(result.skipped) == 1


def _worker_dies(job, path):
    return _dies_encoding(job, path, lambda n: None)


def test_a_call_that_hangs_is_killed():
    with Isolated() as isolated:
        assert isolated(abs, -1) == 1
        isolated.limit = 0.5
        with pytest.raises(BrokenProcessPool):
            isolated(time.sleep, 600)
        isolated.limit = 300
        assert isolated(abs, -1) == 1


def _hangs_encoding(job, path, on_frames):
    if "0001" in str(job.ref) and job.camera == "head":
        time.sleep(60)  # a worker that is not killed ends, and the recording is not skipped
    return encode_segment(job, path, on_frames)


def _worker_hangs(job, path):
    return _hangs_encoding(job, path, lambda n: None)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_recording_that_hangs_its_encoder(run, raw, monkeypatch, workers):
    joylo.write_folder(raw, (5, 6, 7))
    monkeypatch.setattr(convert_work, "_encode_in_worker", _worker_hangs)
    monkeypatch.setattr(convert_work, "encode_segment", _hangs_encoding)
    monkeypatch.setattr(convert_work, "HANG_S", 8.0)
    result = run(workers=workers, skip_bad=True)
    assert [row["length"] for row in episodes(result.root)] == [5, 7]
    assert "camera head: the process that encoded it died or hung" in result.skipped[0]


@pytest.mark.parametrize("workers", [1, 2])
def test_damage_that_only_decoding_finds(run, raw, tmp_path, workers):
    """Images are read only once, while encoding: then the recording is an error, or skipped, all the same."""
    import h5py

    joylo.write_folder(raw, (5, 6, 7), compression="gzip")
    with h5py.File(raw / "demo_0001.hdf5") as file:
        place = file["obs/rgb/left_wrist/img"].id.get_chunk_info(2)
    data = bytearray((raw / "demo_0001.hdf5").read_bytes())
    data[place.byte_offset : place.byte_offset + place.size] = b"\x07" * place.size
    (raw / "demo_0001.hdf5").write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"demo_0001.hdf5: cannot read obs/rgb/left_wrist/img at frame 0"):
        run(workers=workers)
    assert not (tmp_path / "set").exists()
    result = run(skip_bad=True, workers=workers)
    assert [row["length"] for row in episodes(result.root)] == [5, 7]
    assert len(result.skipped) == 1


def test_two_conversions_at_once(run, raw, tmp_path):
    from hvd.data.convert_work import WorkFolder

    joylo.write_folder(raw, (5,))
    with WorkFolder(tmp_path / "set.partial"):
        with pytest.raises(UserError, match="another hvd convert is writing this dataset"):
            run()
    assert run().num_episodes == 1


class FakeHub(types.ModuleType):
    """Notes what is uploaded."""

    def __init__(self, token="t", error=None):
        super().__init__("huggingface_hub")
        self.calls, self.token, self.error = [], token, error
        self.errors = types.SimpleNamespace(HfHubHTTPError=ConnectionError)
        self.HfApi = lambda: self

    def get_token(self):
        return self.token

    def create_repo(self, repo_id, **kw):
        if self.error:
            raise self.error
        self.calls.append(("create_repo", repo_id, kw))

    def upload_folder(self, *, folder_path, allow_patterns, ignore_patterns, **kw):
        """As huggingface_hub's filter_repo_objects has it."""
        files = [str(p.relative_to(folder_path)) for p in sorted(Path(folder_path).rglob("*")) if p.is_file()]
        allowed = [name for name in files if any(fnmatch(name, pattern) for pattern in allow_patterns)]
        sent = [name for name in allowed if not any(fnmatch(name, pattern) for pattern in ignore_patterns)]
        self.calls.append(("upload_folder", sent))

    def upload_file(self, *, path_or_fileobj, path_in_repo, **kw):
        assert isinstance(path_or_fileobj, io.BytesIO)
        self.calls.append(("upload_file", path_in_repo, path_or_fileobj.read()))

    def create_tag(self, repo_id, tag, **kw):
        self.calls.append(("create_tag", repo_id, tag))


def test_push_to_hub(run, raw, tmp_path, monkeypatch):
    hub = FakeHub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    joylo.write_folder(raw, (5,))
    run(push_to_hub=True)
    assert [call[0] for call in hub.calls] == ["create_repo", "upload_folder", "upload_file", "create_tag"]
    assert hub.calls[0][2]["private"] is True
    assert hub.calls[3][1:] == ("me/set", "v3.0")
    made = hub.calls[1][1]
    assert made and {name.split("/")[0] for name in made} == {"meta", "data", "videos", "labels"}
    Dataset.open(DataConfig(root=str(tmp_path / "set")), cameras=())  # leaves a cache in the folder
    (tmp_path / "set/meta/.notes").write_text("mine")
    (tmp_path / "set/secret.txt").write_text("mine")
    assert run(push_to_hub=True, public=True).done_before and len(hub.calls) == 8
    assert hub.calls[5][1] == made and hub.calls[4][2]["private"] is False


@pytest.mark.parametrize(
    ("hub", "repo_id", "line"),
    [
        (None, "me/set", "--push-to-hub needs the package huggingface_hub: install the `lerobot` extra"),
        (FakeHub(token=None), "me/set", "--push-to-hub: not logged in"),
        (FakeHub(), "set", "--push-to-hub: --repo-id 'set' must be user/name"),
    ],
)
def test_push_that_cannot_work_is_said_before_the_work(raw, tmp_path, monkeypatch, hub, repo_id, line):
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    joylo.write_folder(raw, (5,))
    with pytest.raises(UserError, match=line):
        convert(ConvertConfig((str(raw),), repo_id, root=str(tmp_path / "set"), push_to_hub=True))
    assert not (tmp_path / "set").exists()


def test_push_that_is_refused_keeps_the_dataset(run, raw, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub(error=ConnectionError("403 forbidden\nmore")))
    joylo.write_folder(raw, (5,))
    with pytest.raises(UserError, match=r"--push-to-hub: 403 forbidden; the dataset in .*set is complete, run again"):
        run(push_to_hub=True)
    assert (tmp_path / "set/meta/info.json").is_file()


def test_command_line(raw, tmp_path, capsys):
    joylo.write_folder(raw / "a", (5,))
    joylo.write_folder(raw / "b", (6,))
    argv = ["convert", "--raw-dirs", str(raw / "a"), str(raw / "b"), "--tasks", "p1", "p2", "--num-episodes", "1"]
    argv += ["--repo-id", "me/set", "--root", str(tmp_path / "set"), "--success-only", "--no-push-to-hub"]
    assert cli.main(argv) == 0
    line = f"{tmp_path / 'set'}: written: 2 episodes (2 successes), 11 frames\n"
    assert capsys.readouterr().out == line


def test_the_original_pipelines_spelling():
    argv = ["--raw_dirs", "a", "b", "--tasks", "p1", "p2", "--num_episodes", "3", "--repo_id", "x"]
    config = parse([*argv, "--no_push_to_hub", "--success_only"])
    assert config == ConvertConfig(("a", "b"), "x", ("p1", "p2"), 3, success_only=True)
