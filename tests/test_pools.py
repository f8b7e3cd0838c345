"""A pool's workers end with their parent, and with the pool when one of them dies."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from hvd.pools import Isolated, spawn_pool


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


def test_a_script_without_a_guard_is_not_run_again(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from hvd.pools import Isolated\nprint('once')\nwith Isolated() as call:\n    print(call(abs, -7))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "once\n7\n" and not done.stderr


def test_a_call_that_kills_its_process_costs_itself():
    with Isolated() as isolated:
        assert isolated(abs, -1) == 1
        with pytest.raises(BrokenProcessPool):
            isolated(os.abort)
        assert isolated(abs, -2) == 2
        child = isolated(os.getpid)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
