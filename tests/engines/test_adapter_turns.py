"""Requests of different adapters take turns at llama.cpp, which computes one adapter at a time."""

from __future__ import annotations

import asyncio

import pytest

from headrace.engines.llamacpp.groups import Groups


class Rig:
    """Requests that run until they are told to end; `begun` has them in order."""

    def __init__(self) -> None:
        self.groups = Groups()
        self.begun: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._ends: dict[str, asyncio.Event] = {}

    async def ask(self, *names: str) -> None:
        """Send requests, each named by its adapter and a digit."""
        for name in names:
            self._ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._run(name))
            await settled()

    async def end(self, *names: str) -> None:
        for name in names:
            self._ends[name].set()
            await settled()

    async def _run(self, name: str) -> None:
        async with self.groups.turn(name[0]):
            self.begun.append(name)
            await self._ends[name].wait()


async def settled() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


async def test_requests_of_one_adapter_run_together() -> None:
    """Issue 17.4: as many as there are, as long as nobody else waits."""
    rig = Rig()
    await rig.ask("a1", "a2", "a3")
    assert rig.begun == ["a1", "a2", "a3"]


async def test_who_waits_is_not_passed_by_those_that_come_later() -> None:
    """Issue 17.4, fair with the others: groups begin in the order in which they came."""
    rig = Rig()
    await rig.ask("a1", "b1", "a2", "c1", "b2")
    assert rig.begun == ["a1"]
    await rig.end("a1")
    assert rig.begun == ["a1", "b1", "b2"]
    await rig.ask("b3")
    assert rig.begun == ["a1", "b1", "b2"]
    await rig.end("b2", "b1")
    assert rig.begun[3:] == ["a2"]
    await rig.end("a2")
    assert rig.begun[4:] == ["c1"]
    await rig.end("c1")
    assert rig.begun[5:] == ["b3"]


@pytest.mark.parametrize("gone", ["b1", "a1"])
async def test_a_cancelled_request_holds_nobody_up(gone: str) -> None:
    """Issue 17.4: one that waits or runs and is cancelled gives its place back."""
    rig = Rig()
    await rig.ask("a1", "b1", "a2")
    rig.tasks[gone].cancel()
    await settled()
    # Without the one that waited, nobody is in the way of the next of the same adapter.
    assert rig.begun == (["a1", "a2"] if gone == "b1" else ["a1", "b1"])
    left = [name for name in rig.tasks if name != gone]
    await rig.end(*left)
    await asyncio.gather(*(rig.tasks[name] for name in left))
    await rig.ask("c1")
    assert rig.begun[-1] == "c1"


async def test_one_that_is_cancelled_as_it_begins_gives_its_place_back() -> None:
    """Issue 17.4: between the end of another and its own first step."""
    rig = Rig()
    async with rig.groups.turn("a"):
        await rig.ask("b1", "c1")
    # b1 may run from now on, and has not been told.
    rig.tasks["b1"].cancel()
    await settled()
    assert rig.begun == ["c1"]
