"""The places of work that takes long, between clients."""

from __future__ import annotations

import asyncio
import threading

import pytest
from tests.worker.rig import until, worker

from headrace.core.request import CountRequest
from headrace.core.stream import collect_count
from headrace.worker.places import Places
from headrace.worker.prompt import Prompter


async def test_the_counts_of_one_client_do_not_hold_up_those_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Issue 11: three characters of one key were counted after 24 texts of 8 MB of another."""
    ends, count = threading.Event(), Prompter.count
    running: list[str] = []

    def counted(prompter: Prompter, request: CountRequest, *more: threading.Event) -> object:
        running.append(request.client)
        if request.client == "a":
            ends.wait(30)
        return count(prompter, request, *more)

    monkeypatch.setattr(Prompter, "count", counted)
    async with worker() as one:
        requests = [CountRequest(text="long", client="a") for _ in range(8)]
        slow = [asyncio.create_task(collect_count(one.ask(request))) for request in requests]
        await until(lambda: running)
        for _ in range(3):
            await asyncio.wait_for(collect_count(one.ask(CountRequest(text="abc", client="b"))), 20)
        assert running == ["a", "b", "b", "b"]
        # Those who have left do not keep their places.
        for task in slow[1:]:
            task.cancel()
        ends.set()
        assert (await slow[0]).count == 4
        assert (await collect_count(one.ask(CountRequest(text="abc", client="a")))).count == 3


async def test_a_client_has_one_place_and_requests_without_a_key_have_all() -> None:
    places = Places(2)
    keyless = [await places.take(""), await places.take("")]
    waiting = asyncio.create_task(places.take("a"))
    second = asyncio.create_task(places.take("a"))
    await asyncio.sleep(0)
    assert not waiting.done()
    keyless[0]()
    give_back = await waiting
    keyless[1]()
    await asyncio.sleep(0)
    assert not second.done()
    give_back()
    (await second)()
    third = asyncio.create_task(places.take("a"))
    (await third)()
