"""A pool's workers end with their parent, and with the pool when one of them dies."""

import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from hvd.pools import spawn_pool


def _die(number: int) -> int:
    if number == 0:
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_broken_pool_ends_though_workers_ignore_signals():
    with spawn_pool(2) as pool:
        futures = [pool.submit(_die, number) for number in range(3)]
        with pytest.raises(BrokenProcessPool):
            futures[0].result(timeout=60)
