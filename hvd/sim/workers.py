"""Independent jobs in parallel processes, each kept to one thread: the processes are the parallelism."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NPROC": "1",  # XLA's pool of threads on the CPU
    "LP_NUM_THREADS": "1",  # Mesa's rasteriser
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes may share a GPU
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


def run_jobs(function: Callable[..., Any], jobs: Sequence[tuple], workers: int) -> Iterator[tuple[int, Any]]:
    """Yields (number of the job, function(*job)) as jobs finish, in any order.

    With workers <= 1, or a single job, they run in this process; otherwise in spawned ones, and `function` and its
    arguments are pickled. The first error stops what has not begun and is raised.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        for i, job in enumerate(jobs):
            yield i, function(*job)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _prepare, (os.getpid(),))
    try:
        futures = {pool.submit(function, *job): i for i, job in enumerate(jobs)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare(parent: int) -> None:
    """In a fresh worker: one thread, Ctrl-C left to the parent, and no life after the parent's."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ.update(_ONE_THREAD)
    os.environ["XLA_FLAGS"] = f"{flags} {_ONE_THREAD['XLA_FLAGS']}".strip()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(1)
