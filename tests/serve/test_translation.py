"""The BEHAVIOR challenge's evaluator at a server: its keys, its resets, and the answers that it executes."""

import numpy as np
import pytest

from hvd.serve.observation import Refused
from hvd.serve.translation import CHUNK, NoReply, Translation
from tests.serve.running import GOOD, OPENPI_CLIENT, STATE, wait_for

pytestmark = OPENPI_CLIENT

EVALUATOR = Translation({"robot_r1::proprio": "state"}, others=True, single=True)


def test_the_evaluator_gets_what_it_executes(run):
    client = run(translation=EVALUATOR).client()
    asked = {"robot_r1::proprio": STATE + 1, "robot_r1::depth": np.zeros((2, 2)), CHUNK: 3}
    reply = client.infer(asked)
    assert reply["action_chunk"].shape == (3, 21) and reply["actions"].shape == (4, 21)
    np.testing.assert_array_equal(reply["action"], reply["action_chunk"][0])
    np.testing.assert_array_equal(reply["action"], reply["actions"][0])
    reply = client.infer({"robot_r1::proprio": np.stack([STATE, STATE + 1])})  # of two worlds
    assert reply["action"].shape == (2, 21) and "action_chunk" not in reply


def test_a_reset_has_no_reply(run):
    server = run(translation=EVALUATOR)
    client = server.client()
    client._ws.send(client._packer.pack({"reset": True}))
    assert client.infer(GOOD)["actions"][0, 0] == STATE[0]  # the reply to this one, and to no other
    wait_for(lambda: server.count("answered") == 1)
    assert server.count("refused") == 0


def test_others_get_what_they_always_got(run):
    client = run().client()
    assert {"action", "action_chunk"}.isdisjoint(client.infer(GOOD))
    with pytest.raises(RuntimeError, match="unknown key 'depth'"):
        client.infer(GOOD | {"depth": 1})
    with pytest.raises(RuntimeError, match=f"{CHUNK} is 5; expected a whole number from 0 to 4"):
        client.infer(GOOD | {CHUNK: 5})


@pytest.mark.parametrize("value", [-1, 1.5, True, "all"])
def test_a_chunk_s_size_is_a_number(value):
    with pytest.raises(Refused, match=f"{CHUNK} is"):
        EVALUATOR.request({"state": STATE, CHUNK: value}, ("state",), 4)


def test_two_keys_for_the_same():
    with pytest.raises(Refused, match="both mean 'state'"):
        EVALUATOR.request({"state": STATE, "robot_r1::proprio": STATE}, ("state",), 4)


def test_only_a_reset_alone_is_one():
    with pytest.raises(NoReply):
        Translation().request({"reset": True}, (), 4)
    assert Translation().request({"reset": True, "state": 1}, (), 4) == ({"reset": True, "state": 1}, 0)
    assert Translation().request([1], (), 4) == ([1], 0)
