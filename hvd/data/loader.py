"""Batches for the trainer: rows chosen by `Order`, numbers gathered without a loop over samples, frames decoded by
threads (FFmpeg releases the interpreter lock), all placed on the devices ahead of the step that needs them.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, Float64, Int

from hvd.data.dataset import Dataset, check_horizon
from hvd.data.frames import Frames
from hvd.data.image_cache import cached_frames
from hvd.data.order import Order
from hvd.data.transforms import InputTransform, resize_with_pad
from hvd.data.transitions import Transitions
from hvd.errors import UserError

_JOB = 4  # frames of a decoding job
Batch = dict[str, Any]
"""Numpy arrays with B rows: observation (hvd.data.transforms.Observation), actions [B,K,action_dim], action_mask [B,K],
source, index [B], weights [B,levels]; in the value stage also reward, discount [B] and next_observation."""


@dataclass(frozen=True)
class Source:
    """One dataset's part of the batches: `share` of its `rows` per global batch; `weights` [rows of the dataset,
    levels] are the policy stage's omega, None = ones; `number` is what a batch's `source` calls it; `told` [rows of the
    dataset] is the number of the text of SampleSpec.texts that stands before a row's prompt, None = the last one."""

    dataset: Dataset
    rows: Int[np.ndarray, " n"]
    share: int
    weights: Float32[np.ndarray, "n_dataset levels"] | None = None
    number: int = 0
    told: Int[np.ndarray, " n_dataset"] | None = None


@dataclass(frozen=True)
class SampleSpec:
    """What a sample is.

    Attributes:
        next_images: what the value stage's next observation shows; "none" leaves reward, discount and the next
            observation out.
        gamma: discount per step.
        image_cache: read frames from a file of resized frames, made on first use.
        texts: what may stand before a prompt; the first one where it is left out.
        drop: share of samples whose text is left out.
    """

    transform: InputTransform
    num_levels: int = 1
    next_images: Literal["none", "true", "current"] = "none"
    gamma: float = 1.0
    image_cache: bool = False
    texts: tuple[str, ...] = ("",)
    drop: float = 0.0

    @property
    def horizon(self) -> int:
        return self.transform.model.action_horizon


def order_of(sources: Sequence[Source], seed: int) -> Order:
    """The order of the rows of these sources."""
    rows, shares = [np.asarray(s.rows, np.int64) for s in sources], [s.share for s in sources]
    return Order(rows, shares, seed, [s.number for s in sources])


class Batcher:
    """Builds batches from (source, row) pairs; `executor` decodes in parallel, None decodes in the calling thread."""

    def __init__(self, sources: Sequence[Source], spec: SampleSpec, executor: Executor | None = None):
        self.sources, self.spec, self._executor = tuple(sources), spec, executor
        datasets = {id(s.dataset): s.dataset for s in sources}
        for dataset in datasets.values():
            check_horizon(dataset.name, dataset.episodes, spec.horizon)
            for name, array in (("state", dataset.state), ("actions", dataset.actions)):
                if array.shape[1] != spec.transform.stats[name].dim:
                    widths = f"{array.shape[1]} dims, its norm stats {spec.transform.stats[name].dim}"
                    raise UserError(f"{dataset.name}: {name} has {widths}: run `hvd norm-stats` for this data")
        tables = {i: Transitions(d, spec.horizon, spec.gamma) for i, d in datasets.items()}
        fixed = not spec.transform.model.spells_state
        # every task behind every text, the tasks of one text together
        spoken = {i: [text + task for text in spec.texts for task in d.tasks] for i, d in datasets.items()}
        tokens = {i: spec.transform.tokenizer.encode(prompts) for i, prompts in spoken.items() if fixed}
        self._spoken = {s.number: spoken[id(s.dataset)] for s in sources}
        self._source = {s.number: s for s in sources}
        self._transitions = {s.number: tables[id(s.dataset)] for s in sources}
        self._tokens = {s.number: tokens[id(s.dataset)] for s in sources if fixed}
        size = spec.transform.model.image_size
        self._frames = {
            (id(d), camera): cached_frames(d, camera, size) if spec.image_cache else d.camera_frames[camera]
            for d in datasets.values()
            for camera in spec.transform.model.cameras
            if camera in d.cameras
        }

    def batch(self, source: Int[np.ndarray, " b"], rows: Int[np.ndarray, " b"]) -> Batch:
        """The batch of these samples."""
        return self.start(source, rows)()

    def start(
        self,
        source: Int[np.ndarray, " b"],
        rows: Int[np.ndarray, " b"],
        chances: Float64[np.ndarray, " b"] | None = None,
    ) -> Callable[[], Batch]:
        """Begin to build a batch; the returned function waits for it. A sample's text is left out where its chance is
        below SampleSpec.drop."""
        spec, transform = self.spec, self.spec.transform
        b, value = len(rows), spec.next_images != "none"
        parts: list[tuple[np.ndarray, Batch]] = []
        next_rows = np.zeros(b, np.int64)
        for i in np.unique(source):
            at = np.flatnonzero(source == i)
            dropped = chances is not None and chances[at] < spec.drop
            part, following = self._numbers(int(i), rows[at], value, dropped)
            parts.append((at, part))
            next_rows[at] = following
        batch = parts[0][1] if len(parts) == 1 else _merge(parts, b)
        batch["source"], batch["index"] = source.astype(np.int32), rows.astype(np.int32)

        pending: list[Future] = []
        for name in ("observation", "next_observation")[: 1 + value]:
            shown = next_rows if name == "next_observation" and spec.next_images == "true" else rows
            images, masks = batch[name]["images"], batch[name]["image_masks"] = {}, {}
            for camera in transform.model.cameras:
                if name == "next_observation" and spec.next_images == "current":
                    images[camera], masks[camera] = (
                        batch["observation"]["images"][camera],
                        batch["observation"]["image_masks"][camera],
                    )
                else:
                    size = transform.model.image_size
                    images[camera], masks[camera] = np.zeros((b, size, size, 3), np.uint8), np.zeros(b, bool)
                    pending += self._start_images(source, shown, camera, images[camera], masks[camera])

        def finish() -> Batch:
            for future in pending:
                future.result()
            return batch

        return finish

    def _numbers(
        self, i: int, rows: np.ndarray, value: bool, dropped: np.ndarray | bool = False
    ) -> tuple[Batch, np.ndarray]:
        """All that is not an image, of rows of one source; and the next rows."""
        source, transitions, transform = self._source[i], self._transitions[i], self.spec.transform
        dataset = source.dataset
        chunk, state = transitions.chunk(rows), dataset.state[rows]
        weights = (
            np.ones((len(rows), self.spec.num_levels), np.float32) if source.weights is None else source.weights[rows]
        )
        batch: Batch = {
            "observation": {"state": transform.state(state), **self._prompts(i, rows, rows, dropped)},
            "actions": transform.actions_in(chunk.actions, state),
            "action_mask": chunk.action_mask,
            "weights": weights,
        }
        if not value:
            return batch, rows
        outcome = transitions.outcome(rows)
        batch["reward"], batch["discount"] = outcome.reward, outcome.discount
        following = outcome.next_row
        batch["next_observation"] = {
            "state": transform.state(dataset.state[following]),
            **self._prompts(i, rows, following),
        }
        return batch, following

    def _prompts(self, i: int, rows: np.ndarray, states: np.ndarray, dropped: np.ndarray | bool = False) -> Batch:
        """The tasks of some rows behind their texts, with the states of others where the prompt holds the state."""
        dataset, told = self._source[i].dataset, self._source[i].told
        text = np.full(len(rows), len(self.spec.texts) - 1) if told is None else told[rows]
        spoken = np.where(dropped, 0, text) * len(dataset.tasks) + dataset.task_ids[rows]
        if i in self._tokens:
            ids, mask = (of_prompt[spoken] for of_prompt in self._tokens[i])
        else:
            ids, mask = self.spec.transform.prompts([self._spoken[i][x] for x in spoken], dataset.state[states])
        return {"tokenized_prompt": ids, "tokenized_prompt_mask": mask}

    def _start_images(
        self, source: np.ndarray, rows: np.ndarray, camera: str, out: np.ndarray, mask: np.ndarray
    ) -> list[Future]:
        """Fill `out` and `mask` where the sample's dataset has the camera, in jobs of a few neighbouring rows."""
        pending: list[Future] = []
        for i in np.unique(source):
            dataset = self._source[int(i)].dataset
            frames = self._frames.get((id(dataset), camera))
            if frames is None:
                continue
            at = np.flatnonzero(source == i)
            mask[at] = True
            at = at[np.argsort(rows[at], kind="stable")]

            def fill(part: np.ndarray, frames: Frames = frames) -> None:
                out[part] = resize_with_pad(frames(rows[part]), out.shape[1], out.shape[2])

            for part in np.array_split(at, -(-len(at) // _JOB)):
                if self._executor is None:
                    fill(part)
                else:
                    pending.append(self._executor.submit(fill, part))
        return pending


def _merge(parts: Sequence[tuple[np.ndarray, Batch]], b: int) -> Batch:
    """Put the rows of several part batches at their places in a batch of b rows."""
    merged: Batch = {}
    for key, first in parts[0][1].items():
        if isinstance(first, dict):
            merged[key] = _merge([(at, part[key]) for at, part in parts], b)
        else:
            out = np.empty((b, *first.shape[1:]), first.dtype)
            for at, part in parts:
                out[at] = part[key]
            merged[key] = out
    return merged


class Loader:
    """Iterates (step, placed batch) from `start_step` on, without end.

    Args:
        batch_size: rows of a global batch, over all processes; the sources' shares add up to it.
        num_workers: decoding threads.
        prefetch: batches placed ahead of the consumer.
        process_index, process_count: this process loads its contiguous slice of each global batch.
        place: puts a batch on the devices; called in the loader's thread.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        spec: SampleSpec,
        batch_size: int,
        seed: int,
        num_workers: int = 4,
        prefetch: int = 2,
        process_index: int = 0,
        process_count: int = 1,
        start_step: int = 0,
        place: Callable[[Batch], Any] = lambda batch: batch,
    ):
        shares = [s.share for s in sources]
        if sum(shares) != batch_size:
            raise UserError(f"the datasets' shares {shares} do not add up to batch_size {batch_size}")
        self.order = order_of(sources, seed)
        self._slice = (process_index, process_count)
        self.order.slice(start_step, *self._slice)
        self._pool = ThreadPoolExecutor(max(1, num_workers), thread_name_prefix="hvd-decode")
        self.batcher = Batcher(sources, spec, self._pool)
        self._place, self._prefetch, self._step = place, max(1, prefetch), start_step
        self._ready: queue.Queue[tuple[int, Any, BaseException | None]] = queue.Queue(self._prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, args=(start_step,), name="hvd-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self

    def __next__(self) -> tuple[int, Any]:
        while not self._stop.is_set():
            try:
                step, batch, error = self._ready.get(timeout=0.2)
            except queue.Empty:
                continue
            if error is not None:
                self.close()
                raise error
            return step, batch
        raise StopIteration

    def close(self) -> None:
        """Stop all threads; waiting batches are dropped."""
        self._stop.set()
        while self._thread.is_alive():
            while not self._ready.empty():
                self._ready.get_nowait()
            self._thread.join(0.05)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _produce(self, step: int) -> None:
        started: deque[tuple[int, Callable[[], Batch]]] = deque()
        try:
            while not self._stop.is_set():
                while len(started) < 2:  # the decoding of the next batch begins before this one is done
                    source, rows = self.order.slice(step, *self._slice)
                    chances = self.order.chances(step, *self._slice) if self.batcher.spec.drop else None
                    started.append((step, self.batcher.start(source, rows, chances)))
                    step += 1
                this, finish = started.popleft()
                self._put((this, self._place(finish()), None))
        except BaseException as error:  # whatever it is, the consumer must learn of it
            self._put((-1, None, error))

    def _put(self, item: tuple[int, Any, BaseException | None]) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
