"""What a signal does: ends the warm-up, sets a flag afterwards; handlers are put back."""

import os
import signal
import threading

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
