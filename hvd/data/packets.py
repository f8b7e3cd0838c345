"""The packets of a camera's video files: where each lies, when it is shown, from which keyframe it can be decoded.

Listed once, by reading the files without decoding them, and kept memory-mapped in the dataset's cache. So a truncated
video is found before training begins, and no container is opened or sought for a sample.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import av.error
import numpy as np
from jaxtyping import Float64, Int, Int32, Int64
from tqdm import tqdm

from hvd.errors import UserError

MOST_PIXELS = 1 << 26  # of one image


@dataclass(frozen=True)
class FilePackets:
    """One file's packets in decoding order."""

    codec: str
    extradata: bytes
    base: float  # seconds per unit of pts
    place: Int64[np.ndarray, " p"]  # byte offset in the file
    size: Int64[np.ndarray, " p"]
    pts: Int64[np.ndarray, " p"]
    start: Int64[np.ndarray, " p"]  # the packet at which decoding must start to obtain this one

    @property
    def end(self) -> float:
        """When the last frame is shown, in seconds."""
        return float(self.pts.max()) * self.base


@dataclass(frozen=True)
class PacketTable:
    """The packets of all files of a camera, one file after another; `start` and `packet_of_row` number them throughout.

    A row's file is that of its packet: first[file] <= packet < first[file + 1]. `name` changes with the contents.
    """

    name: str
    paths: tuple[Path, ...]
    codecs: tuple[tuple[str, bytes], ...]  # codec name and its extradata, per file
    first: Int64[np.ndarray, " files_plus_1"]
    place: Int64[np.ndarray, " p"]
    size: Int32[np.ndarray, " p"]
    pts: Int64[np.ndarray, " p"]
    start: Int64[np.ndarray, " p"]
    packet_of_row: Int64[np.ndarray, " n"]


def list_all(paths: Sequence[Path]) -> list[FilePackets]:
    """The packets of all files, read in parallel, with a bar when it takes long."""
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(paths), unit="file", desc=f"reading {paths[0].parent}", delay=2) as bar,
    ):
        files = []
        for packets in pool.map(list_packets, paths):
            files.append(packets)
            bar.update()
    return files


def save_table(
    folder: Path,
    paths: Sequence[Path],
    files: Sequence[FilePackets],
    file_of: Int[np.ndarray, " n"],
    seconds: Float64[np.ndarray, " n"],
) -> None:
    """Write the table of `load_table`.

    Args:
        file_of: file number of each row of the dataset [n]; -1: its video is not on this disk.
        seconds: time of each row in its file [n].

    Raises UserError naming a file that has no frame at a row's time.
    """
    first = np.cumsum([0, *(len(f.pts) for f in files)])
    packet_of_row = np.full(len(file_of), -1)
    order = np.argsort(file_of, kind="stable")
    bounds = np.searchsorted(file_of[order], np.arange(len(files) + 1))
    for i, packets in enumerate(files):
        rows = order[bounds[i] : bounds[i + 1]]
        packet_of_row[rows] = first[i] + nearest_packets(packets, seconds[rows], paths[i])
    folder.mkdir()
    arrays = {
        "first": first,
        "place": np.concatenate([f.place for f in files]),
        "size": np.concatenate([f.size for f in files]).astype(np.int32),
        "pts": np.concatenate([f.pts for f in files]),
        "start": np.concatenate([f.start + first[i] for i, f in enumerate(files)]),
        "packet_of_row": packet_of_row,
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "codecs.json").write_text(json.dumps([(f.codec, f.extradata.hex()) for f in files]))


def load_table(folder: Path, paths: Sequence[Path]) -> PacketTable:
    """The table that `save_table` wrote for these files, memory-mapped."""
    codecs = json.loads((folder / "codecs.json").read_text())
    arrays = {p.stem: np.load(p, mmap_mode="r") for p in folder.glob("*.npy")}
    codecs = tuple((codec, bytes.fromhex(extradata)) for codec, extradata in codecs)
    return PacketTable(str(folder), tuple(paths), codecs, **arrays)


def list_packets(path: Path) -> FilePackets:
    """The packets of the first video stream of `path`. Raises UserError naming a missing, damaged or truncated file."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise UserError(f"{path}: damaged video file, or one of a codec that this PyAV does not know")
            codec, extradata = stream.codec_context.codec.name, stream.codec_context.extradata or b""
            base, promised, pixels = float(stream.time_base or 0), stream.frames, str(stream.codec_context.pix_fmt)
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > MOST_PIXELS:
                raise UserError(f"{path}: holds pictures of {width} x {height}, larger than a camera's")
            rows = [
                (p.pos, p.size, p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and p.pts is not None
            ]
        file_size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: video file is missing") from None
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or truncated video file ({error})") from error
    if pixels.startswith("gray") and pixels not in ("gray", "gray8"):
        raise UserError(f"{path}: holds {pixels} pictures, as depth cameras give; choose a colour camera")
    if not rows or not base or len(rows) < promised:
        raise UserError(f"{path}: damaged or truncated video file ({len(rows)} of {promised} frames)")
    place, size, pts, key = (np.asarray(column, np.int64) for column in zip(*rows, strict=True))
    if place.min() < 0 or int((place + size).max()) > file_size or not key[0]:
        raise UserError(f"{path}: damaged or truncated video file (frames lie outside the file)")
    keys = np.flatnonzero(key)
    start = keys[np.searchsorted(keys, np.arange(len(pts)), side="right") - 1]
    # a frame shown before the keyframe that precedes it in the file (open GOP) needs the keyframe before that one
    early = pts < pts[start]
    start[early] = keys[np.maximum(np.searchsorted(keys, start[early]) - 1, 0)]
    return FilePackets(codec, extradata, base, place, size, pts, start)


def nearest_packets(packets: FilePackets, seconds: Float64[np.ndarray, " n"], path: Path) -> Int64[np.ndarray, " n"]:
    """The packet whose frame is nearest to each time.

    Raises UserError when it is more than half a frame away, or the same for two rows that follow each other.
    """
    shown = np.argsort(packets.pts, kind="stable")
    times = packets.pts[shown] * packets.base
    right = np.minimum(np.searchsorted(times, seconds), len(times) - 1)
    left = np.maximum(right - 1, 0)
    near = np.where(seconds - times[left] <= times[right] - seconds, left, right)
    off = np.abs(times[near] - seconds)
    step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else np.inf
    if off.size and off.max() > 0.5 * step + 1e-3:
        worst = f"no frame at {seconds[np.argmax(off)]:.3f} s (the video ends at {times[-1]:.3f} s)"
        raise UserError(f"{path}: {worst}; it does not fit the rows of its episodes")
    twice = np.flatnonzero((np.diff(seconds) > 0) & (np.diff(near) == 0))
    if twice.size:
        first, second = seconds[twice[0] : twice[0] + 2]
        text = (
            f"has one frame for the rows at {first:.3f} s and {second:.3f} s; it does not fit the rows of its episodes"
        )
        raise UserError(f"{path}: {text}: has it another frame rate?")
    return shown[near]
