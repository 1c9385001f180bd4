"""Workers on the echo engine, and what is asked of them."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast

import psutil
from msgspec.structs import replace

from headrace.core.constraint import FORMS
from headrace.core.events import Delta, Event, Finish
from headrace.core.model import ModelFile, ModelSpec
from headrace.core.request import GenerateRequest
from headrace.core.sampling import Sampling
from headrace.engines import open_engine
from headrace.engines.base import Engine, OpenRequest
from headrace.worker.process import WorkerProcess
from headrace.worker.spec import OnProgress, WorkerSpec
from headrace.worker.worker import Worker

_FIELDS = set(ModelSpec.__struct_fields__)
_SAMPLING = set(Sampling.__struct_fields__)


def echo(**given: Any) -> ModelSpec:
    """A model on the echo engine; what is no field of ModelSpec is an option of the engine."""
    fields = {name: value for name, value in given.items() if name in _FIELDS}
    options = {name: value for name, value in given.items() if name not in _FIELDS}
    named: dict[str, Any] = {"name": "echo", "model": "builtin:echo", **fields}
    return ModelSpec(**named, options=options)


def resolve(spec: ModelSpec, on_progress: OnProgress) -> WorkerSpec:
    on_progress("resolving", 1, 1)
    file = ModelFile(path="", format="none")
    return WorkerSpec(model=spec, file=file, engine="echo", engine_reason="asked for by name")


def ask(prompt: str | tuple[int, ...] | None = "abcdef", **given: Any) -> GenerateRequest:
    """A request; what is a field of Sampling goes there."""
    sampling = {name: value for name, value in given.items() if name in _SAMPLING}
    fields = {name: value for name, value in given.items() if name not in _SAMPLING}
    return GenerateRequest(prompt=prompt, sampling=Sampling(**sampling), **fields)


async def listed(stream: AsyncGenerator[Event, None]) -> list[Event]:
    return [event async for event in stream]


def text(events: list[Event], index: int = 0) -> str:
    deltas = (event for event in events if isinstance(event, Delta) and event.index == index)
    return "".join(delta.text for delta in deltas)


def finish(events: list[Event]) -> Finish:
    """The one Finish, which is the last event."""
    assert [isinstance(event, Finish) for event in events].index(True) == len(events) - 1
    return cast("Finish", events[-1])


async def first_delta(stream: AsyncGenerator[Event, None]) -> Delta:
    async for event in stream:
        if isinstance(event, Delta):
            return event
    raise AssertionError("no delta")


async def until(condition: Callable[[], object], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  # conditions of any kind
            await asyncio.sleep(0.005)


@asynccontextmanager
async def worker(
    open_engine: Callable[[str, OpenRequest], Engine] = open_engine, /, **given: Any
) -> AsyncIterator[Worker]:
    opened = Worker(echo(**given), resolve, open_engine=open_engine)
    try:
        await opened.start()
        yield opened
    finally:
        await opened.aclose()


def lying(**given: Any) -> AbstractAsyncContextManager[Worker]:
    """A worker whose engine declares every form, and does not care."""

    def opened(name: str, request: OpenRequest) -> Engine:
        engine = open_engine(name, request)
        facts = engine.facts
        able = replace(facts.capabilities, json_schema=True, forms=frozenset(FORMS))
        engine.facts = replace(facts, capabilities=able)
        return engine

    return worker(opened, **given)


@asynccontextmanager
async def process(**given: Any) -> AsyncIterator[WorkerProcess]:
    opened = WorkerProcess(echo(**given), resolve)
    try:
        await opened.start()
        yield opened
    finally:
        await opened.aclose()
        # Transports of a dead child are collected here and not in another test.
        await asyncio.sleep(0)
        gc.collect()


def children() -> list[psutil.Process]:
    """The workers' processes of this one; other tests may have left helpers of Python's own."""
    return [child for child in psutil.Process().children() if is_worker(child)]


def is_worker(process: psutil.Process) -> bool:
    try:
        return "headrace.worker.child" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        # It has gone, and whoever started it has yet to hear of that.
        return False
