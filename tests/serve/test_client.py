"""hvd.client with a clock of its own: which action is executed when, what the server is told, and the limits."""

import subprocess
import sys
import threading
from concurrent import futures

import numpy as np
import pytest

from hvd.client import Client, Limits
from hvd.errors import UserError

K = 8


class World:
    """A server whose n-th chunk is 100 n + 0, 1, 2, ... in each dim, and a clock that only sleeping moves."""

    def __init__(self, delay: float, dims: int = 2, about=None, **options):
        self.now, self.delay, self.asked, self.messages = 0.0, delay, 0.0, []
        self.gate, self.dims = threading.Semaphore(1), dims  # the first answer is there at once
        self.client = Client(self.ask, about, clock=lambda: self.now, sleep=self.sleep, **options)

    def ask(self, message):
        if message.get("bad"):
            raise UserError("no such thing")
        self.asked = self.now
        self.messages.append(message)
        count = len(self.messages) - 1
        assert self.gate.acquire(timeout=30)
        return {"actions": np.tile(100.0 * count + np.arange(K)[:, None], (1, self.dims))}

    def sleep(self, seconds: float):
        self.now += seconds
        waits = self.client._asked
        if waits is not None and self.now >= waits[1] + self.delay - 1e-9:
            self.gate.release()
            futures.wait([waits[0]])

    def run(self, ticks: int):
        return [self.client.next(lambda: {"state": np.zeros(2)}).tolist()[0] for _ in range(ticks)]


def test_what_is_over_of_a_chunk_is_skipped():
    world = World(0.2, every=4)
    # asked at tick 4, there at tick 6: the new chunk's first action belonged to tick 4
    assert world.run(8) == [0, 1, 2, 3, 4, 5, 102, 103]
    assert (world.client.late, world.client.missed, world.client.limited) == (0, 0, 0)
    assert "inference_delay" not in world.messages[1]


def test_real_time_chunking_is_told_what_is_left():
    world = World(0.2, every=4, about={"real_time_chunking": True})
    world.run(12)
    assert "prev_chunk_left_over" not in world.messages[0]
    second, third = world.messages[1:3]
    assert second["prev_chunk_left_over"][:, 0].tolist() == [4, 5, 6, 7] and second["inference_delay"] == 0
    assert third["prev_chunk_left_over"][:, 0].tolist() == [104, 105, 106, 107]
    assert third["inference_delay"] == 2


def test_no_delay_is_negative(monkeypatch):
    """The answer is there before the client's own thread goes on, half a second later."""
    world = World(0.0, every=4, about={"real_time_chunking": True})

    def submit(self, do, message):
        answer: futures.Future = futures.Future()
        answer.set_result(do(message))
        world.gate.release()
        world.now += 0.5
        return answer

    monkeypatch.setattr(futures.ThreadPoolExecutor, "submit", submit)
    world.run(6)
    assert world.messages[1]["inference_delay"] == 0


def test_an_answer_is_of_use_until_the_old_chunk_is_over():
    world = World(0.2, every=4, about={"deadlines": True})
    world.run(8)
    assert "deadline_ms" not in world.messages[0] and world.messages[1]["deadline_ms"] == 400  # 4 of 8 actions are left
    other = World(0.2, every=4)  # openpi's servers know no such key
    other.run(8)
    assert len(other.messages) == 2 and "deadline_ms" not in other.messages[1]


def test_what_the_server_did_not_answer_in_time_is_asked_again():
    world = World(0.2, every=4)
    answer = world.client._ask

    def ask(message):
        found = answer(message)
        return {"late": True} if len(world.messages) == 2 else found

    world.client._ask = ask
    # asked at tick 4, refused at tick 6, asked again there, answered at tick 8: the old chunk's last action is 7
    assert world.run(10) == [0, 1, 2, 3, 4, 5, 6, 7, 202, 203]
    assert (world.client.too_late, world.client.late) == (1, 0)


def test_a_closed_client_has_no_question_on_its_way():
    world = World(0.2, every=4)
    world.run(5)
    assert world.client._asked is not None
    done = []
    closing = threading.Thread(target=lambda: done.append(world.client.close()))
    closing.start()
    closing.join(0.1)
    assert closing.is_alive() and not done
    world.gate.release()
    closing.join(30)
    assert done == [None] and not any(thread.is_alive() for thread in world.client._threads._threads)


def test_late_answers_hold_the_last_action_with_velocities_zero():
    world = World(1.0, dims=21, every=4, about={"robot": "r1"})
    got = [world.client.next(dict) for _ in range(10)]
    assert [a[0] for a in got] == [0, 1, 2, 3, 4, 5, 6, 7, 7, 7] and world.client.late == 2
    assert got[8][7:10].tolist() == [0, 0, 0] and got[7][7:10].tolist() == [7, 7, 7]  # the base's velocities


def test_between_two_actions_it_interpolates():
    assert World(9.0, rate=20.0, every=K).run(5) == [0, 0.5, 1, 1.5, 2]


def test_a_slow_caller_misses_ticks():
    world = World(9.0, every=K)
    world.run(2)
    world.now += 0.35
    world.run(1)
    assert world.client.missed == 1


def test_limits():
    wide = np.full(2, np.inf)
    speed = Limits(-wide, wide, np.full(2, 5.0))
    world = World(9.0, every=K, limits=speed, pose=np.full(2, -1.0))
    assert world.run(4) == [-0.5, 0.0, 0.5, 1.0] and world.client.limited == 4
    joints = Limits(np.array([0.0, -1.0]), np.array([2.5, 9.0]), wide)
    assert World(9.0, every=K, limits=joints).run(5) == [0, 1, 2, 2.5, 2.5]
    box = Limits(-wide, wide, wide, point=lambda a: a[None, [0, 0, 1]], box=np.array([[-1.0] * 3, [2.0] * 3]))
    assert World(9.0, every=K, limits=box).run(5) == [0, 1, 2, 2, 2]


def test_what_the_server_refuses_is_raised_and_the_next_call_asks_again():
    world = World(0.2)
    with pytest.raises(UserError, match="no such thing"):
        world.client.next(lambda: {"bad": True})
    assert world.run(1) == [0]


def test_it_imports_no_jax():
    code = "import sys, hvd.client; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
