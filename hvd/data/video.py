"""Videos of frames: encoding, joining without re-encoding, and what LeRobot's info.json says about them (PyAV).

Every second frame is a key frame (g = 2), as in LeRobot's own files, so that a random frame costs at most two decoded
ones. Measured per core on 224x224 camera frames (real / simulated; encoded frames/s, random reads/s, PSNR, KiB/frame):

    h264 ultrafast crf 20 (ours)    2,430 / 2,570    2,700 / 4,030    38.0 / 40.2 dB    6.2 / 3.2
    av1 preset 12 crf 30 (LeRobot)    250 /   290      610 / 1,090    36.9 / 38.3 dB    3.0 / 1.1

Encoders run with one thread each: the output is then a pure function of the frames, and one encoder per core is also
the fastest way to fill a machine.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Literal, cast

import av
import av.container
import av.error
import numpy as np
from jaxtyping import UInt8

from hvd.errors import UserError

CodecName = Literal["h264", "av1"]
GROUP = 2  # distance of key frames, in a dataset


@dataclass(frozen=True)
class Codec:
    """An encoder of FFmpeg and how it is used; `crf` is its default quality (less is better)."""

    encoder: str
    preset: str | int
    crf: int
    fast_decode: int = 0
    group: int = GROUP

    def options(self, crf: int) -> dict[str, str]:
        options = {"g": str(self.group), "crf": str(crf), "preset": str(self.preset)}
        if self.encoder == "libsvtav1":
            options["svtav1-params"] = "fast-decode=0:lp=1"
        return options


CODECS: Mapping[str, Codec] = MappingProxyType(
    {"h264": Codec("libx264", "ultrafast", 20), "av1": Codec("libsvtav1", 12, 30)}
)


def get_codec(name: str) -> Codec:
    """The codec called `name`; a UserError when it is unknown or this PyAV cannot encode it."""
    if name not in CODECS:
        raise UserError(f"--codec {name}: unknown; use one of {', '.join(CODECS)}")
    try:
        av.Codec(CODECS[name].encoder, "w")
    except av.error.FFmpegError:
        raise UserError(f"--codec {name}: this PyAV has no encoder {CODECS[name].encoder}; use another codec") from None
    return CODECS[name]


def encode_video(
    path: str | os.PathLike[str],
    blocks: Iterable[UInt8[np.ndarray, "n h w 3"]],
    fps: int,
    codec: str | Codec = "h264",
    crf: int | None = None,
    on_frames: Callable[[int], Any] | None = None,
) -> int:
    """Encode blocks of RGB frames into the mp4 file `path`, frame i at i / fps seconds; returns how many there were.

    Sizes that 4:2:0 chroma cannot hold (odd ones) are stored as 4:4:4. `on_frames(n)` is called after each block.
    Raises OSError when the file cannot be written whole (a full disk, for one).
    """
    spec = codec if isinstance(codec, Codec) else get_codec(codec)
    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder otherwise greets on stderr for every file
    count = 0
    stream: av.VideoStream | None = None
    with _container(path) as container:
        for block in blocks:
            if stream is None:
                height, width = block.shape[1:3]
                options = spec.options(spec.crf if crf is None else crf)
                stream = cast(av.VideoStream, container.add_stream(spec.encoder, fps, options=options))
                stream.width, stream.height = width, height
                stream.pix_fmt = _pixel_format(spec, width, height)
                stream.time_base = Fraction(1, fps)
                stream.codec_context.thread_count = 1
                stream.codec_context.open()
                _ordinary_scheduling()
            for image in block:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                frame.pts, frame.time_base = count, Fraction(1, fps)
                container.mux(stream.encode(frame))
                count += 1
            if on_frames is not None:
                on_frames(len(block))
        if stream is None:
            raise ValueError(f"{path}: a video needs at least one frame")
        container.mux(stream.encode(None))
    _verify(path, count)
    return count


def _ordinary_scheduling() -> None:
    """Give all threads of this process the ordinary scheduling. SVT-AV1, opened by root, makes its own and the calling
    thread real-time ones (SCHED_FIFO): on few cores nothing else runs then, and every child inherits it."""
    for thread in os.listdir("/proc/self/task") if hasattr(os, "sched_setscheduler") else ():
        with contextlib.suppress(OSError):  # it has ended, or may not change
            if os.sched_getscheduler(int(thread)) != os.SCHED_OTHER:
                os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))


def join_videos(segments: Iterable[str | os.PathLike[str]], path: str | os.PathLike[str], fps: int) -> int:
    """Put the frames of `segments` (mp4 files of encode_video, alike in codec and size) one after another into `path`.

    Packets are copied as they are. Returns the number of frames; frame i lies at i / fps seconds.
    """
    count = 0
    stream = None
    tick = Fraction(1, fps)
    with _container(path) as container:
        for segment in segments:
            with av.open(os.fspath(segment)) as source:
                template = source.streams.video[0]
                if stream is None:
                    stream = container.add_stream_from_template(template, opaque=True)
                    stream.time_base = template.time_base
                # No frame is reordered (ultrafast has no B frames; an AV1 packet shows exactly one frame), so the n-th
                # packet is the n-th frame.
                for packet in source.demux(template):
                    if packet.size == 0:
                        continue
                    packet.stream = stream
                    packet.time_base = tick
                    packet.pts = packet.dts = count
                    packet.duration = 1
                    container.mux(packet)
                    count += 1
    _verify(path, count)
    return count


def video_info(path: str | os.PathLike[str], fps: int, codec: str, crf: int) -> dict[str, Any]:
    """The `info` entry of a video feature in info.json, with the keys that LeRobot 0.6 writes."""
    with av.open(os.fspath(path)) as container:
        stream = container.streams.video[0]
        info = {
            "video.height": stream.height,
            "video.width": stream.width,
            "video.codec": stream.codec.canonical_name,
            "video.pix_fmt": stream.pix_fmt,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
            "video.g": GROUP,
            "video.crf": crf,
            "video.preset": CODECS[codec].preset,
            "video.fast_decode": CODECS[codec].fast_decode,
            "video.video_backend": "pyav",
            "video.extra_options": {},
            "is_depth_map": False,
        }
    return info


def _container(path: str | os.PathLike[str]) -> av.container.OutputContainer:
    # faststart: the index first, so that a file can be read while it is downloaded
    return av.open(os.fspath(path), "w", format="mp4", options={"movflags": "faststart"})


def _pixel_format(spec: Codec, width: int, height: int) -> str:
    if width % 2 == 0 and height % 2 == 0:
        return "yuv420p"
    if spec.encoder == "libsvtav1":
        raise UserError(f"images of {height}x{width} have an odd side, which av1 cannot hold; use --codec h264")
    return "yuv444p"


def _verify(path: str | os.PathLike[str], frames: int) -> None:
    """FFmpeg may lose a failed write when it closes a file: look whether the index is there and whole."""
    try:
        with av.open(os.fspath(path)) as container:
            written = container.streams.video[0].frames
    except (av.error.FFmpegError, IndexError) as error:
        raise OSError(errno.EIO, "the video was not written whole (is the disk full?)", os.fspath(path)) from error
    if written != frames:
        raise OSError(errno.EIO, f"the video has {written} of {frames} frames (is the disk full?)", os.fspath(path))
