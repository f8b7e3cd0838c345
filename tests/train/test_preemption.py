"""Signals only set a flag while they are caught, and are put back afterwards."""

import os
import signal
import threading

import pytest

from hvd.train import preemption


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_signal_sets_the_flag(number):
    before = signal.getsignal(number)
    with preemption.catch():
        assert preemption.requested() is None
        os.kill(os.getpid(), number)
        assert preemption.requested() == number.name
        with preemption.catch():
            assert preemption.requested() == number.name
        assert preemption.requested() == number.name
    assert preemption.requested() is None and signal.getsignal(number) is before


def test_in_another_thread_nothing_is_installed():
    found = []

    def work():
        with preemption.catch():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
