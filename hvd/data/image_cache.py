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
from hvd.data.dataset import Dataset, Episode
from hvd.data.frames import Frames
from hvd.data.transforms import resize_with_pad

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
    name = f"frames-{dataset.digest[:16]}-{camera}-{size}-{offered}.u8"
    path = cached(cache_folder(dataset.root) / name, lambda temporary: _build(dataset, camera, size, temporary))
    return CachedFrames(path, dataset.num_frames, size)


def _build(dataset: Dataset, camera: str, size: int, path: Path) -> None:
    total = sum(e.length for e in dataset.episodes)
    with tqdm(total=total, unit="frame", desc=f"{dataset.name}: {camera} {size}x{size}", delay=1) as bar:
        frames = np.memmap(path, np.uint8, "w+", shape=(dataset.num_frames, size, size, 3))  # sparse until written
        lock = threading.Lock()

        def decode(episode: Episode) -> None:
            for start in range(episode.start, episode.stop, _BLOCK):
                rows = np.arange(start, min(start + _BLOCK, episode.stop))
                frames[rows[0] : rows[-1] + 1] = resize_with_pad(dataset.frames(camera, rows), size, size)
                with lock:
                    bar.update(len(rows))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(decode, dataset.episodes):
                pass
        frames.flush()
