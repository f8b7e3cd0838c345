"""Each mistake is one line on stderr that names the file or flag, exit code 2, and nothing is touched on disk.

What can be wrong in a recording or a label file: test_recordings, test_labels.
"""

import json

import h5py
import numpy as np
import pytest

from hvd import cli
from hvd.data.labels import sidecar_path
from tests.data import joylo

SECOND = "demo_0001.hdf5"


def _hdf5(change):
    """Spoil the second recording's content."""

    def spoil(raw):
        with h5py.File(raw / SECOND, "r+") as file:
            change(file)

    return spoil


def _replaced(key, change):
    def spoil(file):
        values = file[key][...]
        del file[key]
        file[key] = change(values)

    return _hdf5(spoil)


def _sidecar(**changes):
    """Change keys of the second recording's sidecar; None takes one out."""

    def spoil(raw):
        path = sidecar_path(raw / SECOND)
        data = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

    return spoil


def _file(change):
    return lambda raw: change(raw / SECOND)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


# name: (what is spoiled, further arguments, what the line says)
BAD = {
    "no such folder": (lambda raw: None, ["--raw-dirs", "{raw}/gone"], "{raw}/gone: no such folder of recordings"),
    "empty folder": (lambda raw: (raw / "e").mkdir(), ["--raw-dirs", "{raw}/e"], "{raw}/e: no recordings here"),
    "truncated HDF5": (
        _file(_truncate),
        [],
        "{file}: not a readable HDF5 file (truncated or damaged?): truncated file",
    ),
    "missing camera": (
        _hdf5(lambda file: file.__delitem__("obs/rgb/left_wrist")),
        [],
        "{file}: camera 'left_wrist' is missing (key obs/rgb/left_wrist/img)",
    ),
    "unknown camera": (lambda raw: None, ["--cameras", "haed"], "demo_0000.hdf5: camera 'haed' is missing"),
    "lengths differ": (
        _replaced("action/torso", lambda x: x[:-1]),
        [],
        "{file}: action/torso has 8 frames but action/left_arm has 9",
    ),
    "another robot": (lambda raw: None, ["--robot", "r1_pro"], "action/left_arm has shape [12, 6], robot r1_pro needs"),
    "unknown robot": (lambda raw: None, ["--robot", "r2"], "unknown robot 'r2'; nearest: r1"),
    "a robot without JoyLo": (lambda raw: None, ["--robot", "g1"], "robot g1: no JoyLo recording has its"),
    "sizes differ": (
        _replaced("obs/rgb/head/img", lambda x: x[:, :16]),
        [],
        "{file}: image sizes ((16, 48), (32, 48), (32, 48)), but ((32, 48), (32, 48), (32, 48)) in {raw}/demo_0",
    ),
    "rates differ": (
        _hdf5(lambda file: file.attrs.__setitem__("recording_freq", 20.0)),
        [],
        "{file}: frames per second 20, but 10 in {raw}/demo_0000.hdf5",
    ),
    "rate is a fraction": (
        _hdf5(lambda file: file.attrs.__setitem__("recording_freq", 9.5)),
        [],
        "{file}: recording_freq is 9.5, a LeRobot dataset needs a whole number; pass --fps",
    ),
    "rate is no number": (
        _hdf5(lambda file: file.attrs.__setitem__("recording_freq", "fast")),
        [],
        "{file}: attribute recording_freq is fast; a positive number is needed",
    ),
    "environment state in one only": (
        _hdf5(lambda file: file.__setitem__("obs/sim/environment_state", np.zeros((9, 11)))),
        [],
        "{file}: environment dims 11, but 0 in",
    ),
    "missing sidecar": (
        lambda raw: sidecar_path(raw / SECOND).unlink(),
        [],
        "{sidecar}: label file is missing; write it, or pass --default-success",
    ),
    "unknown key in a sidecar": (_sidecar(sucess=True), [], "{sidecar}: unknown field 'sucess'; nearest: success"),
    "nothing left": (
        _file(_truncate),
        ["--raw-dirs", "{file}", "--skip-bad"],
        "no episode to convert in {file}: 1 bad, 0 without success",
    ),
    "too few prompts": (
        lambda raw: None,
        ["--raw-dirs", "{raw}", "{raw}", "--tasks", "a"],
        "--tasks: 1 prompts for 2 folders; give one per folder",
    ),
    "empty prompt": (lambda raw: None, ["--tasks", " "], "--tasks: a prompt is empty"),
    "unknown flag": (lambda raw: None, ["--sucess-only"], "nearest: --success_only"),
    "no number": (lambda raw: None, ["--num-episodes", "all"], "--num-episodes"),
    "negative number": (lambda raw: None, ["--num-episodes", "-1"], "--num-episodes -1 must not be negative"),
    "unknown codec": (lambda raw: None, ["--codec", "vp9"], "vp9"),
    "camera twice": (lambda raw: None, ["--cameras", "head", "head"], "--cameras head head: each camera once"),
    "target is a file": (
        lambda raw: None,
        ["--root", "{file}"],
        "{file}: is a file; choose another --root or --repo-id",
    ),
    "target is no dataset": (
        lambda raw: None,
        ["--root", "{raw}", "--overwrite"],
        "{raw}: is a folder but no dataset, and is not touched",
    ),
    "name that leads elsewhere": (
        lambda raw: None,
        ["--root", "", "--repo-id", "../x"],
        "--repo-id '../x': give a name",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, capsys, monkeypatch, case):
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "home"))
    spoil, extra, line = BAD[case]
    raw = tmp_path / "raw"
    joylo.write_folder(raw, (12, 9))
    spoil(raw)
    names = {"raw": raw, "file": raw / SECOND, "sidecar": sidecar_path(raw / SECOND)}
    before = joylo.tree(tmp_path)
    argv = ["--raw-dirs", str(raw), "--repo-id", "me/set", "--root", str(tmp_path / "set")]
    for flag in (arg for arg in extra if arg in argv):  # a later flag replaces the usual one
        at = argv.index(flag)
        del argv[at : at + 2]
    code = cli.main(["convert", *argv, *(arg.format(**names) for arg in extra)])
    said = capsys.readouterr()
    assert code == 2
    line_said = said.err.rpartition("\r")[2]  # after the bar of a slow machine
    assert line_said.startswith("error: ") and said.err.count("\n") == 1
    assert line.format(**names) in said.err
    assert said.out == ""
    assert joylo.tree(tmp_path) == before


def test_a_work_folder_that_is_not_ours_is_not_touched(tmp_path, capsys):
    joylo.write_folder(tmp_path / "raw", (5,))
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial/thesis.txt").write_text("mine")
    before = joylo.tree(tmp_path)
    argv = ["--raw-dirs", str(tmp_path / "raw"), "--repo-id", "me/set", "--root", str(tmp_path / "set"), "--overwrite"]
    assert cli.main(["convert", *argv]) == 2
    assert "set.partial: exists but is no work folder of hvd convert; move it away" in capsys.readouterr().err
    assert joylo.tree(tmp_path) == before


def test_a_dataset_of_another_make_is_not_replaced_by_itself(tmp_path, capsys):
    joylo.write_folder(tmp_path / "raw", (5,))
    (tmp_path / "set/meta").mkdir(parents=True)
    (tmp_path / "set/meta/info.json").write_text("{}")
    before = joylo.tree(tmp_path)
    argv = ["--raw-dirs", str(tmp_path / "raw"), "--repo-id", "me/set", "--root", str(tmp_path / "set")]
    assert cli.main(["convert", *argv]) == 2
    assert "set: a dataset that hvd convert did not make is there; pass --overwrite" in capsys.readouterr().err
    assert joylo.tree(tmp_path) == before
    assert cli.main(["convert", *argv, "--overwrite"]) == 0
