"""The slots of an engine, between the choices of requests and between clients."""

from __future__ import annotations

import asyncio
import random

import pytest
from tests.worker.rig import ask

from headrace.core.request import GenerateRequest
from headrace.worker.places import Slots


class Running:
    """The choices of requests, each of which ends when it is told to."""

    def __init__(self, count: int) -> None:
        self.slots = Slots(count)
        self.tasks: list[asyncio.Task[None]] = []
        self.ends: list[tuple[GenerateRequest, asyncio.Event]] = []
        self.order: list[GenerateRequest] = []

    async def choice(self, request: GenerateRequest) -> None:
        await self.slots.take(request)
        self.order.append(request)
        end = (request, asyncio.Event())
        self.ends.append(end)
        try:
            await end[1].wait()
        finally:
            self.ends.remove(end)
            self.slots.leave(request)

    async def begin(self, request: GenerateRequest) -> None:
        self.tasks += [asyncio.create_task(self.choice(request)) for _ in range(request.n)]
        await settle()

    async def end(self, place: int = 0) -> None:
        self.ends[place][1].set()
        await settle()

    def runs(self, request: GenerateRequest) -> int:
        return sum(running is request for running, _ in self.ends)


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


def wants(n: int, client: str, *, batch: bool = False) -> GenerateRequest:
    return ask(n=n, client=client, batch=batch)


async def test_one_request_for_many_answers_makes_room_for_another_client() -> None:
    """Issue 11: with `n: 64` of one key, another's chat had its first token after 156 s."""
    running = Running(8)
    many = [wants(64, "a") for _ in range(8)]
    for request in many:
        await running.begin(request)
    assert (running.slots.running, running.slots.waiting) == (8, 504)
    other = wants(1, "b")
    await running.begin(other)
    await running.end()
    assert running.order[-1] is other
    # While no other waits, all slots are used.
    await running.end(running.ends.index(next(end for end in running.ends if end[0] is other)))
    assert (running.slots.running, running.runs(other)) == (8, 0)
    # The requests of one client share its part.
    for _ in range(8):
        await running.end()
    assert [running.runs(request) for request in many] == [1] * 8


async def test_clients_share_the_slots_evenly() -> None:
    running = Running(4)
    requests = [wants(50, "a"), wants(50, "b"), wants(50, "b")]
    for request in requests:
        await running.begin(request)
    for _ in range(40):
        await running.end()
    assert [running.runs(request) for request in requests] == [2, 1, 1]
    # An only slot goes round, once both wait.
    one = Running(1)
    for request in requests:
        await one.begin(request)
    for _ in range(8):
        await one.end()
    assert ["ab"[request.client == "b"] for request in one.order] == list("aabababab")


async def test_the_choices_of_a_batch_leave_a_slot_free() -> None:
    """B5: no other request waits for the end of one of a batch."""
    running = Running(4)
    batch, other = wants(9, "a", batch=True), wants(1, "a")
    await running.begin(batch)
    assert running.runs(batch) == 3
    await running.begin(other)
    assert running.runs(other) == 1
    # A batch that has no slot yet gets one; an only slot is taken.
    late = wants(2, "c", batch=True)
    await running.begin(late)
    await running.end()
    assert running.runs(late) == 1
    only = Running(1)
    await only.begin(batch)
    assert only.runs(batch) == 1


@pytest.mark.parametrize("seed", range(4))
async def test_that_no_choice_is_left_behind(seed: int) -> None:
    """10,000 random steps: a slot is free only if no choice may have it, and all end."""
    chance = random.Random(seed)
    running = Running(chance.randint(1, 6))
    count, slots = running.slots.running + running.slots._free, running.slots
    requests = [
        wants(1, chance.choice(["", "a", "b", "c"]), batch=chance.random() < 0.2)
        for _ in range(30)
    ]  # fmt: skip
    for _ in range(2500):
        step = chance.random()
        if step < 0.4 and len(running.tasks) < 60:
            running.tasks.append(asyncio.create_task(running.choice(chance.choice(requests))))
        elif step < 0.8 and running.ends:
            chance.choice(running.ends)[1].set()
        elif running.tasks:
            chance.choice(running.tasks).cancel()
        for _ in range(chance.choice([0, 1, 5])):
            await asyncio.sleep(0)
        running.tasks = [task for task in running.tasks if not task.done()]
        assert 0 <= slots.running <= count
        if slots.running < count:
            waiting = [request for request, _ in slots._waiting.values()]
            assert all(request.batch and slots._held[request.id] for request in waiting)
            assert not waiting or slots.running == count - 1
    # Each choice that ends lets the next one begin, until there are none.
    for _ in range(200):
        await settle()
        for _, end in running.ends:
            end.set()
    assert all(task.done() for task in running.tasks)
    assert (slots.running, slots.waiting) == (0, 0)
    assert not (slots._held)
    assert not (slots._held_by_client)
    assert not (slots._waiting)
