"""The encoding of a conversion: all cores, resumable.

The work folder `<target>.partial` holds the encoded video of each recording and camera (`segments/`) and a journal with
one line per finished segment. A segment is named by a hash of what it was made from (recording, its size and time,
camera, codec), so one that is there can be used by any later run.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from hvd.data.lerobot_stats import ImageStats, plain
from hvd.data.lerobot_writer import Segment
from hvd.data.recordings import RecordingRef, open_recording
from hvd.data.video import encode_video
from hvd.errors import UserError
from hvd.files import JsonLines, locked, temporary_path
from hvd.pools import HANG_S, Isolated, kill, spawn_pool
from hvd.robots import get_robot

JOURNAL, LOCK = "journal.jsonl", "lock"
FRAMES_PER_WORKER = 4_000  # a worker process takes about a second to start; fewer frames are not worth one


@dataclass(frozen=True)
class SegmentJob:
    """One segment to encode: a recording's camera."""

    ref: RecordingRef
    camera: str
    robot: str
    num_frames: int
    fps: int
    codec: str
    crf: int

    def name(self) -> str:
        """File name, a hash of all that the segment depends on. Segments that are joined must also come from the same
        encoder: its version is that of PyAV, which brings it."""
        stat = self.ref.path.stat()
        source = (str(self.ref.path.resolve()), self.ref.demo, stat.st_size, stat.st_mtime_ns)
        text = json.dumps([*source, self.camera, self.num_frames, self.fps, self.codec, self.crf, av.__version__])
        return hashlib.sha256(text.encode()).hexdigest()[:24] + ".mp4"


class WorkFolder:
    """`<target>.partial`, locked for this process while it is open (a context manager)."""

    def __init__(self, path: Path):
        self.path = path
        self.segments = path / "segments"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "WorkFolder":
        if self.path.exists() and not is_work_folder(self.path):
            raise UserError(f"{self.path}: exists but is no work folder of hvd convert; move it away")

        def busy() -> None:
            raise UserError(f"{self.path}: another hvd convert is writing this dataset; wait for it")

        # The lock is made first: without it a folder left by a kill would not be known as ours.
        self._stack.enter_context(locked(self.path / LOCK, busy))
        self._journal = JsonLines(self.path / JOURNAL)
        self._stack.callback(self._journal.close)
        self.segments.mkdir(exist_ok=True)
        self._done = {str(entry.get("segment")): entry for entry in self._journal.records()}
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def finished(self, name: str) -> Segment | None:
        """The segment, if it was encoded before and its file is still whole."""
        entry, path = self._done.get(name), self.segments / name
        try:
            if entry is None or not path.is_file() or path.stat().st_size != entry["size"]:
                return None
            stats = {key: np.asarray(value, np.float64) for key, value in entry["stats"].items()}
            return Segment(path, int(entry["frames"]), entry["size"], stats)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None  # a damaged line of the journal: it is encoded again

    def note(self, entry: dict[str, Any]) -> None:
        """Add a finished segment to the journal."""
        self._journal.write(entry)
        self._done[entry["segment"]] = entry


def is_work_folder(path: Path) -> bool:
    """Whether `path` was made by hvd convert (or is empty: killed before the lock was there)."""
    return path.is_dir() and (any((path / name).is_file() for name in (JOURNAL, LOCK)) or not any(path.iterdir()))


def encode_all(
    work: WorkFolder, jobs: Sequence[SegmentJob], workers: int, skip_bad: bool, isolated: Isolated
) -> tuple[dict[tuple[RecordingRef, str], Segment], dict[RecordingRef, str]]:
    """Encode what is not there yet; returns the segments by (recording, camera), and a line about each recording that
    cannot be read. Without `skip_bad` the first of these is a UserError.

    Args:
        workers: processes; 0 = one per core, or fewer for little work.
        isolated: the process that does all of it where one is enough, or what is left where one of several died.
    """
    names = {job: job.name() for job in jobs}
    todo = [job for job in jobs if work.finished(names[job]) is None]
    frames = sum(job.num_frames for job in todo)
    workers = min(workers or min(num_cores(), frames // FRAMES_PER_WORKER + 1), max(1, len(todo)))
    done, bad = sum(job.num_frames for job in jobs) - frames, {}
    with tqdm(total=done + frames, initial=done, desc=f"encode x{workers}", unit="frame", mininterval=0.5) as bar:
        run = _one_by_one(todo, work.segments, names, isolated, bar)
        if workers > 1:
            run = _run_in_pool(todo, work.segments, names, workers, isolated, bar)
        with contextlib.closing(run) as outcomes:
            for job, result in outcomes:
                if not isinstance(result, str):
                    work.note(result)
                elif skip_bad:
                    bad.setdefault(job.ref, result)
                else:
                    raise UserError(result)
    segments = {(job.ref, job.camera): work.finished(names[job]) for job in jobs}
    return {key: segment for key, segment in segments.items() if segment is not None}, bad


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Outcome = tuple[SegmentJob, dict[str, Any] | str]  # a journal entry, or what is wrong with the recording


def _run_in_pool(
    jobs: Sequence[SegmentJob],
    folder: Path,
    names: dict[SegmentJob, str],
    workers: int,
    isolated: Isolated,
    bar: tqdm,
) -> Generator[Outcome]:
    """Processes, not threads: HDF5 decompresses under one lock, and a damaged file may kill who reads it."""
    context = multiprocessing.get_context("spawn")
    frames, stop = context.Value("q", 0), context.Event()
    pool = spawn_pool(workers, _begin_worker, (frames, stop))
    start, left, last = bar.n, set(jobs), time.monotonic()
    try:
        running = {pool.submit(_encode_in_worker, job, folder / names[job]): job for job in jobs}
        while running:
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            more = start + frames.value - bar.n
            bar.update(more)
            if more or finished:
                last = time.monotonic()
            elif time.monotonic() - last > HANG_S:
                kill(pool)  # one of them hangs: which one is seen when each is read alone
            for future in finished:
                job = running.pop(future)
                result = future.result()
                left.discard(job)
                yield job, result
    except BrokenProcessPool:
        pool.shutdown(cancel_futures=True)
        yield from _one_by_one([job for job in jobs if job in left], folder, names, isolated, bar)
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _one_by_one(
    jobs: Sequence[SegmentJob], folder: Path, names: dict[SegmentJob, str], isolated: Isolated, bar: tqdm
) -> Generator[Outcome]:
    """So that it shows which recording it is that kills who reads it."""
    for job in jobs:
        try:
            isolated.limit = HANG_S + job.num_frames  # a frame a second at least
            yield job, isolated(encode_segment, job, folder / names[job], _count_nothing)
        except BrokenProcessPool:
            died = "the process that encoded it died or hung (a damaged file, or out of memory?)"
            yield job, f"{job.ref}: camera {job.camera}: {died}"
        bar.update(job.num_frames)


def _count_nothing(n: int) -> None:
    pass


class _Stop(Exception):
    """The parent wants no more."""


_frames: Any = None  # in a worker: shared counter of encoded frames
_stop: Any = None  # in a worker: set when the parent wants no more


def _begin_worker(frames: Any, stop: Any) -> None:
    global _frames, _stop
    _frames, _stop = frames, stop


def _encode_in_worker(job: SegmentJob, path: Path) -> dict[str, Any] | str:
    def count(n: int) -> None:
        with _frames.get_lock():
            _frames.value += n
        if _stop.is_set():
            raise _Stop

    return encode_segment(job, path, count)


def encode_segment(job: SegmentJob, path: Path, on_frames: Callable[[int], Any]) -> dict[str, Any] | str:
    """Encode a recording's camera into `path`, atomically; returns the journal entry, or a line about a bad recording.

    Raises builtin OSErrors for what is wrong with the disk (PyAV's own do not travel between processes).
    """
    temporary = temporary_path(path)
    stats = ImageStats(job.num_frames)
    try:
        with open_recording(job.ref, get_robot(job.robot)) as recording:
            blocks = _watched(recording.frames(job.camera), stats)
            count = encode_video(temporary, blocks, job.fps, job.codec, job.crf, on_frames)
        size = temporary.stat().st_size
        os.replace(temporary, path)
    except UserError as error:
        return str(error)
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise RuntimeError(f"{job.ref}: encoding {job.camera} failed: {error}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    result = {key: plain(key, value) for key, value in stats.result().items()}
    return {"segment": path.name, "frames": count, "size": size, "stats": result}


def _watched(
    blocks: Iterator[UInt8[np.ndarray, "n h w 3"]], stats: ImageStats
) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
    first = 0
    for block in blocks:
        stats.add(first, block)
        first += len(block)
        yield block
