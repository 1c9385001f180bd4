"""Batches: full, fair, of like lengths, and a bad item fails its own request alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.worker.rig import until

from headrace.core.errors import Draining, InvalidRequest, OutOfMemory
from headrace.worker.batching import Batcher, BatchLimits


class Engine:
    """Doubles numbers; a batch waits until it is let go."""

    def __init__(self, items: int = 4, tokens: int = 10_000, padding: int = 256) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()
        self.most = 1 << 30
        self.within = 0
        self.steps: list[tuple[int, int]] = []
        self.thread = ThreadPoolExecutor(1)
        self.batcher: Batcher[int, int] = Batcher(
            self.run, lambda item: abs(item), BatchLimits(items, tokens, padding), self.thread
        )

    def run(self, batch: Sequence[int]) -> list[int]:
        self.within += 1
        assert self.within == 1, "two batches at once"
        self.batches.append(list(batch))
        assert self.go.wait(5)
        self.within -= 1
        if len(batch) > self.most:
            raise OutOfMemory("too much")
        if any(item < 0 for item in batch):
            raise InvalidRequest("a bad one")
        return [2 * item for item in batch]

    def ask(self, *items: int) -> asyncio.Task[list[int]]:
        async def wait() -> list[int]:
            return await self.batcher.submit(items, lambda *step: self.steps.append(step))

        return asyncio.ensure_future(wait())


async def test_one_alone_goes_at_once_and_its_results_are_in_order() -> None:
    engine = Engine()
    assert await engine.ask(1, 300, 2, 200) == [2, 600, 4, 400]
    assert engine.batches == [[300, 200], [2, 1]]
    assert engine.steps == [(0, 4), (2, 4), (2, 4), (4, 4)]


async def test_who_comes_meanwhile_goes_together_next() -> None:
    """E: requests of many clients become one batch."""
    engine = Engine(items=8)
    engine.go.clear()
    first = engine.ask(7)
    await until(lambda: engine.batches)
    others = [engine.ask(n) for n in range(1, 7)]
    await asyncio.sleep(0)
    engine.go.set()
    assert await first == [14]
    assert await asyncio.gather(*others) == [[2 * n] for n in range(1, 7)]
    assert engine.batches == [[7], [6, 5, 4, 3, 2, 1]]


async def test_a_large_request_does_not_keep_a_small_one_waiting() -> None:
    """E: requests take turns."""
    engine = Engine(items=4)
    engine.go.clear()
    large = engine.ask(*range(100, 140))
    await until(lambda: engine.batches)
    small = engine.ask(120)
    await asyncio.sleep(0)
    engine.go.set()
    assert await small == [240]
    assert 120 in engine.batches[1]
    assert len(engine.batches) < 6
    assert len(await large) == 40
    assert max(map(len, engine.batches)) == 4


async def test_lists_that_did_not_come_at_once_fill_batches_of_like_lengths() -> None:
    """E: the first has given its longest items when the others come with theirs."""
    engine = Engine(items=8, padding=16)
    engine.go.clear()
    tasks = [engine.ask(*range(1, 65))]
    await until(lambda: engine.batches)
    tasks += [engine.ask(*range(1, 65)) for _ in range(3)]
    await asyncio.sleep(0)
    engine.go.set()
    for task in tasks:
        assert await task == [2 * n for n in range(1, 65)]
    assert len(engine.batches) < 1.2 * 4 * 64 / 8
    padding = sum(max(batch) * len(batch) - sum(batch) for batch in engine.batches[1:])
    assert padding < 0.05 * sum(map(sum, engine.batches))


async def test_each_has_its_turn() -> None:
    """E: who gives nothing that fits the others is not left behind."""
    engine = Engine(items=4, padding=8)
    engine.go.clear()
    large = engine.ask(*range(100, 164))
    await until(lambda: engine.batches)
    odd, twice = engine.ask(9), engine.ask(500, 30)
    await asyncio.sleep(0)
    engine.go.set()
    assert (await odd, await twice, len(await large)) == ([18], [1000, 60], 64)
    assert engine.batches[1:5] == [[9], [500], [159, 158, 157, 156], [30]]


async def test_batches_hold_so_many_tokens_with_the_padding() -> None:
    engine = Engine(items=8, tokens=1000)
    await engine.ask(400, 300, 250, 240, 230, 220)
    assert all(len(batch) * max(batch) <= 1000 for batch in engine.batches)
    await engine.ask(5000)
    assert engine.batches[-1] == [5000]


async def test_padding_that_costs_more_than_a_batch_of_its_own_begins_one() -> None:
    engine = Engine(items=8, padding=10)
    await engine.ask(20, 18, 17, 15, 14, 12, 5)
    assert engine.batches == [[20, 18, 17, 15], [14, 12], [5]]


async def test_a_bad_item_fails_its_own_request_alone() -> None:
    engine = Engine(items=8)
    engine.go.clear()
    first = engine.ask(1)
    await until(lambda: engine.batches)
    tasks: list[Any] = [engine.ask(2), engine.ask(-3, 4), engine.ask(5), engine.ask(6)]
    await asyncio.sleep(0)
    engine.go.set()
    two, bad, five, six = await asyncio.gather(*tasks, return_exceptions=True)
    assert (await first, two, five, six) == ([2], [4], [10], [12])
    assert isinstance(bad, InvalidRequest)


async def test_a_batch_too_large_for_the_memory_is_halved() -> None:
    """W17: the engine is out of memory, and yet all are answered."""
    engine = Engine(items=8)
    engine.most = 3
    assert await engine.ask(*range(20, 28)) == [2 * n for n in range(20, 28)]
    engine.most = 0
    with pytest.raises(OutOfMemory):
        await engine.ask(1)


async def test_who_is_cancelled_leaves_the_queue() -> None:
    engine = Engine(items=2)
    engine.go.clear()
    running = engine.ask(1)
    await until(lambda: engine.batches)
    gone, stays = engine.ask(50, 51, 52, 53), engine.ask(3)
    await asyncio.sleep(0)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    engine.go.set()
    assert (await running, await stays) == ([2], [6])
    assert engine.batches == [[1], [3]]


async def test_an_abort_ends_all() -> None:
    engine = Engine()
    engine.go.clear()
    tasks = [engine.ask(1), engine.ask(2)]
    await until(lambda: engine.batches)
    engine.batcher.abort(Draining("stopping"))
    for task in tasks:
        with pytest.raises(Draining):
            await task
    engine.go.set()
    assert await engine.ask(4) == [8]
