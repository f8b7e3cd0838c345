"""What a signal does: ends the warm-up, sets a flag afterwards; handlers are put back."""

import gc
import os
import signal
import threading
import time

import jax
import pytest

from hvd.errors import Stopped
from hvd.runtime import preemption


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_deferred_signal_sets_the_flag(number):
    before = signal.getsignal(number)
    with preemption.catch(), preemption.deferred():
        assert preemption.requested() is None
        os.kill(os.getpid(), number)
        assert preemption.requested() == number.name
        with preemption.catch():
            assert preemption.requested() == number.name
        assert preemption.requested() == number.name
    assert preemption.requested() is None and signal.getsignal(number) is before


def test_signal_in_the_warm_up_stops_at_once():
    with pytest.raises(Stopped, match="by SIGTERM before the first step"), preemption.catch():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("not reached")


def test_a_signal_in_a_library_s_part_of_a_garbage_collection_is_not_lost():
    assert jax and "_xla_gc_callback" in [each.__name__ for each in gc.callbacks]

    def callback(phase: str, info: dict):
        if phase == "start":
            (lambda: os.kill(os.getpid(), signal.SIGTERM))()

    gc.callbacks.insert(0, callback)
    try:
        with pytest.raises(Stopped, match="by SIGTERM before the first step"), preemption.catch():
            gc.collect()
            time.sleep(10)
            pytest.fail("not woken")
    finally:
        gc.callbacks.remove(callback)


def test_one_of_several_processes_waits_for_the_others(monkeypatch):
    monkeypatch.setenv("HVD_NUM_PROCESSES", "2")
    with preemption.catch():
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested() == "SIGTERM"


def test_in_another_thread_nothing_is_installed():
    found = []

    def work():
        with preemption.catch():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
