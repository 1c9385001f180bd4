from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import Draining, QueueFull, QueueTimeout
from headrace.worker.admission import Admission


async def waiting(admission: Admission, count: int) -> list[asyncio.Task[float]]:
    tasks = [asyncio.ensure_future(admission.enter()) for _ in range(count)]
    await asyncio.sleep(0)
    return tasks


def state(admission: Admission) -> tuple[int, int]:
    return admission.running, admission.queued


async def test_first_come_first_served_within_the_limit() -> None:
    """W20: at most max_running at once; the queue keeps its order."""
    admission = Admission(2, 10)
    entered = [await admission.enter(), await admission.enter()]
    tasks = await waiting(admission, 3)
    assert state(admission) == (2, 3)
    for place, task in enumerate(tasks):
        admission.leave(entered[0])
        await task
        assert [later.done() for later in tasks[place + 1 :]] == [False] * (2 - place)
        assert admission.running == 2
    admission.leave(0.0)
    admission.leave(0.0)
    assert state(admission) == (0, 0)
    assert await admission.idle(0)


async def test_nobody_overtakes_the_queue() -> None:
    """W20: a slot that is free in the same moment goes to who waits."""
    admission = Admission(1, 10)
    entered = await admission.enter()
    (first,) = await waiting(admission, 1)
    admission.leave(entered)
    late = asyncio.ensure_future(admission.enter())
    await asyncio.sleep(0)
    await first
    assert not late.done()
    admission.leave(entered)
    await late


async def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    """W20: bounded; the time is from the measured rate and at least a second."""
    admission = Admission(1, 2)
    await admission.enter()
    tasks = await waiting(admission, 2)
    with pytest.raises(QueueFull) as caught:
        await admission.enter()
    assert caught.value.retry_after_s == 1.0
    admission.leave(time.monotonic() - 10)
    await waiting(admission, 1)
    with pytest.raises(QueueFull) as caught:
        await admission.enter()
    # One left after 10 s, and three are before the next who comes.
    assert caught.value.retry_after_s == pytest.approx(30, rel=0.01)
    for task in tasks:
        task.cancel()


async def test_no_queue_at_all() -> None:
    """W20: max_queued 0 serves who finds a slot and refuses the rest."""
    admission = Admission(1, 0)
    await admission.enter()
    with pytest.raises(QueueFull):
        await admission.enter()


async def test_a_deadline_in_the_queue() -> None:
    """W20: who waited too long is told, and leaves no place behind."""
    admission = Admission(1, 2)
    entered = await admission.enter()
    with pytest.raises(QueueTimeout):
        await admission.enter(time.monotonic() + 0.02)
    with pytest.raises(QueueTimeout):
        await admission.enter(time.monotonic() - 1)
    assert state(admission) == (1, 0)
    admission.leave(entered)
    assert await admission.idle(0)


async def test_a_cancelled_waiter_leaves_the_queue_at_once() -> None:
    """W18: and its turn, if it came in the same moment, goes to the next."""
    admission = Admission(1, 5)
    entered = await admission.enter()
    one, two, three = await waiting(admission, 3)
    one.cancel()
    await asyncio.wait({one})
    assert admission.queued == 2
    admission.leave(entered)
    two.cancel()
    await asyncio.wait({two})
    assert two.cancelled()
    await three
    assert state(admission) == (1, 0)


async def test_closing_refuses_the_queue_and_all_later_ones() -> None:
    """W8: those that run go on."""
    admission = Admission(1, 5)
    entered = await admission.enter()
    tasks = await waiting(admission, 2)
    admission.close(Draining("over"))
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, Draining) for result in results)
    with pytest.raises(Draining):
        await admission.enter()
    admission.check()
    assert not await admission.idle(0.01)
    admission.abort(Draining("now"))
    with pytest.raises(Draining, match="now"):
        admission.check()
    admission.leave(entered)
    assert await admission.idle(0.01)
    assert state(admission) == (0, 0)


STEPS = st.lists(
    st.tuples(st.sampled_from(["enter", "leave", "cancel", "hurry", "turn"]), st.integers(0, 50)),
    max_size=60,
)


@given(STEPS, st.integers(1, 3), st.integers(0, 4))
def test_any_history_keeps_the_bounds(
    steps: list[tuple[str, int]], max_running: int, max_queued: int
) -> None:
    """W18, W20: never over the limits, every waiter answered, idle in the end."""
    asyncio.run(_play(steps, Admission(max_running, max_queued)))


async def _play(steps: list[tuple[str, int]], admission: Admission) -> None:
    tasks: list[asyncio.Task[float]] = []
    left: set[asyncio.Task[float]] = set()

    def holders() -> list[asyncio.Task[float]]:
        return [
            task
            for task in tasks
            if task not in left and task.done() and not task.cancelled() and not task.exception()
        ]

    for step, number in steps:
        if step in {"enter", "hurry"}:
            deadline = time.monotonic() if step == "hurry" else None
            tasks.append(asyncio.ensure_future(admission.enter(deadline)))
        elif step == "leave" and (held := holders()):
            left.add(one := held[number % len(held)])
            admission.leave(one.result())
        elif step == "cancel" and tasks:
            tasks[number % len(tasks)].cancel()
        else:
            await asyncio.sleep(0)
        assert len(holders()) <= admission.running <= admission.max_running
        assert admission.queued <= admission.max_queued
    for _ in range(3 * len(tasks) + 3):
        await asyncio.sleep(0)
        for one in holders():
            left.add(one)
            admission.leave(one.result())
    async with asyncio.timeout(5):
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            for one in holders():
                left.add(one)
                admission.leave(one.result())
    assert (admission.running, admission.queued) == (0, 0)
    assert await admission.idle(0)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()):
            assert isinstance(error, QueueFull | QueueTimeout)
