"""What listeners hear of the pool."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
from tests.pool.rig import run

from headrace.core.status import PoolEvent
from headrace.pool.events import EventBus


async def heard(events: EventBus) -> list[PoolEvent]:
    return [event async for event in events.subscribe()]


def test_that_all_hear_all_in_order_from_when_they_came() -> None:
    async def main() -> None:
        events = EventBus()
        events.publish("loading", "a")
        first = asyncio.create_task(heard(events))
        await asyncio.sleep(0)
        events.publish("ready", "a", 1, ms=5)
        second = asyncio.create_task(heard(events))
        await asyncio.sleep(0)
        events.publish("unloaded", "a")
        events.close()
        assert [event.kind for event in await first] == ["ready", "unloaded"]
        assert [event.kind for event in await second] == ["unloaded"]
        assert (first.result()[0].model, first.result()[0].replica) == ("a", 1)
        assert first.result()[0].data == {"ms": 5}
        # Who comes too late hears nothing, and waits for nothing.
        assert await heard(events) == []
        assert events._subscribers == set()

    run(main())


def test_that_who_does_not_read_loses_the_oldest_and_holds_nobody_up() -> None:
    async def main() -> None:
        events = EventBus()
        listening = events.subscribe()
        first = asyncio.create_task(anext(listening))
        await asyncio.sleep(0)
        for number in range(5000):
            events.publish("loading", str(number))
        assert (await first).model == "4000"
        events.close()
        rest = [event.model async for event in listening]
        assert rest[-1] == "4999"
        assert len(rest) <= 1000

    run(main())


def test_that_who_goes_is_forgotten() -> None:
    async def main() -> None:
        events = EventBus()
        task = asyncio.create_task(heard(events))
        await asyncio.sleep(0)
        assert len(events._subscribers) == 1
        task.cancel()
        await asyncio.wait({task})
        assert events._subscribers == set()

    run(main())


def test_that_the_log_says_it_too_and_louder_what_is_bad(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        events = EventBus()
        events.publish("ready", "a", ms=5)
        events.publish("died", "a", reason="was killed")

    with caplog.at_level(logging.INFO, "headrace.pool"):
        run(main())
    levels: list[Any] = [(record.getMessage(), record.levelname) for record in caplog.records]
    assert levels == [("headrace.pool.ready", "INFO"), ("headrace.pool.died", "WARNING")]
