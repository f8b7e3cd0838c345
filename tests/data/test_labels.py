"""Sidecars: what is written comes back, rewards lie where docs/method.md has them, every mistake is one line."""

import json

import numpy as np
import pytest

from hvd.data.labels import Labels, Mistake, Subtask, Waiting, episode_path, load_labels, sidecar_path, write_labels
from hvd.errors import UserError

GOOD = {
    "task": "move the box",
    "success": True,
    "quality": "expert",
    "subtasks": [
        {"name": "reached", "start": 0, "end": 4, "reward": 1.0},
        {"name": "placed", "start": 4, "end": 9, "reward": 2},
    ],
}


def test_round_trip(tmp_path):
    labels = Labels(
        "move the box",
        False,
        (Subtask("reached", 0, 4), Subtask("lifted", 6, 9, 0.5)),
        "rollout",
        True,
        (Mistake("torso", 2, 5, "late"), Mistake("arms", 3, 9, "too high")),
        (Waiting("base", 4, 7),),
    )
    write_labels(tmp_path / "a.labels.json", labels)
    assert load_labels(tmp_path / "a.labels.json", 9) == labels
    assert [p.name for p in tmp_path.iterdir()] == ["a.labels.json"]


def test_defaults(tmp_path):
    (tmp_path / "a.labels.json").write_text('{"task": "x", "success": false}')
    labels = load_labels(tmp_path / "a.labels.json", 3)
    assert labels == Labels("x", False, (), "teleop", None, ())


def test_rewards_lie_at_the_last_frame_of_each_subtask():
    labels = Labels("x", True, (Subtask("a", 0, 4, 1.0), Subtask("b", 4, 9, 2.0)))
    np.testing.assert_array_equal(labels.rewards(12), [0, 0, 0, 1, 0, 0, 0, 0, 2, 0, 0, 0])
    assert labels.rewards(12).dtype == np.float32


def test_a_success_without_subtasks_is_rewarded_at_the_end():
    np.testing.assert_array_equal(Labels("x", True).rewards(3), [0, 0, 1])
    np.testing.assert_array_equal(Labels("x", False).rewards(3), [0, 0, 0])


@pytest.mark.parametrize(
    ("success", "terminal", "over"), [(True, None, True), (False, None, False), (False, True, True), (True, True, True)]
)
def test_terminal(success, terminal, over):
    assert Labels("x", success, terminal=terminal).is_terminal is over


def test_paths(tmp_path):
    assert sidecar_path(tmp_path / "demo_0001.hdf5") == tmp_path / "demo_0001.labels.json"
    assert sidecar_path(tmp_path / "merged.hdf5", 3) == tmp_path / "merged.demo_3.labels.json"
    assert episode_path(tmp_path, 12) == tmp_path / "episode_000012.labels.json"


def _changed(**changes):
    return {key: value for key, value in (GOOD | changes).items() if value is not ...}


def _subtask(**changes):
    return _changed(subtasks=[GOOD["subtasks"][0], GOOD["subtasks"][1] | changes])


BAD = {
    "unknown key": (_changed(sucess=True), "unknown field 'sucess'; nearest: success"),
    "unknown subtask key": (_subtask(rewards=1), "subtasks[1]: unknown field 'rewards'; nearest: reward"),
    "unknown mistake key": (
        _changed(mistakes=[{"level": "base", "start": 0, "end": 1, "kind": "x", "why": "y"}]),
        "mistakes[0]: unknown field 'why'",
    ),
    "missing task": (_changed(task=...), "field 'task' is missing"),
    "missing success": (_changed(success=...), "field 'success' is missing"),
    "missing end": (_changed(subtasks=[{"name": "a", "start": 0, "reward": 1}]), "subtasks[0]: field 'end' is missing"),
    "empty task": (_changed(task=" "), "task is empty"),
    "success as a number": (_changed(success=1), "success: 1 is not true or false"),
    "success as text": (_changed(success="yes"), "success: 'yes' is not true or false"),
    "terminal null": (_changed(terminal=None), "terminal: None is not true or false"),
    "start as a float": (_subtask(start=4.0), "subtasks[1]: start: 4.0 is not a whole number"),
    "start as a bool": (_subtask(start=True), "subtasks[1]: start: True is not a whole number"),
    "reward as text": (_subtask(reward="1"), "subtasks[1]: reward: '1' is not a number"),
    "reward without bound": (_subtask(reward=-1e308), "subtasks[1]: reward is -1e+308; give a number between"),
    "reward of 400 digits": (_subtask(reward=10**400), "subtasks[1]: reward: 1000"),
    "quality": (_changed(quality="good"), "quality: 'good' is not one of expert, teleop, rollout"),
    "subtasks no list": (_changed(subtasks={}), "subtasks: {} is not a list of Subtasks"),
    "subtask no object": (_changed(subtasks=[3]), "subtasks[0]: 3 is not a group of fields"),
    "not an object": ([1], "[1] is not a group of fields"),
    "overlap": (_subtask(start=3), "subtasks 'reached' (frames 0-4) and 'placed' (3-9) overlap"),
    "empty span": (_subtask(end=4), "subtasks[1]: start 4 and end 4 must satisfy 0 <= start < end"),
    "negative start": (_subtask(start=-1), "subtasks[1]: start -1"),
    "outside": (_subtask(end=11), "subtasks[1]: end 11 lies outside the episode of 10 frames"),
    "mistake outside": (
        _changed(mistakes=[{"level": "base", "start": 0, "end": 11, "kind": "x"}]),
        "mistakes[0]: end 11 lies outside the episode of 10 frames",
    ),
    "empty waiting": (
        _changed(waiting=[{"level": "base", "start": 3, "end": 3}]),
        "waiting[0]: start 3 and end 3 must satisfy",
    ),
    "contradiction": (_changed(terminal=False), "terminal is false but success is true"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sidecar(tmp_path, case):
    data, line = BAD[case]
    path = tmp_path / "demo.labels.json"
    path.write_text(json.dumps(data))
    with pytest.raises(UserError) as error:
        load_labels(path, 10)
    assert str(error.value).startswith(f"{path}: ") and line in str(error.value)
    assert "\n" not in str(error.value)


def test_sidecar_that_is_no_json(tmp_path):
    for text, why in (
        ('{"task": ', "truncated"),
        ('{"task": x}', "malformed"),
        ("[" * 200_000, "nested too deeply"),
        ('{"task": "x", "success": true, "subtasks": [{"reward": NaN}]}', "malformed"),
        ("[" + "1," * 9_000_000 + "1]", "more than 16777216 bytes"),
    ):
        (tmp_path / "demo.labels.json").write_text(text)
        with pytest.raises(UserError, match=rf"demo.labels.json.*{why}") as error:
            load_labels(tmp_path / "demo.labels.json")
        assert len(str(error.value)) < 1000


def test_missing_sidecar(tmp_path):
    with pytest.raises(UserError, match=r"demo.labels.json: label file is missing; .* --default-success"):
        load_labels(tmp_path / "demo.labels.json")


def test_the_writer_refuses_what_the_reader_would(tmp_path):
    overlap = Labels("x", True, (Subtask("a", 0, 4), Subtask("b", 3, 6)))
    with pytest.raises(UserError, match="overlap"):
        write_labels(tmp_path / "a.labels.json", overlap)
    assert not list(tmp_path.iterdir())
