"""Requests with a deadline, at a server whose model is busy (hvd.serve.batching has the rule)."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serve.running import GOOD, OPENPI_CLIENT, wait_for
from tests.served import get

pytestmark = OPENPI_CLIENT


def test_a_request_that_is_too_late_is_said_to_be(run, model):
    model.seconds = 0.4
    server = run()
    client = server.client()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.client().infer, GOOD)
        assert model.started.acquire(timeout=10)
        late = client.infer(GOOD | {"deadline_ms": 100})
        assert late["late"] is True and "actions" not in late and late["server_timing"]["wait_ms"] >= 100
        assert "actions" in first.result(30)
    wait_for(lambda: server.count("late") == 1)
    assert model.answered == 1
    assert 'hvd_serve_requests_total{outcome="late"} 1' in get(server.port, "/metrics")[1]
    assert "actions" in client.infer(GOOD | {"deadline_ms": 60_000})


@pytest.mark.parametrize("value", [0, -5, 1.5, "soon", 10**9, True])
def test_a_deadline_is_a_number_of_milliseconds(run, value):
    with pytest.raises(RuntimeError, match=r"deadline_ms is .*; expected a whole number from 1 to 3600000"):
        run().client().infer(GOOD | {"deadline_ms": value})
