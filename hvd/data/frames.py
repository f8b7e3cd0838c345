"""Camera frames of a dataset by row: random access into video files (PyAV) and into images stored in parquet.

Video: the packets are known (hvd.data.packets), so a frame is had by reading the bytes from its keyframe to itself and
giving them to a decoder. One decoder per thread serves all files of the same codec settings.

Parquet reads whole pages, so images in it have no random access: on first use their encoded bytes (PNG, JPEG) are
copied into one file in the cache, with the place of each row's bytes.
"""

import io
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import av
import av.error
import numpy as np
from av.video.reformatter import VideoReformatter
from jaxtyping import Float64, Int, Int64, UInt8
from PIL import Image, ImageOps

from hvd.data.cache import cache_folder, cached, is_own
from hvd.data.layout import Layout, data_files
from hvd.data.packets import MOST_PIXELS, FilePackets, PacketTable, list_all, load_table, save_table
from hvd.documents import read_bytes
from hvd.errors import UserError

_OPEN_FILES = 32  # per thread
_DECODERS = 4  # per thread; the cameras of an experiment seldom have more codec settings
_local = threading.local()


@runtime_checkable
class Frames(Protocol):
    """Frames of one camera: rows of the dataset -> uint8 [n,H,W,3]. Safe to call from several threads."""

    def __call__(self, rows: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w 3"]: ...


class _File:
    """An open file, closed when nothing refers to it any more (its thread has ended, or others took its place)."""

    def __init__(self, path: Path):
        self._descriptor = -1  # __del__ runs even if opening fails
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, place: int, size: int) -> bytes:
        return os.pread(self._descriptor, size, place)

    def __del__(self):
        if self._descriptor >= 0:
            os.close(self._descriptor)


class _Decoder:
    """One codec context. It remembers where it stands, so that neighbouring frames cost no second decoding."""

    def __init__(self, codec: str, extradata: bytes):
        self.context: Any = av.CodecContext.create(codec, "r")
        self.context.extradata = extradata or None
        # Else a damaged part is filled up with what looks likely, and a frame may be larger than its file says
        self.context.options = {"err_detect": "explode", "max_pixels": str(MOST_PIXELS)}
        # with more threads a decoder returns frames late, and other samples keep the cores busy anyway
        self.context.thread_count = 1
        self.reformatter = VideoReformatter()
        self.table: PacketTable | None = None
        self.file = -1
        self.next = 0  # packet to be fed next
        self.shown = 0  # pts of the last frame that came out, meaningless before the first one

    def decode(self, table: PacketTable, file: int, handle: _File, wanted: Sequence[int]) -> dict[int, np.ndarray]:
        """RGB frames of the packets `wanted` of one file."""
        left = {int(table.pts[p]): p for p in wanted}  # frames come out in the order of their pts
        decoded: dict[int, np.ndarray] = {}
        for pts in sorted(left):
            packet = left[pts]
            if packet not in decoded:
                begin = int(table.start[packet])
                if self.table is not table or self.file != file or self.next < begin or self.shown >= pts:
                    self.context.flush_buffers()
                    self.table, self.file, self.next, self.shown = table, file, begin, pts - 1
                self._feed(handle, packet, left, decoded)
        return decoded

    def _feed(self, handle: _File, target: int, left: dict[int, int], decoded: dict[int, np.ndarray]) -> None:
        """Feed packets until the frame of `target` is decoded; beyond it only when the decoder holds frames back."""
        assert self.table is not None
        table, last = self.table, int(self.table.first[self.file + 1])
        while target not in decoded:
            if self.next >= last:
                self._take(self.context.decode(None), left, decoded)
                self.table = None  # a drained decoder must be flushed before it takes more
                if target not in decoded:
                    raise UserError(f"{table.paths[self.file]}: damaged video file (a frame does not decode)")
                return
            stop = min(max(self.next, target) + 1, last)
            for data in _read(handle, table, self.next, stop):
                packet = av.Packet(data)
                packet.pts = int(table.pts[self.next])
                packet.is_keyframe = int(table.start[self.next]) == self.next
                self.next += 1
                self._take(self.context.decode(packet), left, decoded)

    def _take(self, frames: Sequence[av.VideoFrame], left: dict[int, int], decoded: dict[int, np.ndarray]) -> None:
        for frame in frames:
            if frame.pts is not None:
                self.shown = frame.pts
                if frame.pts in left:
                    decoded[left[frame.pts]] = self.reformatter.reformat(frame, format="rgb24").to_ndarray()


def _read(handle: _File, table: PacketTable, begin: int, stop: int) -> list[bytes]:
    """The bytes of packets begin .. stop; in one reading where they lie together, as in a file with one stream."""
    places, sizes = table.place[begin:stop].tolist(), table.size[begin:stop].tolist()
    if stop - begin > 1 and all(a + n == b for a, n, b in zip(places, sizes, places[1:], strict=False)):
        block = handle.read(places[0], sum(sizes))
        parts = [block[a - places[0] : a - places[0] + n] for a, n in zip(places, sizes, strict=True)]
    else:
        parts = [handle.read(a, n) for a, n in zip(places, sizes, strict=True)]
    if [len(part) for part in parts] != sizes:
        raise OSError("file ends within a frame")
    return parts


class VideoFrames:
    """Frames of a camera stored as video."""

    def __init__(self, table: PacketTable):
        self._table = table

    def __call__(self, rows: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w 3"]:
        packets = self._table.packet_of_row[rows]
        if len(packets) and packets.min() < 0:
            raise UserError(f"{self._table.paths[0].parent}: the video of row {rows[packets.argmin()]} is not there")
        files = np.searchsorted(self._table.first, packets, side="right") - 1
        decoded: dict[int, np.ndarray] = {}
        for file in np.unique(files).tolist():
            decoded |= self._decode(file, np.unique(packets[files == file]).tolist())
        return _stack([decoded[p] for p in packets.tolist()], str(self._table.paths[0].parent))

    def _decode(self, file: int, wanted: list[int]) -> dict[int, np.ndarray]:
        if not hasattr(_local, "decoders"):
            _local.decoders, _local.files = OrderedDict(), OrderedDict()
        path, codec = self._table.paths[file], self._table.codecs[file]
        try:
            handle = _bounded(_local.files, (self._table.name, path), lambda: _File(path), _OPEN_FILES)
            decoder = _bounded(_local.decoders, codec, lambda: _Decoder(*codec), _DECODERS)
            return decoder.decode(self._table, file, handle, wanted)
        except (av.error.FFmpegError, OSError) as error:
            _local.decoders.clear()  # their state is not known now
            raise UserError(f"{path}: missing, damaged or truncated video file ({error})") from error


def _bounded(cache: OrderedDict, key: Hashable, make: Callable[[], Any], bound: int) -> Any:
    """cache[key], made on first use; beyond `bound` entries the one unused for longest goes."""
    if key in cache:
        cache.move_to_end(key)
    else:
        cache[key] = make()
        if len(cache) > bound:
            cache.popitem(last=False)
    return cache[key]


def _stack(frames: Sequence[np.ndarray], where: str) -> UInt8[np.ndarray, "n h w 3"]:
    shapes = {f.shape for f in frames}
    if len(shapes) != 1:
        raise UserError(f"{where}: frames of different sizes in one camera: {sorted(shapes)}")
    return np.stack(frames)


class ImageFrames:
    """Frames of a camera stored as encoded images: row i's bytes are places[i] .. places[i + 1] of the file `blob`."""

    def __init__(self, blob: Path, places: Int64[np.ndarray, " rows_plus_1"], key: str):
        self._blob, self._places, self._key = np.memmap(blob, np.uint8, "r"), places, key

    def __call__(self, rows: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w 3"]:
        return _stack([self._one(row) for row in rows.tolist()], self._key)

    def _one(self, row: int) -> np.ndarray:
        data = self._blob[self._places[row] : self._places[row + 1]].tobytes()
        try:
            return _decode_png(data) if data[:8] == _PNG and data[24:26] == _RGB8 else _decode_other(data)
        except Exception as error:  # decoders raise anything
            raise UserError(f"column {self._key}: the image of row {row} is damaged ({error})") from error


_FORMATS = ("PNG", "JPEG", "WEBP")  # Pillow starts other programs for some of the rest
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # those of 8 bits
_MOST_BYTES = 1 << 28  # of one image
_PNG, _RGB8 = b"\x89PNG\r\n\x1a\n", b"\x08\x02"  # the latter: 8 bits a channel, three channels


def _decode_png(data: bytes) -> np.ndarray:
    """As PIL's result, but FFmpeg takes two thirds of the time and releases the interpreter lock."""
    context: Any = av.CodecContext.create("png", "r")  # a used one gave wrong pictures; a new one costs nothing
    context.thread_count = 1
    context.options = {"err_detect": "crccheck"}  # as PIL does; else a damaged picture comes out as another one
    return context.decode(av.Packet(data))[0].to_ndarray(format="rgb24")


def _decode_other(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


class Camera:
    """A camera feature of a dataset: checked when made, opened when the rows' times are known.

    Making it reads every video file of a dataset seen for the first time and raises UserError naming one that is
    missing, damaged or shorter than its episodes. Nothing is written before `open`.
    """

    def __init__(self, layout: Layout, key: str, digest: str, needed: int):
        """`needed`: how many of the episodes, from the first, must have their video on this disk."""
        self._layout, self._key = layout, key
        self._is_video = layout.features[key].dtype != "image"
        name = f"{'packets' if self._is_video else 'images'}-{digest[:16]}-{key.replace('/', '_')}"
        self._folder = cache_folder(layout.root) / name
        self._packets: list[FilePackets] = []
        if self._is_video:
            self._spans = [e.videos.get(key) for e in layout.episodes]
            if None in self._spans[:needed]:
                episode = layout.episodes[self._spans.index(None)].index
                raise UserError(f"{layout.root / 'meta'}: names no video of camera {key!r} for episode {episode}")
            rest = [s if s and s.path.is_file() else None for s in self._spans[needed:]]
            self._spans[needed:] = rest
            self._paths = list(dict.fromkeys(s.path for s in self._spans if s))
            if not is_own(self._folder):
                self._packets = list_all(self._paths)
                self._check_ends()

    def _check_ends(self) -> None:
        number = {path: i for i, path in enumerate(self._paths)}
        lasts = dict.fromkeys(self._paths, 0.0)
        for episode, span in zip(self._layout.episodes, self._spans, strict=True):
            if span is None:
                continue
            last, ends = span.offset + (episode.length - 1) / self._layout.fps, self._packets[number[span.path]].end
            if last > ends + 0.5 / self._layout.fps:
                what = f"the video ends at {ends:.2f} s, episode {episode.index} at {last:.2f} s"
                raise UserError(f"{span.path}: is shorter than its rows ({what})")
            lasts[span.path] = max(lasts[span.path], last)
        longer = [
            path for path in self._paths if self._packets[number[path]].end > lasts[path] + 1.5 / self._layout.fps
        ]
        if longer:
            ends, last = self._packets[number[longer[0]]].end, lasts[longer[0]]
            more = f", and {len(longer) - 1} more files" if len(longer) > 1 else ""
            what = f"the video ends at {ends:.2f} s, its last row is at {last:.2f} s{more}"
            print(f"warning: {longer[0]}: is longer than its rows ({what}): what follows them is not used", flush=True)

    def open(self, time: Float64[np.ndarray, " n"], episode_of: Int[np.ndarray, " n"]) -> Frames:
        """The camera's frames; on first use keeps its packet lists, or copies its images, in the cache.

        Args:
            time: seconds into the episode of each row [n].
            episode_of: each row's position among the episodes [n].
        """
        if not self._is_video:
            folder = cached(self._folder, lambda to: _copy_images(self._layout, self._key, to))
            return ImageFrames(folder / "images.bin", np.load(folder / "places.npy", mmap_mode="r"), self._key)
        number = {path: i for i, path in enumerate(self._paths)}
        file_of = np.asarray([number[s.path] if s else -1 for s in self._spans])[episode_of]
        seconds = np.asarray([s.offset if s else 0.0 for s in self._spans], np.float64)[episode_of] + time
        cached(self._folder, lambda to: save_table(to, self._paths, self._packets, file_of, seconds))
        return VideoFrames(load_table(self._folder, self._paths))


def _copy_images(layout: Layout, key: str, folder: Path) -> None:
    folder.mkdir()
    places = [0]
    total = sum(e.length for e in layout.episodes)
    with (folder / "images.bin").open("wb") as out, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # images as large as that are refused
        for path, _ in data_files(layout):
            table = layout.format.table(path, [key])
            if table.column_names != [key]:
                raise UserError(f"{path}: column {key!r} is there {len(table.column_names)} times")
            for row, cell in enumerate(table[key].to_pylist()):
                data = _encoded(cell, layout.root, path, key)
                _check_image(data, f"{path}: column {key!r}, row {row}")
                places.append(places[-1] + out.write(data))
    if len(places) != total + 1:
        raise UserError(f"{layout.root}: column {key!r} has {len(places) - 1} images for {total} rows")
    np.save(folder / "places.npy", np.asarray(places, np.int64))


def _encoded(cell: object, root: Path, path: Path, key: str) -> bytes:
    """The image's bytes: in the cell itself, or in a file below `root` that the cell names."""
    data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
    if isinstance(data, bytes) and data:
        return data
    if not isinstance(name, str) or not name:
        kinds = "bytes, a path, or both"
        raise UserError(f"{path}: a cell of column {key!r} is {type(cell).__name__}; hvd reads {kinds} of an image")
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise UserError(f"{path}: image {name[:200]!r} of column {key!r} lies outside the dataset")
    try:
        return read_bytes(root / name, _MOST_BYTES)
    except OSError:
        raise UserError(f"{path}: image {root / name} of column {key!r} is missing") from None


def _check_image(data: bytes, where: str) -> None:
    """What the image's head says of it, without decoding: its kind, its pixels, its size."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            mode, (width, height) = image.mode, image.size
    except Image.UnidentifiedImageError:
        raise UserError(f"{where}: is no PNG, JPEG or WebP image") from None
    except Exception as error:  # decoders raise anything
        raise UserError(f"{where}: the image is damaged or too large ({error})") from error
    if mode not in _MODES:
        raise UserError(
            f"{where}: has more than 8 bits a value (mode {mode}), as depth cameras give; choose a colour camera"
        )
    if width * height > MOST_PIXELS:
        raise UserError(f"{where}: is an image of {width} x {height}, larger than a camera's")
