"""Independent jobs in parallel processes, each kept to one thread: the processes are the parallelism."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from hvd.errors import Failed
from hvd.pools import spawn_pool

MAX_DEATHS = 3  # of workers in one run_jobs

_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NPROC": "1",  # XLA's pool of threads on the CPU
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes may share a GPU
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


def run_jobs(function: Callable[..., Any], jobs: Sequence[tuple], workers: int) -> Iterator[tuple[int, Any]]:
    """Yields (number of the job, function(*job)) as jobs finish, in any order.

    With workers <= 1, or a single job, they run in this process; otherwise in spawned ones, and `function` and its
    arguments are pickled. The first error stops what has not begun and is raised. When a worker dies (a crash in a
    native library, such as a graphics driver's), the jobs without a result are done again in new ones, so a job must
    give the same when it is done twice.

    Raises:
        Failed: workers died more than MAX_DEATHS times.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        for i, job in enumerate(jobs):
            yield i, function(*job)
        return
    left, deaths = dict(enumerate(jobs)), 0
    while left:
        for i, result in _run_in_pool(function, left, min(workers, len(left))):
            del left[i]
            yield i, result
        if left:
            deaths += 1
            why = "a worker process died (a crash in a native library, or no memory left)"
            if deaths > MAX_DEATHS:
                raise Failed(f"{why}, {deaths} times; {len(left)} of {len(jobs)} jobs are not done")
            print(f"{why}; what it had begun is done again, {len(left)} jobs left", file=sys.stderr, flush=True)


def _run_in_pool(function: Callable[..., Any], jobs: dict[int, tuple], workers: int) -> Iterator[tuple[int, Any]]:
    """The results of the jobs that finish before a worker dies, or of all."""
    pool = spawn_pool(workers, _one_thread)
    try:
        futures = {}
        with contextlib.suppress(BrokenProcessPool):  # a worker died while jobs were still being handed out
            for i, job in jobs.items():
                futures[pool.submit(function, *job)] = i
        for future in as_completed(futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ.update(_ONE_THREAD)
    os.environ["XLA_FLAGS"] = f"{flags} {_ONE_THREAD['XLA_FLAGS']}".strip()
