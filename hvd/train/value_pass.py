"""A value run over all rows of some datasets, on all devices of all processes.

Rows go through in shards; a finished shard is a file, and a pass that was stopped goes on after the last one.
"""

import concurrent.futures
import dataclasses
import io
import time
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float16, Float32, Int64
from tqdm import tqdm

from hvd import files
from hvd.configs import Experiment
from hvd.data.dataset import Dataset
from hvd.data.loader import Batcher, SampleSpec, Source
from hvd.runtime import preemption, watchdog
from hvd.train import inference
from hvd.train.mesh import Devices

SHARD_ROWS = 2048  # a stopped pass repeats at most so many rows
_FORWARD = 4  # times a training step's rows: without gradients there is room, and small batches leave devices idle


@dataclasses.dataclass(frozen=True)
class Values:
    """What the value model says about rows of one dataset; `seen`, where it is kept: what V is read from."""

    rows: Int64[np.ndarray, " n"]
    v: Float32[np.ndarray, " n"]
    q: Float32[np.ndarray, "n l 2"]
    seen: Float16[np.ndarray, "n d"] | None = None


class Shards:
    """Finished parts of a pass: <set>-<number>.npz with rows, v, q, and with `seen` where that is kept."""

    def __init__(self, folder: epath.PathLike, seen: bool = False):
        self.folder, self.seen = epath.Path(folder), seen

    def path(self, name: str, number: int) -> epath.Path:
        return self.folder / f"{name}-{number:06d}.npz"

    def read(self, name: str, number: int, rows: np.ndarray) -> Values | None:
        path = self.path(name, number)
        if not path.exists():
            return None
        try:
            with np.load(io.BytesIO(path.read_bytes())) as stored:
                seen = stored["seen"] if self.seen else None
                values = Values(stored["rows"], stored["v"], stored["q"], seen)
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # damaged: it is computed again
        return values if np.array_equal(values.rows, rows) else None

    def write(self, name: str, number: int, values: Values) -> None:
        sink = io.BytesIO()
        columns = {name: x for name, x in dataclasses.asdict(values).items() if x is not None}
        np.savez(sink, allow_pickle=False, **columns)
        files.write_atomic(self.path(name, number), sink.getvalue())


def evaluate(
    cfg: Experiment, devices: Devices, datasets: Mapping[str, Dataset], rows: Mapping[str, np.ndarray], shards: Shards
) -> dict[str, Values]:
    """Values of all rows (on the main process only); shards that are on disk are not computed again."""
    parts = {
        (name, number): rows[name][start : start + SHARD_ROWS]
        for name in datasets
        for number, start in enumerate(range(0, len(rows[name]), SHARD_ROWS))
    }
    values = {part: shards.read(*part, parts[part]) for part in parts} if devices.is_main else {}
    missing = devices.from_main(np.asarray([values.get(part) is None for part in parts]))
    todo = [part for part, absent in zip(parts, missing, strict=True) if absent]
    if todo:
        model = inference.load_value(cfg.policy.value_run or cfg, devices=devices, seen=shards.seen)
        spec = SampleSpec(model.transform, num_levels=len(cfg.levels()), image_cache=cfg.image_cache)
        batchers = {name: Batcher([Source(data, rows[name], 0)], spec) for name, data in datasets.items()}
        size = batch_rows(cfg, devices, max(map(len, parts.values())))
        total, left = sum(map(len, parts.values())), sum(len(parts[part]) for part in todo)
        bar = tqdm(total=total, initial=total - left, desc="advantages", unit="frame", disable=not devices.is_main)
        with bar, concurrent.futures.ThreadPoolExecutor(max(1, cfg.num_workers)) as pool:
            for name, number in todo:
                part = parts[name, number]
                values[name, number] = shard = _shard(size, devices, model, batchers[name], part, pool, bar)
                if devices.is_main:
                    shards.write(name, number, shard)
    result = {}
    for name in datasets if devices.is_main else ():
        done = [shard for (of, _), shard in values.items() if of == name and shard is not None]
        columns = [[getattr(x, column) for x in done] for column in ("v", "q", *(("seen",) if shards.seen else ()))]
        result[name] = Values(rows[name], *map(np.concatenate, columns))
    return result


def batch_rows(cfg: Experiment, devices: Devices, most: int) -> int:
    """Rows of a batch of the pass, over all devices: what they hold, and no more than the largest shard needs."""
    wanted = min(_FORWARD * cfg.value.batch_size // cfg.value.grad_accum_steps, most)
    return -(-wanted // devices.count) * devices.count


def _shard(
    size: int,
    devices: Devices,
    model: inference.ValueFunction,
    batcher: Batcher,
    rows: np.ndarray,
    pool: concurrent.futures.Executor,
    bar: tqdm,
) -> Values:
    """Values of the rows of one shard, `size` at a time. Batches are read ahead; results of batch n are fetched while
    n+1 runs.
    """
    v, q = np.zeros(len(rows), np.float32), np.zeros((len(rows), len(model.levels), 2), np.float32)
    seen: list[np.ndarray] = []
    pending: tuple[slice, Any] | None = None
    waited = 0.0

    def fetch() -> None:
        where, out = pending  # pyright: ignore[reportGeneralTypeIssues]
        count = where.stop - where.start
        stop, *judged = jax.device_get(out)
        v[where], q[where] = (x[:count] for x in judged[:2])
        seen.extend(x[:count].astype(np.float16) for x in judged[2:])
        bar.update(count)
        watchdog.progress()
        if stop:
            preemption.raise_stopped(f"in the advantages pass; {bar.n} of {bar.total} frames done")

    for where, batch in _ahead(devices, batcher, rows, size, pool):
        asked = time.perf_counter()
        placed = batch.result()
        waited += time.perf_counter() - asked
        out = model.evaluate(placed, devices.flag())
        if pending is not None:
            fetch()
        pending = where, out
    fetch()
    bar.set_postfix(wait=f"{waited:.2f}s")
    return Values(rows, v, q, np.concatenate(seen) if seen else None)


def _ahead(
    devices: Devices, batcher: Batcher, rows: np.ndarray, size: int, pool: concurrent.futures.Executor, depth: int = 3
) -> Iterator[tuple[slice, concurrent.futures.Future]]:
    """(place in the shard, placed batch to come), `depth` batches under way; the last is filled up by repetition."""
    index, count = devices.place_of_process
    ours = slice(size // count * index, size // count * (index + 1))

    def load(start: int) -> Any:
        whole = np.resize(rows[start : start + size], size)[ours]
        return devices.place_batch(batcher.batch(np.zeros(len(whole), np.int32), whole))

    waiting: deque[tuple[slice, concurrent.futures.Future]] = deque()
    for start in range(0, len(rows), size):
        waiting.append((slice(start, min(start + size, len(rows))), pool.submit(load, start)))
        if len(waiting) >= depth:
            yield waiting.popleft()
    yield from waiting
