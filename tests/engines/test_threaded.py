from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from headrace.engines.threaded import Emit, Inbox, stream


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


async def listed(produce: Callable[[Emit[int]], None], executor: ThreadPoolExecutor) -> list[int]:
    inbox = Inbox(asyncio.get_running_loop())
    return [item async for item in stream(produce, inbox=inbox, executor=executor)]


async def test_items_come_in_order_and_all_of_them(executor: ThreadPoolExecutor) -> None:
    def produce(emit: Emit[int]) -> None:
        for item in range(1000):
            assert not emit(item)

    assert await listed(produce, executor) == list(range(1000))
    both = await asyncio.gather(listed(produce, executor), listed(produce, executor))
    assert both == [list(range(1000))] * 2


async def test_an_exception_comes_after_what_was_emitted(executor: ThreadPoolExecutor) -> None:
    """W19: an exception on an engine's thread reaches the stream."""

    def produce(emit: Emit[int]) -> None:
        emit(1)
        emit(2)
        raise OSError("engine")

    seen: list[int] = []
    with pytest.raises(OSError, match="engine"):
        async for item in stream(
            produce, inbox=Inbox(asyncio.get_running_loop()), executor=executor
        ):
            seen.append(item)
    assert seen == [1, 2]


async def test_close_tells_the_producer_and_waits_for_its_thread(
    executor: ThreadPoolExecutor,
) -> None:
    """W18: when the stream is closed the thread has ended."""
    ended = threading.Event()

    def produce(emit: Emit[int]) -> None:
        while not emit(1):
            time.sleep(0.001)
        time.sleep(0.05)
        ended.set()

    items = stream(produce, inbox=Inbox(asyncio.get_running_loop()), executor=executor)
    assert await anext(items) == 1
    await items.aclose()
    assert ended.is_set()


async def test_a_close_before_the_thread_began_does_nothing_for_nobody(
    executor: ThreadPoolExecutor,
) -> None:
    """W18: a request that is gone before its thread is free never reaches the engine."""
    began: list[int] = []
    hold = threading.Event()
    held = [executor.submit(hold.wait) for _ in range(4)]
    items = stream(
        lambda emit: began.append(1), inbox=Inbox(asyncio.get_running_loop()), executor=executor
    )
    waiting = asyncio.ensure_future(anext(items))
    await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.sleep(0)
    hold.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert all(one.result() for one in held)
    assert not began


async def test_many_puts_wake_the_loop_once() -> None:
    class Loop:
        def __init__(self) -> None:
            self.wakes: list[Callable[[], None]] = []

        def call_soon_threadsafe(self, drain: Callable[[], None]) -> None:
            self.wakes.append(drain)

    loop, got = Loop(), []
    inbox = Inbox(loop)  # pyright: ignore[reportArgumentType]
    for number in range(50):
        inbox.put(got.append, number)
    assert len(loop.wakes) == 1
    loop.wakes[0]()
    assert got == list(range(50))
    inbox.put(got.append, 50)
    assert len(loop.wakes) == 2


async def test_the_items_of_one_step_arrive_in_one_turn() -> None:
    """W20: several threads that emit one after another wake their readers together."""
    inbox = Inbox(asyncio.get_running_loop(), gather_s=0.2)
    turns: list[float] = []
    all_there = threading.Barrier(4)

    async def read(executor: ThreadPoolExecutor, number: int) -> None:
        def produce(emit: Emit[int]) -> None:
            all_there.wait()
            time.sleep(number * 0.03)
            emit(number)
            all_there.wait()

        async for _ in stream(produce, inbox=inbox, executor=executor):
            turns.append(asyncio.get_running_loop().time())

    with ThreadPoolExecutor(4) as executor:
        await asyncio.gather(*(read(executor, number) for number in range(4)))
    assert len(turns) == 4
    assert max(turns) - min(turns) < 0.03
    assert inbox.open == 0
