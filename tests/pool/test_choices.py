"""Requests for several answers, beside others: their choices share the slots as requests do."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from tests.pool.rig import FakeWorker, Machine, ask, clock, run, spec, with_pool

from headrace.core.events import ChoicesLeft, Delta, Event, Finish
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.model import ModelSpec
from headrace.core.request import GenerateRequest
from headrace.core.stream import merge
from headrace.pool.pool import Pool
from headrace.worker.places import Slots

SLOTS = 4
TOKENS = 20
TURN_S = TOKENS * 0.1


class Chooser(FakeWorker):
    """Each choice of a request has a slot of its own, and 0.1 s for a token."""

    def __init__(self, one: ModelSpec, machine: Machine) -> None:
        super().__init__(one, machine)
        self.slots = Slots(self.max_running)

    async def _generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        left = itertools.count(request.n - 1, -1)
        stream = merge([self._choice(request, index, left) for index in range(request.n)])
        try:
            async for event in stream:
                yield event
        finally:
            await stream.aclose()
        usage = Usage(prompt_tokens=1)
        yield Finish(("length",) * request.n, usage, InferenceMetrics(started_at=0.0, usage=usage))

    async def _choice(
        self, request: GenerateRequest, index: int, left: Iterator[int]
    ) -> AsyncGenerator[Event, None]:
        await self.slots.take(request)
        try:
            # The first choices are shorter and the last are longer, so that they end in turn.
            for number in range((request.sampling.max_tokens or 1) + index % SLOTS):
                await asyncio.sleep(0.1)
                yield Delta(str(number), (number,), index)
        finally:
            self.slots.leave(request)
        if others := next(left):
            yield ChoicesLeft(others)


class Client:
    """What one key asks, and when its first token came."""

    def __init__(self, served: Pool) -> None:
        self.served = served
        self.tasks: list[asyncio.Task[float]] = []

    async def first_s(self, tokens: int, **given: Any) -> float:
        began, first = clock(), 0.0
        async for event in self.served.ask(ask(tokens=tokens, **given)):
            assert not isinstance(event, ChoicesLeft), "the pool keeps it"
            if isinstance(event, Delta):
                first = first or clock() - began
        return first

    def begin(self, tokens: int, **given: Any) -> asyncio.Task[float]:
        self.tasks.append(asyncio.create_task(self.first_s(tokens, **given)))
        return self.tasks[-1]


async def served_by(slots: int = SLOTS, **given: Any) -> Client:
    machine = Machine()
    one = spec(max_running=slots, max_queued=100, **given)
    client = Client(with_pool(machine, lambda model, _: Chooser(model, machine), one))
    await client.first_s(1)
    return client


@pytest.mark.parametrize("client", ["", "a"])
@pytest.mark.parametrize("many", [1, SLOTS, 2 * SLOTS])
def test_that_another_client_waits_for_one_answer_and_not_for_all(many: int, client: str) -> None:
    """Issue 11: `n: 64` of one key had all slots until the last of its answers ended."""

    async def main() -> None:
        one = await served_by()
        for _ in range(many):
            one.begin(TOKENS, n=64, client=client)
        await asyncio.sleep(0.5)
        for _ in range(5):
            assert await one.first_s(3, client="b") < TURN_S + 0.5
        # It is the same for one more key.
        second = one.begin(TOKENS, client="b")
        assert await one.first_s(3, client="c") < TURN_S + 0.5
        assert await second < TURN_S + 0.5
        for task in one.tasks:
            task.cancel()
        await one.served.aclose()

    run(main())


def test_that_many_clients_with_many_answers_leave_room_for_one_more() -> None:
    async def main() -> None:
        one = await served_by()
        for number in range(3 * SLOTS):
            one.begin(TOKENS, n=64, client=f"a{number}")
        await asyncio.sleep(0.5)
        # Each of those has waited longer than it.
        assert await one.first_s(3, client="b") < 4 * (TURN_S + 0.5)
        for task in one.tasks:
            task.cancel()
        await one.served.aclose()

    run(main())


def test_that_a_client_with_single_answers_has_its_part() -> None:
    """As many slots as a request for many answers of another key has."""

    async def main() -> None:
        one = await served_by()
        one.begin(TOKENS, n=400, client="a")
        await asyncio.sleep(0.5)
        for _ in range(50):
            one.begin(TOKENS, client="b")
        entry = one.served.entries["a"]
        await asyncio.sleep(20 * TURN_S)
        begun = sum(lease.request.client == "b" for lease in entry.replicas[0].leases)
        assert begun >= SLOTS // 2
        assert len(entry.replicas[0].leases) <= SLOTS
        ended = sum(task.done() for task in one.tasks)
        assert 20 <= ended <= 40
        for task in one.tasks:
            task.cancel()
        await one.served.aclose()

    run(main())


def test_that_the_last_answer_holds_one_slot() -> None:
    """What has ended of a request makes place, though the request goes on."""

    async def main() -> None:
        one = await served_by()
        one.begin(1000, n=SLOTS, client="a")
        one.begin(1000, n=SLOTS, client="a")
        await asyncio.sleep(0.5)
        entry = one.served.entries["a"]
        assert (entry.running, len(entry.queue)) == (SLOTS, 1)
        # The shortest choices of the first end, one by one.
        await asyncio.sleep(100)
        assert len(entry.queue) == 0
        await asyncio.gather(*one.tasks)
        assert entry.running == 0
        await one.served.aclose()

    run(main())


def test_that_no_request_waits_for_all_slots_at_once() -> None:
    """A request for many answers begins with one slot: the others did not stand idle for it."""

    async def main() -> None:
        one = await served_by()
        one.begin(1000, client="a")
        await asyncio.sleep(0.5)
        many = one.begin(3, n=64, client="b")
        assert await one.first_s(1, client="c") < 1.0
        assert await many < 1.0
        for task in one.tasks:
            task.cancel()
        await one.served.aclose()

    run(main())


def test_that_one_alone_is_as_wide_as_the_slots() -> None:
    async def main() -> None:
        one = await served_by()
        began = clock()
        await one.first_s(TOKENS, n=SLOTS * 4)
        # Its choices are up to 3 tokens longer.
        assert clock() - began < 4 * (TURN_S + 0.3) + 0.1
        await one.served.aclose()

    run(main())
