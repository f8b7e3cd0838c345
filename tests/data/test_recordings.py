"""JoyLo recordings: values in the robot's order whatever the variant of the file, lazily, and clear errors."""

import h5py
import numpy as np
import pytest

from hvd.data.recordings import CAMERAS, RecordingRef, episodes_of, open_recording, recording_files
from hvd.data.recordings import joylo as joylo_format
from hvd.errors import UserError
from hvd.robots import get_robot
from tests.data import joylo

R1 = get_robot("r1")


def read(ref, robot=R1, **kw):
    with open_recording(ref, robot, **kw) as recording:
        frames = {camera: np.concatenate(list(recording.frames(camera))) for camera in CAMERAS}
        return recording.state(), recording.actions(), frames, recording.environment_state()


def check(ref, truth, robot=R1):
    state, actions, frames, environment = read(ref, robot)
    np.testing.assert_array_equal(state, truth.state)
    np.testing.assert_array_equal(actions, truth.actions)
    for camera in CAMERAS:
        np.testing.assert_array_equal(frames[camera], truth.images[camera])
    assert (environment is None) == (truth.environment is None)
    if environment is not None:
        np.testing.assert_array_equal(environment, truth.environment)


@pytest.mark.parametrize("gripper_2d", [False, True])
@pytest.mark.parametrize("base_velocity", [False, True])
def test_raw_file(tmp_path, gripper_2d, base_velocity):
    path = tmp_path / "demo.hdf5"
    truth = joylo.write_recording(path, 11, gripper_2d=gripper_2d, base_velocity=base_velocity, environment=True)
    check(RecordingRef(path, "joylo"), truth)


def test_merged_file(tmp_path):
    path = tmp_path / "merged.hdf5"
    truths = joylo.write_merged(path, (5, 7, 4, 3, 3, 3, 3, 3, 3, 3, 6))
    refs = episodes_of(path)
    assert [ref.demo for ref in refs] == list(range(11))  # by number: demo_2 before demo_10
    for ref, truth in zip(refs, truths, strict=True):
        check(ref, truth)
    assert str(refs[2]).endswith("merged.hdf5:demo_2")


def test_r1_pro_has_seven_joints(tmp_path):
    path = tmp_path / "demo.hdf5"
    robot = get_robot("r1_pro")
    truth = joylo.write_recording(path, 6, robot="r1_pro")
    assert truth.actions.shape == (6, 23)
    check(RecordingRef(path, "joylo"), truth, robot)


def test_odometry_of_a_turned_tracker(tmp_path):
    path = tmp_path / "demo.hdf5"
    truth = joylo.write_recording(path, 6, base_velocity=False)
    state = read(RecordingRef(path, "joylo"), odom_yaw=np.pi / 2)[0]
    np.testing.assert_allclose(state[:, 7], -truth.state[:, 8], atol=1e-6)
    np.testing.assert_allclose(state[:, 8], truth.state[:, 7], atol=1e-6)
    np.testing.assert_array_equal(state[:, 9], truth.state[:, 9])


def test_files_in_natural_order(tmp_path):
    for name in ("demo_10.hdf5", "demo_2.hdf5", "demo_1.h5", ".demo_3.hdf5", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in recording_files(tmp_path)] == ["demo_1.h5", "demo_2.hdf5", "demo_10.hdf5"]
    assert recording_files(tmp_path / "demo_2.hdf5") == [tmp_path / "demo_2.hdf5"]


@pytest.mark.parametrize("chunks", [None, 1, 5])
def test_images_are_read_in_blocks(tmp_path, monkeypatch, chunks):
    """No read takes more than a block, and a block is whole chunks: an episode is never in memory."""
    frame = 32 * 48 * 3
    monkeypatch.setattr(joylo_format, "BLOCK_BYTES", 7 * frame)
    path = tmp_path / "demo.hdf5"
    joylo.write_recording(path, 23)
    with h5py.File(path, "r+") as file:
        images = np.asarray(file["obs/rgb/head/img"])
        del file["obs/rgb/head/img"]
        file.create_dataset("obs/rgb/head/img", data=images, chunks=(chunks, 32, 48, 3) if chunks else None)
    with open_recording(RecordingRef(path, "joylo"), R1) as recording:
        blocks = list(recording.frames("head"))
    assert {len(block) for block in blocks[:-1]} == {5 if chunks == 5 else 7}
    np.testing.assert_array_equal(np.concatenate(blocks), images)


def _replace(key, change):
    """Put change(values) in the place of `key`."""

    def apply(file):
        values = file[key][...]
        del file[key]
        file[key] = change(values)

    return apply


def _without(key):
    def apply(file):
        del file[key]

    return apply


def _group(key):
    def apply(file):
        del file[key]
        file.create_group(key)

    return apply


def _set(array, index, value):
    array[index] = value
    return array


BAD = {
    "no camera": (_without("obs/rgb/left_wrist"), "camera 'left_wrist' is missing (key obs/rgb/left"),
    "images shorter": (_replace("obs/rgb/head/img", lambda x: x[:-1]), "obs/rgb/head/img has 11 frames but action/lef"),
    "images as floats": (
        _replace("obs/rgb/head/img", lambda x: x / 255.0),
        "obs/rgb/head/img is float64 [12, 32, 48, 3]; uint8 [T, H, W, 3] is needed",
    ),
    "images without colour": (
        _replace("obs/rgb/head/img", lambda x: x[..., 0]),
        "obs/rgb/head/img is uint8 [12, 32, 48]",
    ),
    "state shorter": (
        _replace("obs/joint_state/torso/joint_position", lambda x: x[:-2]),
        "obs/joint_state/torso/joint_position has 10 frames but action/left_arm has 12",
    ),
    "action longer": (
        _replace("action/right_arm", lambda x: np.concatenate([x, x])),
        "action/right_arm has 24 frames but action/left_arm has 12",
    ),
    "NaN action": (
        _replace("action/torso", lambda x: _set(x, (7, 1), np.nan)),
        "action/torso has a NaN or infinite val",
    ),
    "infinite action": (
        _replace("action/left_gripper", lambda x: _set(x, 3, np.inf)),
        "action/left_gripper has a NaN or infinite value at frame 3",
    ),
    "action too large for float32": (
        _replace("action/torso", lambda x: _set(x, (0, 0), 1e300)),
        "action/torso has a NaN or infinite value at frame 0",
    ),
    "NaN state": (
        _replace("obs/gripper_state/left_gripper/gripper_position", lambda x: _set(x, 5, np.nan)),
        "obs/gripper_state/left_gripper/gripper_position has a NaN or infinite value at frame 5",
    ),
    "wrong action width": (
        _replace("action/left_arm", lambda x: np.concatenate([x, x[:, :1]], axis=1)),
        "action/left_arm has shape [12, 7], robot r1 needs [12, 6]; is --robot right?",
    ),
    "wrong base width": (_replace("action/mobile_base", lambda x: x[:, :2]), "action/mobile_base has shape [12, 2]"),
    "too few joints": (
        _replace("obs/joint_state/left_arm/joint_position", lambda x: x[:, :5]),
        "obs/joint_state/left_arm/joint_position has shape [12, 5]",
    ),
    "missing action": (_without("action/torso"), "key action/torso is missing"),
    "missing odometry": (_without("obs/odom"), "key obs/odom/linear_velocity is missing"),
    "missing gripper": (
        _without("obs/gripper_state/right_gripper"),
        "key obs/gripper_state/right_gripper/gripper_position is missing",
    ),
    "text": (_replace("action/torso", lambda x: np.array([b"a"] * len(x))), "action/torso is of type"),
    "no frames": (_replace("action/left_arm", lambda x: x[:0]), "action/left_arm has no frames"),
    "a group where an array should be": (_group("action/torso"), "action/torso is not an array"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recording(tmp_path, case):
    spoil, line = BAD[case]
    path = tmp_path / "demo.hdf5"
    joylo.write_recording(path)
    with h5py.File(path, "r+") as file:
        spoil(file)
    with pytest.raises(UserError) as error:
        read(RecordingRef(path, "joylo"))
    assert str(error.value).startswith(f"{path}: ") and line in str(error.value)
    assert "\n" not in str(error.value)


def _swap(key, make):
    """Remove an array, and let make(file, key, what it held) put something else there."""

    def spoil(file):
        held = file[key][...]
        del file[key]
        make(file, key, held)

    return spoil


def _external(file, key, held):
    path = file.filename + ".raw"
    with open(path, "wb") as other:
        other.write(held.tobytes())
    file.create_dataset(key, held.shape, held.dtype, external=[(path, 0, held.nbytes)])


def _other_file(file, held):
    path = file.filename + ".other"
    with h5py.File(path, "w") as other:
        other["x"] = held
    return path


def _external_link(file, key, held):
    file[key] = h5py.ExternalLink(_other_file(file, held), "/x")


def _through_a_soft_link(file, key, held):
    file["elsewhere"] = h5py.ExternalLink(_other_file(file, held), "/")
    file[key] = h5py.SoftLink("/elsewhere/x")


def _virtual(file, key, held):
    layout = h5py.VirtualLayout(held.shape, held.dtype)
    layout[...] = h5py.VirtualSource(_other_file(file, held), "x", held.shape)
    file.create_virtual_dataset(key, layout)


def _of_itself(file, key, held):
    layout = h5py.VirtualLayout(held.shape, held.dtype)
    layout[...] = h5py.VirtualSource(".", key, held.shape)
    file.create_virtual_dataset(key, layout)


def _half_written(file, key, held):
    data = file.create_dataset(key, held.shape, held.dtype, chunks=(1, *held.shape[1:]))
    data[: len(held) // 2] = held[: len(held) // 2]


def _never_written(file, key, held):
    file.create_dataset(key, held.shape, held.dtype)


ELSEWHERE = {
    "external storage": (_external, "is in external storage"),
    "external link": (_external_link, "is a link out of the file"),
    "soft link to an external one": (_through_a_soft_link, "is a link out of the file"),
    "virtual": (_virtual, "is a virtual dataset"),
    "virtual, of itself": (_of_itself, "is a virtual dataset"),
    "half written": (_half_written, "was declared but not all of it was written"),
    "never written": (_never_written, "was declared but not all of it was written"),
}


@pytest.mark.parametrize("key", ["action/left_arm", "obs/odom/base_velocity", "obs/rgb/head/img"])
@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_is_not_in_the_file_is_refused(tmp_path, case, key):
    make, line = ELSEWHERE[case]
    path = tmp_path / "demo.hdf5"
    joylo.write_recording(path)
    with h5py.File(path, "r+") as file:
        _swap(key, make)(file)
    with pytest.raises(UserError, match=line) as error:
        read(RecordingRef(path, "joylo"))
    assert str(error.value).startswith(f"{path}: {key}")


def test_links_inside_the_file_are_followed(tmp_path):
    path = tmp_path / "demo.hdf5"
    truth = joylo.write_recording(path)
    with h5py.File(path, "r+") as file:
        file.move("obs/rgb", "pictures")
        file["obs/rgb"] = h5py.SoftLink("/pictures")
        file.move("action/torso", "action/body")
        file["action/torso"] = h5py.SoftLink("body")
    check(RecordingRef(path, "joylo"), truth)
    with h5py.File(path, "r+") as file:
        del file["action/torso"]
        file["action/torso"] = h5py.SoftLink("torso")
    with pytest.raises(UserError, match="action/torso"):
        read(RecordingRef(path, "joylo"))


def _declared(shape, dtype="f4", chunks=None):
    def make(file, key, held):
        file.create_dataset(key, shape, dtype, chunks=chunks)

    return make


@pytest.mark.parametrize(
    ("key", "shape", "line"),
    [
        ("action/left_arm", (10**9, 6), "has 1000000000 frames; 1 to"),
        ("obs/joint_state/left_arm/joint_position", (12, 2**27), "at most"),
        ("obs/rgb/head/img", (12, 30_000, 30_000, 3), "at most 33554432 pixels"),
        ("obs/rgb/head/img", (12, 0, 4, 3), "at most 33554432 pixels"),
    ],
)
def test_sizes_are_bounded_before_memory_is_taken(tmp_path, monkeypatch, key, shape, line):
    path = tmp_path / "demo.hdf5"
    joylo.write_recording(path)
    monkeypatch.setattr(joylo_format, "_is_written", lambda data: True)
    with h5py.File(path, "r+") as file:
        chunks = tuple(min(n, 64) for n in shape) if all(shape) else None
        _swap(key, _declared(shape, "u1" if "img" in key else "f4", chunks))(file)
    with pytest.raises(UserError, match=line):
        read(RecordingRef(path, "joylo"))


@pytest.mark.parametrize("rate", [0, -10, 1e9, np.nan, np.inf, "10", [10, 10]])
def test_rates_out_of_bounds(tmp_path, rate):
    path = tmp_path / "demo.hdf5"
    joylo.write_recording(path)
    with h5py.File(path, "r+") as file:
        file.attrs["recording_freq"] = rate
    with pytest.raises(UserError, match=r"attribute recording_freq is .*; a positive number is needed, 1000 at most"):
        read(RecordingRef(path, "joylo"))


def test_a_missing_camera_names_those_that_are_there(tmp_path):
    joylo.write_recording(tmp_path / "demo.hdf5")
    with open_recording(RecordingRef(tmp_path / "demo.hdf5", "joylo"), R1) as recording:
        with pytest.raises(UserError, match=r"camera 'heed' is missing \(key obs/rgb/heed/img\); nearest: head"):
            recording.image_size("heed")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_file(tmp_path, share):
    path = tmp_path / "demo.hdf5"
    joylo.write_recording(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"demo.hdf5: not a readable HDF5 file \(truncated or damaged\?\): "):
        episodes_of(path)


def test_damaged_images_are_named_with_their_frame(tmp_path, monkeypatch):
    path = tmp_path / "demo.hdf5"
    joylo.write_recording(path, compression="gzip")
    with h5py.File(path) as file:
        place = file["obs/rgb/head/img"].id.get_chunk_info(6)
    data = bytearray(path.read_bytes())
    data[place.byte_offset : place.byte_offset + place.size] = b"\x07" * place.size
    path.write_bytes(bytes(data))
    monkeypatch.setattr(joylo_format, "BLOCK_BYTES", 4 * 32 * 48 * 3)
    with open_recording(RecordingRef(path, "joylo"), R1) as recording:
        recording.image_size("head")  # only a look at every pixel can tell
        with pytest.raises(UserError, match=r"demo.hdf5: cannot read obs/rgb/head/img at frame 4: "):
            list(recording.frames("head"))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"gone.hdf5: recording is missing"):
        episodes_of(tmp_path / "gone.hdf5")
    with pytest.raises(UserError, match="no such folder of recordings"):
        recording_files(tmp_path / "gone")
    with pytest.raises(UserError, match="no recordings here"):
        recording_files(tmp_path)


def test_file_of_something_else(tmp_path):
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(UserError, match="neither action and obs nor demo_<i> groups"):
        episodes_of(tmp_path / "x.hdf5")


def test_no_joylo_recording_of_a_humanoid(tmp_path):
    joylo.write_recording(tmp_path / "demo.hdf5")
    with pytest.raises(UserError, match="robot g1: no JoyLo recording has its 'left_shoulder_pitch'"):
        open_recording(RecordingRef(tmp_path / "demo.hdf5", "joylo"), get_robot("g1"))


def test_a_chunk_that_is_too_short_is_not_filled_from_memory(tmp_path):
    path = tmp_path / "demo.hdf5"
    joylo.write_recording(path, 6)
    with h5py.File(path, "r+") as file:
        width = file["action/torso"].shape[1]
        del file["action/torso"]
        data = file.create_dataset("action/torso", (6, width), "f8", chunks=(6, width))
        data.id.write_direct_chunk((0, 0), bytes(16))
    (ref,) = episodes_of(path)
    with pytest.raises(UserError, match="was declared but not all of it was written"):
        open_recording(ref, get_robot("r1")).actions()
