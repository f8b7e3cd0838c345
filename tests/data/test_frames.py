"""Random access into videos and stored images against plain decoding from the beginning."""

import errno
import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hvd.data.dataset import Dataset
from hvd.data.frames import VideoFrames
from hvd.data.image_cache import cached_frames
from hvd.data.packets import list_all, list_packets, load_table, save_table
from hvd.data.transforms import resize_with_pad
from hvd.errors import UserError
from tests.data.factory import CAMERAS, KEYS, make_dataset

ENCODERS = {
    "h264, every second frame a keyframe": ("libx264", {"g": "2", "crf": "20"}),
    "h264 with B frames": ("libx264", {"g": "12", "bf": "3", "crf": "20", "preset": "medium"}),
    "h264 with open groups": ("libx264", {"x264-params": "keyint=12:min-keyint=12:open-gop=1:bframes=3:scenecut=0"}),
    "mpeg4": ("mpeg4", {"g": "5"}),
    "av1": ("libsvtav1", {"g": "2", "crf": "30", "preset": "12", "svtav1-params": "lp=1"}),
}


def write_video(path, encoder, options, n, size=(48, 64), fps=30):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (*size, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, fps, options=options)
        stream.height, stream.width = size
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, fps)
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(np.roll(noise, (i, 2 * i), (0, 1)) // 2 + 3 * i, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def decode_all(path):
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def open_videos(folder, paths, counts, fps=30):
    """All frames of all files, one row each."""
    file_of = np.repeat(np.arange(len(paths)), counts)
    seconds = np.concatenate([np.arange(n) / fps for n in counts])
    save_table(folder, paths, list_all(paths), file_of, seconds)
    return VideoFrames(load_table(folder, paths))


@pytest.mark.parametrize("name", ENCODERS)
def test_any_order_gives_the_frames_of_plain_decoding(tmp_path, name):
    paths, counts = [tmp_path / "a.mp4", tmp_path / "b.mp4"], [30, 23]
    for path, n in zip(paths, counts, strict=True):
        write_video(path, *ENCODERS[name], n)
    expected = np.concatenate([decode_all(p) for p in paths])
    assert len(expected) == sum(counts)
    frames = open_videos(tmp_path / "table", paths, counts)
    rng = np.random.default_rng(1)
    for rows in (np.arange(53), np.arange(53)[::-1], rng.integers(0, 53, 70), np.asarray([52]), np.asarray([5, 5, 4])):
        np.testing.assert_array_equal(frames(rows), expected[rows])
    for start in range(0, 53, 7):  # a sequence in pieces goes on where it stood
        np.testing.assert_array_equal(frames(np.arange(start, min(53, start + 7))), expected[start : start + 7])


def test_threads_do_not_disturb_each_other(tmp_path):
    paths, counts = [tmp_path / f"{i}.mp4" for i in range(40)], [4] * 40  # more files than a thread keeps open
    for path, n in zip(paths, counts, strict=True):
        write_video(path, *ENCODERS["h264 with B frames"], n, size=(16, 16))
    expected = np.concatenate([decode_all(p) for p in paths])
    frames = open_videos(tmp_path / "table", paths, counts)
    rows = [np.random.default_rng(i).integers(0, 160, 12) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for asked, got in zip(rows, pool.map(frames, rows), strict=True):
            np.testing.assert_array_equal(got, expected[asked])


def test_a_file_damaged_later_is_named(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, *ENCODERS["h264 with B frames"], 30)
    frames = open_videos(tmp_path / "table", [path], [30])
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(UserError, match=r"a\.mp4: missing, damaged or truncated video file"):
        frames(np.arange(20, 30))
    path.unlink()
    with pytest.raises(UserError, match=r"a\.mp4: missing"):
        _in_new_thread(lambda: frames(np.arange(3)))  # this thread still holds the file open


def test_damage_within_a_frame_is_not_filled_up(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, *ENCODERS["h264 with B frames"], 30)
    place, size = list_packets(path).place[0], list_packets(path).size[0]
    data = bytearray(path.read_bytes())
    data[place + size // 2 : place + size // 2 + 40] = bytes(40)
    path.write_bytes(data)
    frames = open_videos(tmp_path / "table", [path], [30])
    with pytest.raises(UserError, match=r"a\.mp4: missing, damaged or truncated video file"):
        frames(np.arange(3))


def _in_new_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


@pytest.mark.parametrize("encoder", ["h264 with B frames", "av1"])
@pytest.mark.parametrize("where, says", [("packets", "holds pictures of 64 x 64, larger than"), ("frames", "damaged")])
def test_a_picture_larger_than_a_camera_s_takes_no_memory(tmp_path, monkeypatch, encoder, where, says):
    """Refused by what the file says of it, and by the decoder where the file says something else."""
    path = tmp_path / "a.mp4"
    write_video(path, *ENCODERS[encoder], 5, size=(64, 64))
    monkeypatch.setattr(f"hvd.data.{where}.MOST_PIXELS", 64 * 64 - 1)
    monkeypatch.setattr("hvd.data.frames._local", threading.local())
    with pytest.raises(UserError, match=says):
        open_videos(tmp_path / "table", [path], [5])(np.arange(5))


def test_a_video_that_is_too_short_is_named(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, *ENCODERS["mpeg4"], 10)
    with pytest.raises(UserError, match=r"a\.mp4: no frame at 0\.367 s"):
        save_table(tmp_path / "t", [path], [list_packets(path)], np.zeros(12, int), np.arange(12) / 30)
    recipe = make_dataset(tmp_path / "d", version="v2.1", cameras=CAMERAS[:1])
    write_video(next(recipe.root.glob("videos/**/episode_000001.mp4")), *ENCODERS["mpeg4"], 5, fps=10)
    with pytest.raises(UserError, match=r"episode_000001\.mp4: is shorter than its rows \(the video ends at 0\.40 s"):
        Dataset.open(recipe.config, cameras=CAMERAS[:1])


def test_a_video_of_another_frame_rate_is_named(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, *ENCODERS["mpeg4"], 6, fps=8)
    line = r"a\.mp4: has one frame for the rows at 0\.200 s and 0\.300 s"
    for episodes in (1, 2):  # several may show the same part of a file
        times = np.tile(np.arange(6) / 10, episodes)
        with pytest.raises(UserError, match=line):
            save_table(tmp_path / "t", [path], [list_packets(path)], np.zeros(len(times), int), times)
    times = np.tile(np.arange(6) / 8, 2)
    save_table(tmp_path / "t", [path], [list_packets(path)], np.zeros(12, int), times)


def test_a_video_of_an_unknown_codec_is_named(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, *ENCODERS["h264 with B frames"], 10)
    data = path.read_bytes()
    assert b"avc1" in data  # in the description of its track
    path.write_bytes(data.replace(b"avc1", b"zzzz"))
    with pytest.raises(UserError, match=r"a\.mp4: damaged video file, or one of a codec that this PyAV does not know"):
        list_packets(path)


def test_a_video_that_is_longer_than_its_rows_is_said_once(tmp_path, capsys):
    recipe = make_dataset(tmp_path / "d", version="v2.1", cameras=CAMERAS[:1])
    Dataset.open(recipe.config, cameras=CAMERAS[:1])
    assert "longer" not in capsys.readouterr().out
    longer = make_dataset(tmp_path / "e", version="v2.1", cameras=CAMERAS[:1])
    write_video(next(longer.root.glob("videos/**/episode_000001.mp4")), *ENCODERS["mpeg4"], 30, fps=10)
    for _ in range(2):
        Dataset.open(longer.config, cameras=CAMERAS[:1])
    said = capsys.readouterr().out
    assert (
        said.count("warning:") == 1 and "episode_000001.mp4: is longer than its rows (the video ends at 2.90 s" in said
    )


def test_other_image_kinds(tmp_path):
    """JPEG, grey PNG, and images that lie beside the data file."""
    recipe = make_dataset(tmp_path / "d", lengths=(4,), kind="image", cameras=CAMERAS[:1])
    data = recipe.root / "data/chunk-000/file-000.parquet"
    smooth = np.repeat(np.linspace(0, 255, 48, dtype=np.uint8)[None], 32, 0)
    rgb = np.stack([smooth, smooth // 2, 255 - smooth], -1)
    jpeg, grey = io.BytesIO(), io.BytesIO()
    Image.fromarray(rgb).save(jpeg, "JPEG", quality=95)
    Image.fromarray(smooth).save(grey, "PNG")
    Image.fromarray(rgb).save(recipe.root / "beside.png")
    damaged = grey.getvalue()[:-40]  # its head is whole
    cells = [{"bytes": jpeg.getvalue()}, {"bytes": grey.getvalue()}, {"path": "beside.png"}, {"bytes": damaged}]
    cells = [{"bytes": None, "path": None} | c for c in cells]
    table = pq.read_table(data).drop_columns(KEYS[CAMERAS[0]])
    column = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(table.append_column(KEYS[CAMERAS[0]], column), data)
    dataset = Dataset.open(recipe.config, cameras=CAMERAS[:1])
    got = dataset.frames(CAMERAS[0], np.arange(3)).astype(int)
    assert np.abs(got[0] - rgb).max() < 12
    np.testing.assert_array_equal(got[1], np.repeat(smooth[..., None], 3, -1))
    np.testing.assert_array_equal(got[2], rgb)
    with pytest.raises(UserError, match="the image of row 3 is damaged"):
        dataset.frames(CAMERAS[0], np.asarray([3]))


def test_image_cache(tmp_path, monkeypatch):
    recipe = make_dataset(tmp_path / "d")
    dataset = Dataset.open(recipe.config, cameras=CAMERAS)
    frames = cached_frames(dataset, CAMERAS[0], 28)
    rows = np.asarray([3, 27, 12, 3])
    np.testing.assert_array_equal(frames(rows), resize_with_pad(dataset.frames(CAMERAS[0], rows), 28, 28))

    def never(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr("hvd.data.image_cache._build", never)
    again = Dataset.open(recipe.config, cameras=CAMERAS)
    np.testing.assert_array_equal(cached_frames(again, CAMERAS[0], 28)(rows), frames(rows))


def test_image_cache_on_a_full_disk(tmp_path, monkeypatch):
    recipe = make_dataset(tmp_path / "d")
    dataset = Dataset.open(recipe.config, cameras=CAMERAS)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"no space left on the disk of .*\.hvd_cache"):
        cached_frames(dataset, CAMERAS[0], 28)


def test_failed_image_cache_leaves_nothing(tmp_path, monkeypatch):
    recipe = make_dataset(tmp_path / "d")
    dataset = Dataset.open(recipe.config, cameras=CAMERAS)
    before = sorted((recipe.root / ".hvd_cache").iterdir())
    monkeypatch.setattr(VideoFrames, "__call__", lambda *_: (_ for _ in ()).throw(UserError("damaged")))
    with pytest.raises(UserError, match="damaged"):
        cached_frames(dataset, CAMERAS[0], 28)
    assert sorted((recipe.root / ".hvd_cache").iterdir()) == before
    assert not [t for t in threading.enumerate() if "ThreadPool" in t.name]
