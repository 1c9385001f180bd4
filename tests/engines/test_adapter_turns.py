"""Requests of different adapters take turns at llama.cpp, which computes one adapter at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.adapters_made import gguf_adapter
from tests.tiny_gguf import tiny_gguf

from headrace.core.constraint import Constraint
from headrace.core.sampling import Sampling
from headrace.engines.base import (
    Admitted,
    EngineRequest,
    OpenRequest,
    RawDelta,
    RawEvent,
    RawFinish,
)
from headrace.engines.llamacpp.engine import Engine
from headrace.engines.llamacpp.groups import Groups, in_turns
from headrace.models.adapter import checked
from headrace.models.inspect import inspect


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


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Server:
    """Writes the numbers from 1, one for each second that passes; a prompt takes none."""

    def __init__(self, slice_s: float = 10) -> None:
        self.clock = Clock()
        self.groups = Groups(slice_s, self.clock)
        self.starts: list[tuple[str, int]] = []
        self.finished: dict[str, RawFinish] = {}
        self.texts: dict[str, list[int]] = {}

    async def start(self, request: EngineRequest) -> AsyncGenerator[RawEvent, None]:
        known = len(request.answered)
        self.starts.append((request.adapter, known))
        prompt = len(request.token_ids) + known
        yield Admitted(prompt, prompt, cached=known)
        for number in range(known, known + request.max_tokens):
            await asyncio.sleep(0)
            self.clock.now += 1
            yield RawDelta(b".", (number + 1,))
        yield RawFinish(
            reason="length",
            prompt_tokens=prompt,
            completion_tokens=request.max_tokens,
            cached_tokens=known,
        )

    async def ask(self, adapter: str, tokens: int, **more: Any) -> None:
        request = EngineRequest(token_ids=(7, 8), max_tokens=tokens, adapter=adapter, **more)
        text = self.texts.setdefault(adapter, [])
        admitted = 0
        async with aclosing(in_turns(self.groups, request, self.start)) as events:
            async for event in events:
                admitted += isinstance(event, Admitted)
                if isinstance(event, RawDelta):
                    text += event.token_ids
                elif isinstance(event, RawFinish):
                    self.finished[adapter] = event
        assert admitted == 1


async def test_a_long_answer_gives_way() -> None:
    """Issue 17.4: what has no end waits for others after its time, and goes on behind them."""
    server = Server()
    await asyncio.gather(server.ask("a", 35), server.ask("b", 12), server.ask("c", 3))
    assert server.starts == [
        *(("a", 0), ("b", 0), ("c", 0)),
        *(("a", 11), ("b", 11), ("a", 22)),
    ]
    assert server.texts["a"] == [*range(1, 36)]
    finish = server.finished["a"]
    counts = (finish.prompt_tokens, finish.completion_tokens, finish.cached_tokens)
    assert counts == (2, 35, 0)


async def test_nothing_is_paused_for_its_own_adapter() -> None:
    """Issue 17.4: only others end a turn."""
    server = Server()
    await asyncio.gather(server.ask("a", 40), server.ask("a", 40))
    assert server.starts == [("a", 0), ("a", 0)]


async def test_a_grammar_is_not_paused() -> None:
    """Issue 17.4: it cannot be taken up in the middle."""
    server = Server()
    await asyncio.gather(
        server.ask("a", 40, constraint=Constraint(choice=("x",))), server.ask("b", 3)
    )
    assert server.starts == [("a", 0), ("b", 0)]


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


async def test_on_a_real_model(smollm2_path: Path, tmp_path: Path) -> None:
    """Issue 17.4: a short request of another adapter is answered while a long one is."""
    model = inspect(tiny_gguf(tmp_path / "tiny.gguf", smollm2_path))
    files = [
        msgspec.structs.replace(checked(gguf_adapter(tmp_path / name, seed), model), name=name)
        for seed, name in enumerate("ab")
    ]
    options = {"slots": 2, "threads": 1}
    engine = Engine(
        OpenRequest(model=model, context_length=256, options=options, adapters=tuple(files))
    )
    engine._groups.slice_s = 0  # pyright: ignore[reportPrivateUsage]
    engine._groups.clock = Clock()  # pyright: ignore[reportPrivateUsage]
    token_ids = tuple(engine.tokenize("The rivers of the north", add_special=True))
    begun, finished = asyncio.Event(), list[tuple[str, int, int, int]]()

    async def ask(adapter: str, most: int) -> None:
        sampling = Sampling(temperature=0, ignore_eos=True)
        request = EngineRequest(
            token_ids=token_ids, max_tokens=most, adapter=adapter, sampling=sampling
        )
        made = 0
        async with aclosing(engine.generate(request)) as events:
            async for event in events:
                if isinstance(event, RawDelta):
                    made += len(event.token_ids)
                    begun.set()
                elif isinstance(event, RawFinish):
                    counts = (event.prompt_tokens, event.completion_tokens)
                    finished.append((adapter, made, *counts))

    async def ask_later() -> None:
        await begun.wait()
        await ask("b", 5)

    try:
        await asyncio.gather(ask("a", 200), ask_later())
    finally:
        engine.close()
    prompt = len(token_ids)
    assert finished == [("b", 5, prompt, 5), ("a", 200, prompt, 200)]
