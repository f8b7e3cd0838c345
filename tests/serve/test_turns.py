"""Large messages of many clients: each loop turn reads one part, and they leave time to those who ask less."""

import asyncio
import itertools
import time

from hvd.serve import turns
from hvd.serve.turns import LARGE, PART, Turns


class Client:
    """A connection that always has another part; `reads` says when it was let to."""

    def __init__(self, held: int, share: int = 1):
        self.held, self.share, self.paused, self.reads = held, share, False, []

    def pause(self) -> None:
        self.paused = True

    def go_on(self) -> None:
        assert self.paused
        self.paused = False
        self.reads.append(time.monotonic())


def play(queue: Turns, clients: list[Client], seconds: float, part: float = 0.0) -> list[int]:
    """How many parts of `part` seconds each client read, and last, how many clients were let to at a time."""

    async def run():
        most, end = 0, time.monotonic() + seconds
        for client in clients:
            queue.took(client, part)
        while time.monotonic() < end:
            await asyncio.sleep(0)
            ready = [client for client in clients if not client.paused]
            most = max(most, len(ready))
            for client in ready:
                time.sleep(part)
                queue.took(client, part)
        return [*(len(client.reads) for client in clients), most]

    return asyncio.run(run())


def test_one_part_is_read_in_a_turn_and_all_clients_come():
    *counts, most = play(Turns(), [Client(PART + 1) for _ in range(6)], 0.2)
    assert most == 1 and min(counts) >= max(counts) - 1 > 10


def test_connections_of_one_address_share_the_turns_of_one():
    *many, one, _ = play(Turns(), [*(Client(PART + 1, 6) for _ in range(6)), Client(PART + 1)], 0.2)
    assert 0.8 < sum(many) / one < 1.25 and min(many) >= max(many) - 1


def test_a_message_is_decoded_before_those_of_thirty_that_wait():
    order, at_work = [], []

    def decode(name):
        at_work.append(name)
        time.sleep(0.002)
        order.append((name, len(at_work)))
        at_work.remove(name)

    async def asks(queue, client, name, times):
        for _ in range(times):
            await queue.decode(None, lambda: decode(name), LARGE, client)

    async def run():
        queue = Turns()
        many = [asyncio.create_task(asks(queue, Client(0, 30), "many", 4)) for _ in range(30)]
        for _ in range(5):
            await asyncio.sleep(0.02)
            begin = len(order)
            await asks(queue, Client(0), "one", 1)
            assert len(order) - begin <= 1 + 2 * turns.SLOTS  # those that were at work, and what ended beside it
        for each in many[:10]:
            each.cancel()  # they have gone, and leave no slot taken
        await asyncio.gather(*many, return_exceptions=True)
        await asks(queue, Client(0), "last", 1)

    asyncio.run(asyncio.wait_for(run(), 20))
    assert order[-1][0] == "last" and max(count for _, count in order) <= turns.SLOTS


def test_small_messages_take_no_turns():
    client = Client(PART)
    Turns().took(client, 1.0)
    assert not client.paused


def test_large_messages_take_a_third_of_the_time_while_others_ask():
    alone = play(Turns(), [Client(LARGE + 1) for _ in range(3)], 0.3, part=0.01)
    queue = Turns()
    queue.asked()
    beside = play(queue, [Client(LARGE + 1) for _ in range(3)], 0.3, part=0.01)
    assert sum(alone[:-1]) > 1.5 * sum(beside[:-1]) >= 3


def test_a_smaller_message_does_not_wait_for_large_ones():
    queue, large, smaller = Turns(), Client(LARGE + 1), Client(LARGE)
    queue.asked()
    play(queue, [large, smaller], 0.05, part=1.0)  # the large one would have to wait for 2 seconds
    assert smaller.reads and not large.reads


def test_large_messages_are_decoded_one_after_another(monkeypatch):
    monkeypatch.setattr(turns, "_ASKED_S", 60.0)
    at_work, seen = [], []

    def decode():
        at_work.append(1)
        time.sleep(0.02)
        seen.append((len(at_work), time.monotonic()))
        at_work.pop()
        return "decoded"

    async def run():
        queue = Turns()
        queue.asked()
        return await asyncio.gather(*(queue.decode(None, decode, LARGE + 1, Client(0)) for _ in range(3)))

    assert asyncio.run(run()) == ["decoded"] * 3 and [count for count, _ in seen] == [1, 1, 1]
    times = [at for _, at in seen]
    assert min(b - a for a, b in itertools.pairwise(times)) > 0.055  # 0.04 s of rest, 0.02 s of work
