"""Camera frames of a dataset by row: random access into video files (PyAV) and into images stored in parquet.

Video: a file's packets (place, size, time, keyframe) are listed once, by reading the container without decoding. A frame is
then had by reading the bytes from its keyframe to itself and giving them to a decoder: no container is opened or sought per
sample, and one decoder per thread serves all files of the same codec settings.

Parquet reads whole pages, so images in it have no random access: on first use their encoded bytes (PNG, JPEG) are copied
into one file in the cache, with the place of each row's bytes.
"""

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float64, Int, Int64, UInt8
from PIL import Image, UnidentifiedImageError

from hvd.data.columns import cache_folder, replacing
from hvd.data.layout import Layout, read_parquet
from hvd.errors import UserError

_OPEN_FILES = 16  # per thread
_DECODERS = 4  # per thread; datasets of one experiment seldom have more codec settings


class Frames(Protocol):
    """Frames of one camera: rows of the dataset -> uint8 [n,H,W,3]. Safe to call from several threads."""

    def __call__(self, rows: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w 3"]: ...


@dataclass(frozen=True)
class PacketIndex:
    """The packets of a video file in decoding order, and which of them shows the frame of a time."""

    path: Path
    codec: str
    extradata: bytes | None
    place: Int64[np.ndarray, " p"]  # byte offset in the file
    size: Int64[np.ndarray, " p"]
    pts: Int64[np.ndarray, " p"]
    start: Int64[np.ndarray, " p"]  # the packet at which decoding must start to obtain this one
    seconds: Float64[np.ndarray, " p"]  # presentation times, ascending
    shown: Int64[np.ndarray, " p"]  # the packet of each of these times

    def packets_at(self, seconds: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The packet whose frame is nearest to each time; UserError when it is more than half a frame away."""
        right = np.clip(np.searchsorted(self.seconds, seconds), 1, max(1, len(self.seconds) - 1))
        right = np.minimum(right, len(self.seconds) - 1)
        left = np.maximum(right - 1, 0)
        nearest = np.where(seconds - self.seconds[left] <= self.seconds[right] - seconds, left, right)
        gap = np.abs(self.seconds[nearest] - seconds)
        step = (self.seconds[-1] - self.seconds[0]) / max(1, len(self.seconds) - 1) or np.inf
        if gap.size and gap.max() > 0.5 * step + 1e-3:
            worst = float(seconds[np.argmax(gap)])
            raise UserError(f"{self.path}: no frame at {worst:.3f} s (it ends at {self.seconds[-1]:.3f} s); truncated video?")
        return self.shown[nearest]


def read_packet_index(path: Path) -> PacketIndex:
    """List the packets of the first video stream of `path`. Raises UserError naming an unreadable or truncated file."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: has no video stream")
            stream = container.streams.video[0]
            codec, extradata, base = stream.codec_context.codec.name, stream.codec_context.extradata, stream.time_base
            rows = [(p.pos, p.size, p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and p.pts is not None]
    except FileNotFoundError:
        raise UserError(f"{path}: video file is missing") from None
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or truncated video file ({error})") from error
    if not rows or base is None or not rows[0][3]:
        raise UserError(f"{path}: damaged or truncated video file (no packets, or none to start from)")
    place, size, pts, key = (np.asarray(column, np.int64) for column in zip(*rows, strict=True))
    if place.min() < 0 or int((place + size).max()) > path.stat().st_size:
        raise UserError(f"{path}: damaged or truncated video file (packets lie outside the file)")
    keys = np.flatnonzero(key)
    start = keys[np.searchsorted(keys, np.arange(len(pts)), side="right") - 1]
    # a frame shown before its keyframe (open GOP) needs the keyframe before that
    early = pts < pts[start]
    start[early] = keys[np.maximum(np.searchsorted(keys, start[early]) - 1, 0)]
    shown = np.argsort(pts, kind="stable")
    return PacketIndex(path, codec, extradata, place, size, pts, start, pts[shown] * float(base), shown)


class _Decoder:
    """One codec context: remembers where it stands, so that neighbouring frames cost no second decoding of a GOP."""

    def __init__(self, index: PacketIndex):
        self.context = av.CodecContext.create(index.codec, "r")
        self.context.extradata = index.extradata
        # with more threads a decoder returns frames late, and other samples keep the cores busy anyway
        self.context.thread_count = 1
        self.reformatter = VideoReformatter()
        self.path: Path | None = None
        self.next = 0  # packet that would be fed next

    def decode(self, index: PacketIndex, file: io.FileIO, wanted: Sequence[int]) -> dict[int, np.ndarray]:
        """RGB frames of the packets `wanted` (ascending) of one file."""
        found: dict[int, np.ndarray] = {}
        for target in wanted:
            begin = int(index.start[target])
            if self.path != index.path or not begin <= self.next <= target:
                self.context.flush_buffers()
                self.path, self.next = index.path, begin
            self._feed(index, file, target, found)
        return found

    def _feed(self, index: PacketIndex, file: io.FileIO, target: int, found: dict[int, np.ndarray]) -> None:
        """Feed packets until the frame of `target` comes out; later packets only when the decoder holds frames back."""
        pts = int(index.pts[target])
        stop, last = target + 1, len(index.pts)
        while True:
            first = self.next
            offset = int(index.place[first]) if first < last else 0
            block = b""
            if first < last:
                end = int((index.place[first:stop] + index.size[first:stop]).max())
                contiguous = end - offset <= 2 * int(index.size[first:stop].sum()) + 65536
                block = os.pread(file.fileno(), end - offset, offset) if contiguous else b""
            for i in range(first, min(stop, last)):
                at, size = int(index.place[i]) - offset, int(index.size[i])
                data = block[at : at + size] if block else os.pread(file.fileno(), size, int(index.place[i]))
                if len(data) != size:
                    raise UserError(f"{index.path}: truncated video file")
                packet = av.Packet(data)
                packet.pts = int(index.pts[i])
                self.next = i + 1
                if self._take(self.context.decode(packet), pts, target, found):
                    return
            if stop >= last:
                drained = self.context.decode(None)
                self.path = None  # a drained decoder must be flushed before it takes more
                if self._take(drained, pts, target, found):
                    return
                raise UserError(f"{index.path}: damaged video file (frame at {pts} does not decode)")
            stop = min(stop + 1, last)

    def _take(self, frames: Sequence[av.VideoFrame], pts: int, target: int, found: dict[int, np.ndarray]) -> bool:
        done = False
        for frame in frames:
            if frame.pts == pts:
                found[target] = self.reformatter.reformat(frame, format="rgb24").to_ndarray()
                done = True
        return done


class VideoFrames:
    """Frames of a camera stored as video.

    Args:
        paths: the video files.
        file_of: file number of each row [N].
        seconds: time of each row within its file [N].
    """

    def __init__(self, paths: Sequence[Path], file_of: Int[np.ndarray, " n"], seconds: Float64[np.ndarray, " n"]):
        self._paths, self._file_of, self._seconds = tuple(paths), file_of, seconds
        self._indices: dict[int, PacketIndex] = {}
        self._lock = threading.Lock()
        self._local = threading.local()

    def __call__(self, rows: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w 3"]:
        rows = np.asarray(rows)
        out: list[np.ndarray | None] = [None] * len(rows)
        files = self._file_of[rows]
        for file in np.unique(files):
            at = np.flatnonzero(files == file)
            index = self._index(int(file))
            packets = index.packets_at(self._seconds[rows[at]])
            frames = self._decode(index, [int(p) for p in np.unique(packets)])
            for i, packet in zip(at, packets, strict=True):
                out[i] = frames[int(packet)]
        return stack(out, str(self._paths[0].parent))

    def _index(self, file: int) -> PacketIndex:
        if file not in self._indices:
            index = read_packet_index(self._paths[file])
            with self._lock:
                self._indices[file] = index
        return self._indices[file]

    def _decode(self, index: PacketIndex, wanted: list[int]) -> dict[int, np.ndarray]:
        local = self._local
        if not hasattr(local, "decoders"):
            local.decoders, local.files = OrderedDict(), OrderedDict()
        try:
            decoder = _bounded(local.decoders, (index.codec, index.extradata), lambda: _Decoder(index), _DECODERS)
            file = _bounded(local.files, index.path, lambda: io.FileIO(index.path), _OPEN_FILES)
            return decoder.decode(index, file, wanted)
        except FileNotFoundError:
            raise UserError(f"{index.path}: video file is missing") from None
        except (av.FFmpegError, OSError) as error:
            local.decoders.clear()  # its state is undefined now
            raise UserError(f"{index.path}: damaged or truncated video file ({error})") from error


def _bounded(cache: OrderedDict, key, make, bound: int):
    """cache[key], made on first use; beyond `bound` entries the one unused for longest goes (and is closed with it)."""
    if key in cache:
        cache.move_to_end(key)
        return cache[key]
    cache[key] = make()
    if len(cache) > bound:
        cache.popitem(last=False)
    return cache[key]


def stack(frames: Sequence[np.ndarray | None], where: str) -> UInt8[np.ndarray, "n h w 3"]:
    shapes = {f.shape for f in frames if f is not None}
    if len(shapes) != 1:
        raise UserError(f"{where}: frames of different sizes in one camera: {sorted(shapes)}")
    return np.stack([f for f in frames if f is not None])


class ImageFrames:
    """Frames of a camera stored as encoded images in a data file's column."""

    def __init__(self, blob: Path, places: Int64[np.ndarray, "n_plus_1"], key: str):
        self._blob = np.memmap(blob, np.uint8, "r")
        self._places, self._key, self._where = places, key, blob

    def __call__(self, rows: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w 3"]:
        return stack([self._one(int(row)) for row in rows], f"{self._where} ({self._key})")

    def _one(self, row: int) -> np.ndarray:
        data = self._blob[self._places[row] : self._places[row + 1]]
        try:
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"camera {self._key}: the image of row {row} is damaged ({error})") from error


def open_images(layout: Layout, key: str, data_digest: str) -> ImageFrames:
    """Frames of the `image` feature `key`; on first use copies the encoded images out of parquet into the cache."""
    name = key.replace("/", "_")
    folder = cache_folder(layout.root) / f"images-{name}-{data_digest[:16]}"
    if not folder.is_dir():
        with replacing(folder) as temporary:
            temporary.mkdir()
            places = [0]
            with (temporary / "images.bin").open("wb") as out:
                for path in layout.data_paths:
                    for cell in read_parquet(path, [key])[key].to_pylist():
                        data = _encoded(cell, layout.root, path, key)
                        out.write(data)
                        places.append(places[-1] + len(data))
            np.save(temporary / "places.npy", np.asarray(places, np.int64))
    return ImageFrames(folder / "images.bin", np.load(folder / "places.npy"), key)


def _encoded(cell: object, root: Path, path: Path, key: str) -> bytes:
    """The image's bytes: in the cell itself, or in a file that the cell names."""
    if isinstance(cell, dict):
        if cell.get("bytes"):
            return cell["bytes"]
        if cell.get("path"):
            file = root / cell["path"]
            if file.is_file():
                return file.read_bytes()
            raise UserError(f"{path}: image {file} of column {key!r} is missing")
    raise UserError(f"{path}: column {key!r} holds no encoded image")


def open_frames(layout: Layout, key: str, time: Float64[np.ndarray, " n"], episode_of: Int[np.ndarray, " n"], data_digest: str) -> Frames:
    """The frames of the dataset's feature `key`, whether video or images."""
    if layout.features[key].get("dtype") == "image":
        return open_images(layout, key, data_digest)
    spans = [e.videos[key] for e in layout.episodes]
    paths = list(dict.fromkeys(s.path for s in spans))
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: video file is missing")
    number = {path: i for i, path in enumerate(paths)}
    file_of = np.asarray([number[s.path] for s in spans], np.int32)[episode_of]
    seconds = np.asarray([s.offset for s in spans], np.float64)[episode_of] + time
    return VideoFrames(paths, file_of, seconds)


