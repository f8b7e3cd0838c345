"""The advantages pass: V, Q_i, A_i, omega_i once for every frame that the policy run visits. `hvd advantages`.

The value model is frozen by now, so the policy stage needs no value network. Rows go through all devices of all
processes in shards; a finished shard is a file, and a pass that was stopped goes on after the last one. V and Q are
keyed by the value checkpoint, the datasets and the rows; a table whose key is the present one is used as it is.
"""

import concurrent.futures
import io
import time
import zipfile
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from hvd import files
from hvd.configs import Experiment
from hvd.data import normalize
from hvd.data.dataset import Dataset, split_episodes
from hvd.data.loader import Batcher, SampleSpec, Source
from hvd.errors import UserError
from hvd.method import advantage_table
from hvd.method.advantage_table import Values
from hvd.runtime import preemption, watchdog
from hvd.train import complete, inference, mesh, stage_data
from hvd.train import run_dir as runs
from hvd.train.complete import Complete
from hvd.train.mesh import Devices

SHARD_ROWS = 2048  # a stopped pass repeats at most so many rows
_FORWARD = 4  # times a training step's rows: without gradients there is room, and small batches leave devices idle


def main(cfg: Experiment) -> None:
    """Make the table of the experiment, unless it is there."""
    with preemption.catch():
        if cfg.policy.weighting == "none":
            print("policy.weighting none: imitation needs no advantages", flush=True)
            return
        value = complete.check_complete(cfg.value_dir, stage="value", cfg=cfg)
        devices = mesh.start(cfg)
        datasets = {role: stage_data.open_dataset(cfg, role) for role in weighted_roles(cfg)}
        ensure(cfg, devices, value, datasets)


def weighted_roles(cfg: Experiment) -> tuple[str, ...]:
    """The datasets whose rows the policy run weighs: the suboptimal one; the optimal one where there is no other."""
    return ("suboptimal",) if "suboptimal" in runs.roles(cfg, "policy") else ("optimal",)


def ensure(cfg: Experiment, devices: Devices, value: Complete, datasets: dict[str, Dataset]) -> None:
    """Compute what is missing of the table of `datasets` and write it. All processes call it together."""
    if value.inputs["norm_stats"] != stage_data.stats_digest(normalize.load_shared(cfg)):
        raise UserError(f"the norm stats changed since {cfg.value_dir} was trained: train the value run again")
    folder = epath.Path(cfg.advantages_dir)
    rows = {role: data.rows() for role, data in datasets.items()}
    key = advantage_table.key(value.digest, datasets, rows)
    meta = {"key": key, "value_digest": value.digest, "datasets": {role: d.digest for role, d in datasets.items()}}
    known = advantage_table.read_meta(folder) or {}
    wanted = {**meta, **advantage_table.weighting(cfg)}
    if devices.from_main(np.asarray(all(known.get(name) == content for name, content in wanted.items()))):
        if devices.is_main:
            print(f"{folder}: up to date, {known['rows']} frames", flush=True)
        return
    with preemption.deferred(), watchdog.watch(cfg.hang_timeout):
        values = _evaluate(cfg, devices, datasets, rows, _Shards(folder / "shards" / key[:16]))
    if devices.is_main:
        splits = {role: split_episodes(d, cfg.evaluate.val_fraction, cfg.seed)[1] for role, d in datasets.items()}
        advantage_table.write(folder, cfg, datasets, values, splits, meta)
        _print_summary(folder, cfg)
    devices.barrier("advantages")


def _print_summary(folder: epath.Path, cfg: Experiment) -> None:
    table = advantage_table.read(folder)
    print(f"{folder / advantage_table.PARQUET}: {table.num_rows} frames", flush=True)
    for i, name in enumerate(cfg.level_names()):
        a, omega = table[f"A_{i}"].to_numpy(), table[f"omega_{i}"].to_numpy()
        low, middle, high = np.quantile(omega, [0.05, 0.5, 0.95])
        print(
            f"  {name}: A {a.mean():+.3f} +- {a.std():.3f}, weights 5/50/95 % {low:.3f} {middle:.3f} {high:.3f}",
            flush=True,
        )


class _Shards:
    """Finished parts of a pass: <role>-<number>.npz with row, v, q."""

    def __init__(self, folder: epath.Path):
        self._folder = folder

    def path(self, role: str, number: int) -> epath.Path:
        return self._folder / f"{role}-{number:06d}.npz"

    def read(self, role: str, number: int, rows: np.ndarray) -> Values | None:
        path = self.path(role, number)
        if not path.exists():
            return None
        try:
            with np.load(io.BytesIO(path.read_bytes())) as stored:
                found = Values(stored["rows"], stored["v"], stored["q"])
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # damaged: it is computed again
        return found if np.array_equal(found.rows, rows) else None

    def write(self, role: str, number: int, values: Values) -> None:
        sink = io.BytesIO()
        np.savez(sink, rows=values.rows, v=values.v, q=values.q)
        files.write_atomic(self.path(role, number), sink.getvalue())


def _evaluate(
    cfg: Experiment, devices: Devices, datasets: dict[str, Dataset], rows: dict[str, np.ndarray], shards: _Shards
) -> dict[str, Values]:
    """Values of all rows (complete on the main process only); shards that are on disk are not computed again."""
    parts = {
        (role, number): rows[role][start : start + SHARD_ROWS]
        for role in datasets
        for number, start in enumerate(range(0, len(rows[role]), SHARD_ROWS))
    }
    found = {name: shards.read(*name, part) for name, part in parts.items()} if devices.is_main else {}
    missing = devices.from_main(np.asarray([found.get(name) is None for name in parts]))
    todo = [name for name, absent in zip(parts, missing, strict=True) if absent]
    if todo:
        model = inference.load_value(cfg, devices=devices)
        spec = SampleSpec(model.transform, num_levels=len(cfg.levels()), image_cache=cfg.image_cache)
        batchers = {role: Batcher([Source(data, rows[role], 0)], spec) for role, data in datasets.items()}
        size = _batch_rows(cfg, devices, max(map(len, parts.values())))
        total, left = sum(map(len, parts.values())), sum(len(parts[name]) for name in todo)
        with (
            tqdm(
                total=total, initial=total - left, desc="advantages", unit="frame", disable=not devices.is_main
            ) as bar,
            concurrent.futures.ThreadPoolExecutor(max(1, cfg.num_workers)) as pool,
        ):
            for role, number in todo:
                part = parts[role, number]
                found[role, number] = values = _shard(size, devices, model, batchers[role], part, pool, bar)
                if devices.is_main:
                    shards.write(role, number, values)
    result = {}
    for role in datasets if devices.is_main else ():
        own = [values for (of, _), values in found.items() if of == role and values is not None]
        result[role] = Values(rows[role], np.concatenate([x.v for x in own]), np.concatenate([x.q for x in own]))
    return result


def _batch_rows(cfg: Experiment, devices: Devices, most: int) -> int:
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
    pending: tuple[slice, Any] | None = None
    waited = 0.0

    def fetch() -> None:
        where, out = pending  # pyright: ignore[reportGeneralTypeIssues]
        count = where.stop - where.start
        got_v, got_q, stop = jax.device_get(out)
        v[where], q[where] = got_v[:count], got_q[:count]
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
    return Values(rows, v, q)


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
