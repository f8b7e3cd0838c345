"""Model-sized frames of a camera, decoded once into a memory-mapped file that all processes of a machine share."""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8
from tqdm import tqdm

from hvd.data.cache import cache_folder, cached
from hvd.data.dataset import Dataset
from hvd.data.frames import Frames
from hvd.data.transforms import resize_with_pad

_FILE = "frames.u8"
_BLOCK = 64  # frames decoded at a time by one thread


class CachedFrames:
    """Frames from the file; rows of episodes that the config does not offer are not in it."""

    def __init__(self, path: Path, num_frames: int, size: int):
        self._frames = np.memmap(path, np.uint8, "r", shape=(num_frames, size, size, 3))

    def __call__(self, rows: Int[np.ndarray, " n"]) -> UInt8[np.ndarray, "n h w 3"]:
        return self._frames[rows]


def cached_frames(dataset: Dataset, camera: str, size: int) -> Frames:
    """Frames of `camera` at size x size; made on first use, with all cores and a progress bar."""
    offered = hashlib.sha256(np.asarray([e.index for e in dataset.episodes]).tobytes()).hexdigest()[:8]
    name = f"frames-{dataset.digest[:16]}-{camera}-{size}-{offered}.u8"  # an older version's file gives way
    folder = cached(cache_folder(dataset.root) / name, lambda temporary: _build(dataset, camera, size, temporary))
    return CachedFrames(folder / _FILE, dataset.num_frames, size)


def _build(dataset: Dataset, camera: str, size: int, folder: Path) -> None:
    """Write the file, in which what is not offered stays a hole. (Not through a memory map: see columns._Arrays.)"""
    folder.mkdir()
    total, frame_bytes = sum(e.length for e in dataset.episodes), size * size * 3
    with (
        (folder / _FILE).open("wb") as file,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=total, unit="frame", desc=f"{dataset.name}: {camera} {size}x{size}", delay=1) as bar,
    ):
        file.truncate(dataset.num_frames * frame_bytes)
        lock = threading.Lock()

        def decode(start: int, stop: int) -> None:
            block = resize_with_pad(dataset.frames(camera, np.arange(start, stop)), size, size)
            rest, place = memoryview(np.ascontiguousarray(block).reshape(-1)), start * frame_bytes
            while rest:
                written = os.pwrite(file.fileno(), rest, place)
                rest, place = rest[written:], place + written
            with lock:
                bar.update(stop - start)

        blocks = [
            (start, min(start + _BLOCK, e.stop)) for e in dataset.episodes for start in range(e.start, e.stop, _BLOCK)
        ]
        pending = [pool.submit(decode, *block) for block in blocks]
        try:
            for future in pending:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
