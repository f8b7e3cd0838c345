"""One thread that owns the model: requests that wait at the same time are answered as one batch."""

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from hvd.serve.limits import Sparingly
from hvd.serve.metrics import Metrics
from hvd.serve.observation import Refused, Request
from hvd.serve.turns import Shares, Turn

_BROKEN_AFTER = 3  # batches that failed one after another
_LONG = 2  # times the usual flow steps: requests above it take at most a third of the time while others ask
_ASKED_S = 1.0  # "while others ask": one came in this time


@runtime_checkable
class Sample(Protocol):
    """hvd.serve.sampler.Sampler, or a stand-in of it."""

    @property
    def max_rows(self) -> int: ...
    def size_for(self, rows: int) -> int: ...
    def __call__(self, requests: Sequence[Request]) -> list[Float32[np.ndarray, "b k a"]]: ...


@dataclasses.dataclass(frozen=True)
class Answer:
    """Raw absolute actions, and the seconds that the request waited and the model took for its batch of `rows`."""

    actions: Float32[np.ndarray, "b k a"]
    waited: float
    inference: float
    rows: int


class Late(Exception):
    """The answer would come after the request's deadline. `waited`: seconds."""

    def __init__(self, waited: float):
        super().__init__(f"too late: it waited {waited:.3f} s")
        self.waited = waited


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    request: Request
    future: "concurrent.futures.Future[Answer]"
    wanted: Callable[[], bool]
    since: float
    turn: Turn
    long: bool
    until: float  # when the answer is no longer of use


class Batcher:
    """Answers requests: one client's in the order they came, those of several clients in fair shares of work.

    A request's work is its rows x flow steps (hvd.serve.turns.Shares). A batch is what waits when the model becomes
    free, as far as it has the same number of flow steps and fits. Long requests wait for two thirds of the time while
    others come.

    Args:
        max_wait: seconds that a request may wait for others to join its batch; 0 = it never waits for that.
        usual: flow steps of a usual request.
    """

    def __init__(self, sample: Sample, metrics: Metrics, *, max_wait: float = 0.0, usual: int = 10):
        self._sample, self._metrics, self._max_wait, self._usual = sample, metrics, max_wait, usual
        self._jobs: list[_Job] = []
        self._shares = Shares()
        self._short_at = self._long_at = 0.0  # when the last one that is not long came; when a long one may be next
        self._seconds: dict[Hashable, float] = {}  # kind of request -> what its last batch took
        self._log = Sparingly()
        self._changed = threading.Condition()
        self._stopping = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="hvd-serve-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    @property
    def healthy(self) -> bool:
        """False once the thread has ended, or when batch after batch fails."""
        return self._thread.is_alive() and self._failures < _BROKEN_AFTER

    def submit(
        self,
        request: Request,
        wanted: Callable[[], bool],
        *,
        client: Hashable = None,
        share: int = 1,
        arrived: float | None = None,
    ) -> "concurrent.futures.Future[Answer]":
        """The future answer. A request that is no longer `wanted` when its turn comes is cancelled instead.

        The future raises `Refused` when the answer would not be finite, `Late` when it would come after the request's
        deadline, which counts from `arrived` (time.monotonic(); now).

        Args:
            client: whose request it is.
            share: clients that share what one of them gets elsewhere.
        """
        now, work = time.monotonic(), request.rows * request.num_flow_steps
        long = request.num_flow_steps > _LONG * self._usual or work > self._sample.max_rows * self._usual
        with self._changed:
            if self._stopping or not self._thread.is_alive():
                raise Refused("the server is stopping")
            turn = self._shares.turn(client, work, share)
            if not long:
                self._short_at = now
            until = (now if arrived is None else arrived) + request.deadline
            job = _Job(request, concurrent.futures.Future(), wanted, now, turn, long, until)
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    def stop(self, timeout: float) -> None:
        """Answer what waits and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while jobs := self._take():
                try:
                    self._answer(jobs)
                except Exception as error:
                    self._failures += 1
                    self._log.failure(error)
                    for job in jobs:
                        if not job.future.done():
                            job.future.set_exception(error)
                else:
                    self._failures = 0
        finally:
            with self._changed:  # so that no caller waits for a thread that has ended
                self._stopping = True
                for job in self._jobs:
                    job.future.cancel()

    def _take(self) -> list[_Job]:
        """The next batch, its futures running; [] to end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._stopping)
                if not self._jobs:
                    return []
                until = self._jobs[0].since + self._max_wait
                while (left := until - time.monotonic()) > 0 and not self._stopping and not self._full():
                    self._changed.wait(left)
                chosen = self._choose()
                if not chosen:
                    self._changed.wait(self._long_at - time.monotonic())
            wanted = [job for job in chosen if self._claim(job)]
            if wanted:
                return wanted

    def _full(self) -> bool:
        return sum(job.request.rows for job in self._jobs) >= self._sample.max_rows

    def _choose(self) -> list[_Job]:
        """The job that is next, and others that go with it, in order; they leave the queue. [] while long ones wait."""
        held = time.monotonic() < self._long_at and not self._stopping
        ready = sorted((job for job in self._jobs if not (job.long and held)), key=lambda job: job.turn)
        chosen: list[_Job] = []
        rows = 0
        for job in ready:
            goes_with = job.request.kind == ready[0].request.kind and job.long <= ready[0].long
            if goes_with and rows + job.request.rows <= self._sample.max_rows:
                chosen.append(job)
                rows += job.request.rows
        if chosen:
            self._shares.began(chosen[0].turn)
            self._jobs = [job for job in self._jobs if job not in set(chosen)]
        return chosen

    def _claim(self, job: _Job) -> bool:
        if not job.wanted():
            job.future.cancel()
        if not job.future.set_running_or_notify_cancel():
            return False
        now = time.monotonic()
        if now + self._seconds.get(job.request.kind, 0.0) <= job.until:
            return True
        job.future.set_exception(Late(now - job.since))  # its place is better given to others
        if now <= job.until:  # a batch that once took long must not refuse for ever
            self._seconds[job.request.kind] /= 2
        return False

    def _answer(self, jobs: list[_Job]) -> None:
        requests = [job.request for job in jobs]
        rows = sum(request.rows for request in requests)
        begin = time.monotonic()
        found = self._sample(requests)
        end = time.monotonic()
        seconds = self._seconds[requests[0].kind] = end - begin
        if jobs[0].long and end - self._short_at < _ASKED_S:
            self._long_at = end + 2 * seconds
        self._metrics.batch(self._sample.size_for(rows), rows, seconds)
        for job, actions in zip(jobs, found, strict=True):
            if np.isfinite(actions).all():
                job.future.set_result(Answer(actions, begin - job.since, seconds, rows))
            else:
                text = "the policy's actions are not finite for this observation: is it far from the training data?"
                job.future.set_exception(Refused(text))
