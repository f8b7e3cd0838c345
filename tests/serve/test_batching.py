"""The model's thread: what is computed together, in which order, and what happens to what nobody wants any more."""

import dataclasses
import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest

from hvd.serve.batching import Batcher, Late
from hvd.serve.metrics import Metrics
from hvd.serve.observation import Refused, Request


def request(number: float = 0.0, rows: int = 1, steps: int = 10) -> Request:
    return Request({}, np.full((rows, 2), number, np.float32), np.zeros(rows, np.uint32), None, steps, rows > 1)


class Fake:
    """Doubles the state; waits at a gate, so that a test decides what waits meanwhile."""

    def __init__(self, max_rows: int = 4):
        self.max_rows, self.batches, self.gate = max_rows, [], threading.Event()
        self.entered = threading.Semaphore(0)

    def size_for(self, rows):
        return 1 << (rows - 1).bit_length()

    def __call__(self, requests):
        self.entered.release()
        assert self.gate.wait(30)
        self.batches.append([float(r.state[0, 0]) for r in requests])
        if any(r.state[0, 0] == 13 for r in requests):
            raise MemoryError("no room")
        return [2 * r.state[:, None] for r in requests]


@pytest.fixture
def fake():
    return Fake()


@pytest.fixture
def batcher(fake):
    made = Batcher(fake, Metrics())
    yield made
    fake.gate.set()
    made.stop(30)


def yes():
    return True


def held(fake, batcher):
    """The first request is being computed; what comes now waits."""
    first = batcher.submit(request(100.0), yes)
    assert fake.entered.acquire(timeout=30)
    return first


def test_what_waits_is_computed_together_in_order(fake, batcher):
    first = held(fake, batcher)
    futures = [batcher.submit(request(float(i)), yes) for i in range(6)]
    assert batcher.waiting == 6
    fake.gate.set()
    for i, future in enumerate(futures):
        answer = future.result(30)
        np.testing.assert_array_equal(answer.actions, np.full((1, 1, 2), 2.0 * i))
        assert answer.waited >= 0 and answer.rows == (4 if i < 4 else 2)
    assert first.result(30).rows == 1
    assert fake.batches == [[100], [0, 1, 2, 3], [4, 5]]


def test_rows_of_batched_requests_count(fake, batcher):
    held(fake, batcher)
    futures = [batcher.submit(request(float(i), rows), yes) for i, rows in enumerate((3, 2, 1, 4))]
    fake.gate.set()
    assert [future.result(30).actions.shape[0] for future in futures] == [3, 2, 1, 4]
    assert fake.batches == [[100], [0, 2], [1], [3]]


def test_other_flow_steps_are_another_batch(fake, batcher):
    held(fake, batcher)
    futures = [batcher.submit(request(float(i), steps=steps), yes) for i, steps in enumerate((10, 5, 10, 5))]
    fake.gate.set()
    for future in futures:
        future.result(30)
    assert fake.batches == [[100], [0, 2], [1, 3]]


def test_a_client_with_many_requests_does_not_keep_the_others_waiting():
    fake = Fake(max_rows=1)
    batcher = Batcher(fake, Metrics())
    held(fake, batcher)
    futures = [batcher.submit(request(float(i)), yes, client="a") for i in range(3)]
    futures += [batcher.submit(request(10.0 + i), yes, client="b") for i in range(2)]
    futures += [batcher.submit(request(20.0 + i), yes, client=f"c{i}", share=3) for i in range(3)]
    futures += [batcher.submit(request(30.0), yes, client="c0", share=3)]
    fake.gate.set()
    for future in futures:
        future.result(30)
    batcher.stop(30)
    assert fake.batches == [[100], [0], [10], [20], [21], [22], [1], [11], [2], [30]]


def until(seconds: float, number: float = 0.0) -> Request:
    return dataclasses.replace(request(number), deadline=seconds)


def test_a_request_whose_deadline_is_over_is_not_computed(fake, batcher):
    held(fake, batcher)
    late, patient, other = (batcher.submit(until(s, i), yes) for i, s in enumerate((0.05, 60.0, 60.0)))
    early = batcher.submit(until(1.0, 7.0), yes, arrived=time.monotonic() - 2.0)  # it was long on its way to here
    time.sleep(0.1)
    fake.gate.set()
    assert patient.result(30).rows == other.result(30).rows == 2 and fake.batches == [[100], [1, 2]]
    for future in (late, early):
        with pytest.raises(Late) as told:
            future.result(30)
    assert told.value.waited >= 0.1


def test_what_a_batch_takes_counts_but_one_that_took_long_does_not_refuse_for_ever(fake, batcher):
    held(fake, batcher)
    time.sleep(0.4)
    fake.gate.set()
    while batcher._seconds.get(request().kind, 0.0) < 0.4:
        time.sleep(0.01)
    ends = [batcher.submit(until(0.15), yes).exception(30) for _ in range(4)]
    assert isinstance(ends[0], Late) and ends[-1] is None


def test_long_requests_leave_the_others_most_of_the_time():
    """Six clients ask for 100 flow steps each, all the time; another one's usual requests hardly notice."""
    done, slow = threading.Event(), []

    class Slow(Fake):
        def __call__(self, requests):
            time.sleep(0.001 * requests[0].num_flow_steps)
            return [2 * r.state[:, None] for r in requests]

    batcher = Batcher(Slow(), Metrics())

    def ask(client):
        while not done.is_set():
            batcher.submit(request(steps=100 - client), yes, client=client).result(30)
            slow.append(client)

    threads = [threading.Thread(target=ask, args=(client,)) for client in range(6)]
    for thread in threads:
        thread.start()
    waited = []
    for _ in range(40):
        time.sleep(0.02)
        begin = time.monotonic()
        batcher.submit(request(), yes, client="polite").result(30)
        waited.append(time.monotonic() - begin)
    done.set()
    for thread in threads:
        thread.join()
    batcher.stop(30)
    assert np.median(waited) < 0.03 and len(slow) > 6, (np.median(waited), len(slow))


def test_what_nobody_wants_is_not_computed(fake, batcher):
    held(fake, batcher)
    gone = batcher.submit(request(1.0), lambda: False)
    stays = batcher.submit(request(2.0), yes)
    fake.gate.set()
    assert stays.result(30).rows == 1
    with pytest.raises(CancelledError):
        gone.result(30)
    assert fake.batches == [[100], [2]]


def test_a_failure_is_that_batch_s_alone(fake, batcher, capfd):
    fake.gate.set()
    for _ in range(2):
        with pytest.raises(MemoryError):
            batcher.submit(request(13.0), yes).result(30)
    assert batcher.healthy
    assert batcher.submit(request(1.0), yes).result(30).rows == 1
    for _ in range(3):
        with pytest.raises(MemoryError):
            batcher.submit(request(13.0), yes).result(30)
    assert not batcher.healthy
    batcher.submit(request(1.0), yes).result(30)
    assert batcher.healthy
    assert "no room" in capfd.readouterr().err


def test_actions_that_are_not_finite_are_refused(fake, batcher):
    first = held(fake, batcher)
    bad, good = batcher.submit(request(np.inf), yes), batcher.submit(request(1.0), yes)
    fake.gate.set()
    assert good.result(30).rows == first.result(30).rows + 1 == 2
    with pytest.raises(Refused, match="not finite"):
        bad.result(30)


def test_stopping_answers_what_waits_and_takes_no_more(fake, batcher):
    held(fake, batcher)
    future = batcher.submit(request(1.0), yes)
    fake.gate.set()
    batcher.stop(30)
    assert future.result(0).rows == 1 and not batcher.healthy
    with pytest.raises(Refused, match="stopping"):
        batcher.submit(request(2.0), yes)


def test_a_request_waits_for_others_at_most_max_wait(fake):
    fake.gate.set()
    batcher = Batcher(fake, Metrics(), max_wait=0.3)
    begin = time.monotonic()
    alone = batcher.submit(request(0.0), yes)
    time.sleep(0.05)
    joined = batcher.submit(request(1.0), yes)
    assert alone.result(30).rows == joined.result(30).rows == 2
    assert 0.25 < time.monotonic() - begin < 5
    full = [batcher.submit(request(2.0), yes) for _ in range(4)]
    begin = time.monotonic()
    assert all(future.result(30).rows == 4 for future in full) and time.monotonic() - begin < 0.25
    batcher.stop(30)


def test_metrics_as_a_line_and_as_prometheus_text():
    metrics = Metrics()
    assert "requests: none" in metrics.line() and "latency -" in metrics.line()
    for i in range(100):
        metrics.request("answered", 0.001 * (i + 1))
    metrics.request("refused", 9.0)
    metrics.batch(4, 3, 0.02)
    line = metrics.line(whole=True)
    assert "100 answered, 1 refused" in line and "p50 50.5 ms p99 99.0 ms" in line and "4x1" in line
    text = metrics.prometheus(ready=True, waiting=2)
    samples = {}
    for row in text.splitlines():
        if not row.startswith("#"):
            name, value = row.rsplit(" ", 1)
            samples[name] = float(value)
    assert samples['hvd_serve_requests_total{outcome="answered"}'] == 100
    assert samples['hvd_serve_requests_total{outcome="refused"}'] == 1
    assert samples['hvd_serve_batches_total{size="4"}'] == 1 and samples["hvd_serve_rows_total"] == 3
    assert samples['hvd_serve_request_seconds{quantile="0.99"}'] == pytest.approx(0.09901)
    assert samples["hvd_serve_request_seconds_count"] == 100
    assert samples["hvd_serve_request_seconds_sum"] == pytest.approx(5.05)
    assert samples["hvd_serve_ready"] == 1 and samples["hvd_serve_waiting"] == 2
    named = {row.split()[2] for row in text.splitlines() if row.startswith("# TYPE")}
    for name in samples:
        base = name.partition("{")[0]
        assert base in named or base.removesuffix("_sum").removesuffix("_count") in named
