"""Videos: every frame comes back at its time, close to what went in, also after joining."""

import itertools
import os

import av
import numpy as np
import pytest

from hvd.data import video
from hvd.errors import UserError
from tests.data.joylo import moving_images, read_video


def blocks(images, size=5):
    return (images[i : i + size] for i in range(0, len(images), size))


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean(np.square(a.astype(np.float64) - b)))


@pytest.mark.parametrize(("codec", "least"), [("h264", 32), ("av1", 30)])
@pytest.mark.parametrize("size", [(96, 128), (64, 64)])
def test_frames_come_back(tmp_path, codec, least, size):
    images = moving_images(23, size, 1)
    counted = []
    assert video.encode_video(tmp_path / "a.mp4", blocks(images), 15, codec, on_frames=counted.append) == 23
    assert counted == [5, 5, 5, 5, 3]
    decoded = read_video(tmp_path / "a.mp4")
    assert decoded.shape == images.shape
    assert psnr(decoded, images) > least
    # a frame is nearest to itself, not to its neighbours
    errors = [[np.abs(decoded[i].astype(int) - images[j]).mean() for j in range(23)] for i in range(23)]
    np.testing.assert_array_equal(np.argmin(errors, axis=1), np.arange(23))


@pytest.mark.parametrize("size", [(33, 48), (32, 49), (31, 31)])
def test_odd_sizes(tmp_path, size):
    images = moving_images(6, size, 1)
    video.encode_video(tmp_path / "a.mp4", blocks(images), 10)
    assert read_video(tmp_path / "a.mp4").shape == images.shape
    assert psnr(read_video(tmp_path / "a.mp4"), images) > 30
    with pytest.raises(UserError, match="odd side, which av1 cannot hold"):
        video.encode_video(tmp_path / "b.mp4", blocks(images), 10, "av1")


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_joining_changes_no_frame(tmp_path, codec):
    """Lengths 1, 2 and 3 as well: short segments end inside a group of frames."""
    lengths, fps = (7, 1, 2, 12, 3), 30
    paths = []
    for i, length in enumerate(lengths):
        paths.append(tmp_path / f"{i}.mp4")
        video.encode_video(paths[-1], blocks(moving_images(length, (64, 64), i)), fps, codec)
    assert video.join_videos(paths, tmp_path / "all.mp4", fps) == sum(lengths)
    np.testing.assert_array_equal(read_video(tmp_path / "all.mp4"), np.concatenate([read_video(p) for p in paths]))
    with av.open(str(tmp_path / "all.mp4")) as container:
        stream = container.streams.video[0]
        tick = float(stream.time_base or 0)
        frames = [((f.pts or 0) * tick, f.key_frame) for f in container.decode(stream)]
        assert stream.average_rate == fps and (stream.duration or 0) * tick == pytest.approx(25 / fps)
    np.testing.assert_allclose([t for t, _ in frames], np.arange(25) / fps, atol=1e-6)
    key_frames = [k for _, k in frames]
    assert all(a or b for a, b in itertools.pairwise(key_frames))  # never two frames without one


def test_the_same_frames_give_the_same_bytes(tmp_path):
    images = moving_images(12, (64, 64), 3)
    for name, size in (("a", 5), ("b", 12)):
        video.encode_video(tmp_path / name, blocks(images, size), 10)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_that_was_not_written_whole_is_noticed(tmp_path, monkeypatch):
    images = moving_images(8, (64, 64), 0)
    monkeypatch.setattr(video, "_verify", lambda path, frames: None)
    video.encode_video(tmp_path / "a.mp4", blocks(images), 10)
    monkeypatch.undo()
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[:100])
    with pytest.raises(OSError, match="not written whole"):
        video._verify(tmp_path / "a.mp4", 8)


def test_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="--codec vp9: unknown; use one of h264, av1"):
        video.get_codec("vp9")
    with pytest.raises(ValueError, match="at least one frame"):
        video.encode_video(tmp_path / "a.mp4", iter(()), 10)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="needs os.sched_getscheduler, which Linux has")
@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_an_encoder_does_not_make_the_process_real_time(tmp_path, codec):
    """SVT-AV1 does, where root opens it: children inherited SCHED_FIFO, and no ordinary process ran beside them."""
    seen = []

    def look(_):
        seen.extend(os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task"))

    frames = np.zeros((3, 64, 64, 3), np.uint8)
    video.encode_video(tmp_path / "video.mp4", [frames], 10, codec, on_frames=look)
    assert set(seen) == {os.SCHED_OTHER} and os.sched_getscheduler(0) == os.SCHED_OTHER
