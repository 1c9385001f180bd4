"""Requests of batches: they give way to others, and always make progress."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import pytest
from tests.pool.rig import Machine, answer, ask, clock, pool, run, spec

from headrace.core.errors import QueueFull
from headrace.core.request import GenerateRequest
from headrace.pool.policy import Candidate, left_for_batch
from headrace.pool.pool import Pool
from headrace.pool.queue import Queue, Ticket
from headrace.pool.status import status_of


def batch(client: str = "", tokens: int = 5, model: str = "a") -> GenerateRequest:
    return ask(model, tokens, client=client, batch=True, received=clock())


def begin(served: Pool, *requests: GenerateRequest) -> list[asyncio.Task[object]]:
    return [asyncio.create_task(answer(served, request)) for request in requests]


async def loaded(served: Pool) -> None:
    """Load the model with a request of a batch, so that it has been quiet."""
    await answer(served, batch())


@pytest.mark.parametrize(
    ("slots", "quiet", "free"),
    [(1, True, 1), (1, False, 1), (2, False, 1), (4, True, 3), (4, False, 2), (0, True, 0)],
)
def test_the_slots_of_a_batch(slots: int, quiet: bool, free: int) -> None:
    candidate = Candidate(number=0, free=slots, running=0, max_running=slots, work=0.0)
    assert left_for_batch(candidate, quiet=quiet).free == free


@pytest.mark.parametrize(
    ("slots", "starting", "quiet", "free"),
    [(4, 0, False, 2), (4, 1, False, 0), (64, 3, False, 29), (64, 4, False, 0), (64, 4, True, 59)],
)
def test_few_requests_of_a_batch_start_at_a_time(
    slots: int, starting: int, quiet: bool, free: int
) -> None:
    """Issue 14, must show 6: their prompts are in the way of other requests' prompts."""
    candidate = Candidate(
        number=0,
        free=slots - starting,
        running=starting,
        max_running=slots,
        work=0.0,
        batch=starting,
        starting=starting,
    )
    assert left_for_batch(candidate, quiet=quiet).free == free


def test_that_the_next_of_a_batch_starts_with_the_first_token_of_another() -> None:
    """Issue 14, must show 6: of 32 slots, two are for prompts of batches until those are read."""

    async def main() -> None:
        served = pool(Machine(), spec(max_running=32))
        await answer(served, ask())
        waiting = begin(served, *(batch(tokens=100) for _ in range(20)))
        entry, running = served.entries["a"], list[int]()
        for _ in range(12):
            await asyncio.sleep(0.11)
            running.append(entry.running)
        assert running == sorted(running)
        assert max(after - before for before, after in itertools.pairwise(running)) == 2
        assert (running[0], running[-1]) == (4, 16)
        await asyncio.gather(*waiting)
        await served.aclose()

    run(main())


def test_that_a_slot_stays_free_for_others() -> None:
    """Issue 14.6: a request that is no batch's begins at once, however many of a batch wait."""

    async def main() -> None:
        served = pool(Machine(), spec(max_running=4))
        await loaded(served)
        waiting = begin(served, *(batch(tokens=100) for _ in range(20)))
        await asyncio.sleep(1)
        entry = served.entries["a"]
        assert (entry.running, entry.queue.count(batch=True)) == (3, 17)
        started = clock()
        await answer(served, ask())
        assert clock() - started == pytest.approx(0.5, abs=0.01)
        # It has been there lately: the batch gets half of the slots from now on.
        await asyncio.sleep(10)
        assert entry.running == 2
        await asyncio.gather(*waiting)
        await served.aclose()

    run(main())


def test_that_a_batch_is_not_starved() -> None:
    """Issue 14.6: with one slot and ever waiting requests, it gets a turn for ten of its size."""

    async def main() -> None:
        served = pool(Machine(), spec(max_running=1, max_queued=100))
        await loaded(served)
        ended: list[str] = []

        async def note(request: GenerateRequest) -> None:
            await answer(served, request)
            ended.append("batch" if request.batch else "live")

        requests = [*(ask() for _ in range(60)), *(batch() for _ in range(5))]
        await asyncio.gather(*map(note, requests))
        places = [place for place, kind in enumerate(ended) if kind == "batch"]
        assert [after - before for before, after in itertools.pairwise(places)] == [11] * 4
        await served.aclose()

    run(main())


def test_that_a_batch_does_not_fill_the_queue() -> None:
    """Issue 14.6: each class has its own places, and the places that are left are never below 0."""

    async def main() -> None:
        served = pool(Machine(), spec(max_running=1, max_queued=2))
        entry = served.entries["a"]
        loading = begin(served, *(ask() for _ in range(3)))
        await asyncio.sleep(0)
        assert (len(entry.queue), status_of(entry).places) == (3, 0)
        await asyncio.gather(*loading)
        waiting = begin(served, *(batch() for _ in range(3)))
        await asyncio.sleep(0)
        assert (len(entry.queue), status_of(entry).places) == (2, 2)
        with pytest.raises(QueueFull, match="2 requests wait") as caught:
            await answer(served, batch())
        assert caught.value.retry_after_s
        await answer(served, ask())
        await asyncio.gather(*waiting)
        await served.aclose()

    run(main())


def test_that_tokens_of_a_batch_are_half_the_price() -> None:
    async def main() -> None:
        queue = Queue(clock)
        for request in (batch("a", 99), ask(tokens=99, client="b")):
            ticket = Ticket(request, clock())
            queue.join(ticket)
            queue.leave(ticket)
            queue.granted(ticket)
            queue.correct(ticket, 200.0)
        assert queue._served == {"a": 100.0, "b": 200.0}
        assert not queue.count(batch=True)

    run(main())


def test_that_clients_share_the_turns_of_batches() -> None:
    async def main() -> None:
        queue = Queue(clock)
        for client in "aaabbb":
            queue.join(Ticket(batch(client), clock()))
        order = ""
        while (ticket := queue.next()) is not None:
            queue.leave(ticket)
            queue.granted(ticket)
            order += ticket.request.client
        assert sorted(order[:2]) == sorted(order[2:4]) == ["a", "b"]

    run(main())


def test_that_no_model_in_use_is_unloaded_for_a_batch() -> None:
    """A model that answers a request now and then stays, and goes when it has been idle."""

    async def main() -> None:
        machine = Machine()
        machine.sizes = {"a": 60, "b": 60}
        served = pool(machine, spec("a"), spec("b"))
        await answer(served, ask("a"))
        (waiting,) = begin(served, batch(model="b"))
        for _ in range(10):
            await asyncio.sleep(30)
            await answer(served, ask("a"))
        assert not waiting.done()
        assert machine.loads == 1
        await asyncio.sleep(70)
        assert waiting.done()
        assert served.entries["b"].is_ready
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        await served.aclose()

    run(main())
