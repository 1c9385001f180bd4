"""Attempts at a request on real workers: processes that are killed, upstreams, and loads."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.api.fakes import CHAT, FakeBackend, chat
from tests.api.test_disconnect import PHASES, Stuck, Wire
from tests.fakes.upstream import Upstream
from tests.telemetry.watched import Told, parent, pool_of
from tests.worker.rig import ask, echo, resolve

from headrace.api.exchange import Exchange
from headrace.core.backend import Backend
from headrace.core.errors import LoadFailed, UnknownModel, WorkerDied
from headrace.core.events import Delta, Event
from headrace.core.model import ModelFile, ModelSpec
from headrace.core.request import EmbedRequest, GenerateRequest, Message
from headrace.core.stream import collect_vectors
from headrace.pool.pool import Pool
from headrace.telemetry import names
from headrace.telemetry.spans import Parent, Span
from headrace.worker.spec import OnProgress, WorkerSpec
from headrace.worker.worker import Worker

pytestmark = pytest.mark.usefixtures("light_collections")


@asynccontextmanager
async def running(told: Told, **given: Any) -> AsyncIterator[Pool]:
    pool = pool_of(told, echo(**given))
    try:
        await pool.start()
        yield pool
    finally:
        await pool.aclose()


async def read(backend: Backend, request: GenerateRequest) -> list[Event]:
    stream = backend.ask(request)
    try:
        return [event async for event in stream]
    finally:
        await stream.aclose()


async def read_and_kill(pool: Pool, request: GenerateRequest) -> str:
    """Read an answer whose worker is killed at its third token."""
    said: list[str] = []
    stream = pool.ask(request)
    try:
        async for event in stream:
            if isinstance(event, Delta):
                said.append(event.text)
                if len(said) == 3:
                    os.kill(pids(pool)[0], signal.SIGKILL)
    finally:
        await stream.aclose()
    return "".join(said)


def pids(pool: Pool) -> list[int]:
    return [
        one.worker.pid
        for entry in pool.entries.values()
        for one in entry.replicas
        if one.worker and one.worker.pid
    ]


async def test_sixty_four_at_once_on_a_process() -> None:
    """T1: admission, prefill and decode below the request, and what failed among what did not."""
    told = Told()
    async with running(told) as pool:
        asked = [
            ask("abcdef", traceparent=parent(number), model="echo" if number % 4 else "none")
            for number in range(1, 65)
        ]
        results = await asyncio.gather(*(read(pool, one) for one in asked), return_exceptions=True)
        (pid,) = pids(pool)
    told.check(64)
    assert sum(isinstance(one, UnknownModel) for one in results) == 16
    by_id = {record.id: record for record in told.records}
    for number, request in enumerate(asked, 1):
        record = by_id[request.id]
        root = record.spans[0]
        assert (record.trace_id, root.parent_id) == (f"{number:032x}", f"{number:016x}")
        if request.model == "none":
            assert (record.outcome, len(record.spans)) == ("refused", 1)
            continue
        steps = {span.name: span for span in record.spans}
        assert {names.QUEUE, names.ATTEMPT, names.DECODE} <= steps.keys()
        assert steps[names.ATTEMPT].parent_id == root.span_id
        assert steps[names.DECODE].parent_id == steps[names.ATTEMPT].span_id
        attempt = steps[names.ATTEMPT].attributes
        assert (attempt[names.WORKER_PID], attempt[names.ENGINE]) == (pid, "echo")
        assert (attempt[names.OUTPUT_TOKENS], attempt[names.FINISH_REASONS]) == (7, ("stop",))
        assert record.metrics.usage.completion_tokens == 7
        assert root.attributes[names.OUTPUT_TOKENS] == 7


async def test_what_is_read_to_no_end_ends_with_the_pool() -> None:
    """T1: whoever holds the stream may never look at it again."""
    told = Told()
    async with running(told, tokens_per_second=50) as pool:
        stream = pool.ask(ask("abcdef"))
        while not isinstance(await anext(stream), Delta):
            pass
        assert told.records == []
    told.check(1)
    (record,) = told.records
    assert (record.outcome, record.error) == ("refused", "Draining")
    (attempt,) = (span for span in record.spans if span.name == names.ATTEMPT)
    assert attempt.failed
    await stream.aclose()
    told.check(1)


async def test_a_worker_that_is_killed_and_an_answer_that_goes_on() -> None:
    """T3: two attempts, of which the first failed; the request did not."""
    told = Told()
    async with running(told, tokens_per_second=50, continuation="fast") as pool:
        request = ask("abcdefghij", model="echo", traceparent=parent(1))
        assert await read_and_kill(pool, request) == "abcdefghij"
    told.check(1)
    (record,) = told.records
    assert (record.outcome, record.metrics.continuations) == ("ok", 1)
    attempts = [span for span in record.spans if span.name == names.ATTEMPT]
    assert [span.failed for span in attempts] == [True, False]
    assert attempts[0].attributes[names.ERROR] == "WorkerDied"
    assert attempts[0].attributes[names.WORKER_PID] != attempts[1].attributes[names.WORKER_PID]
    assert not record.spans[0].failed


async def test_a_worker_that_is_killed_and_an_answer_that_breaks_off() -> None:
    """T3, W16: with the tokens that had come."""
    told = Told()
    async with running(told, tokens_per_second=50, continuation="off") as pool:
        with pytest.raises(WorkerDied):
            await read_and_kill(pool, ask("abcdefghij", model="echo"))
    told.check(1)
    (record,) = told.records
    assert (record.outcome, record.error, record.spans[0].failed) == ("error", "WorkerDied", True)
    assert record.metrics.usage.completion_tokens >= 3
    assert record.metrics.usage.prompt_tokens == 10
    assert record.metrics.time_to_first_token_ms is not None


async def test_a_worker_that_dies_again() -> None:
    """T3, W16: what is told was seen of the first attempt, and no load was before it."""
    told = Told()
    async with running(told, tokens_per_second=50, crash_after=3) as pool:
        with pytest.raises(WorkerDied):
            await read(pool, ask("abcdefghij", model="echo"))
    told.check(1)
    (record,) = told.records
    first, second = (span for span in record.spans if span.name == names.ATTEMPT)
    assert (first.failed, second.failed) == (True, True)
    assert record.metrics.load_ms == 0
    assert record.metrics.queue_ms
    drawn = {span.name: span for span in record.spans}
    assert names.LOAD not in drawn
    assert drawn[names.QUEUE].ms < first.ms
    assert drawn[names.PREFILL].parent_id == drawn[names.DECODE].parent_id == first.span_id


async def test_a_load_is_a_trace_of_its_own() -> None:
    """W5: with the machine, the engine and the settings; the request that waited links to it."""
    told = Told()
    pool = pool_of(told, echo(load_s=0.1))
    try:
        await read(pool, ask("abc", model="echo"))
    finally:
        await pool.aclose()
    told.check(1)
    (start,) = (span for span in told.spans if span.name == names.START)
    assert start.parent is None
    assert start.attributes is not None
    expected = {"headrace.source": "builtin:echo", "headrace.engine": "echo"}
    assert expected.items() <= start.attributes.items()
    known = {"os.type", "host.arch", "headrace.memory", "headrace.cpu.instruction_sets"}
    assert known <= start.attributes.keys()
    assert start.attributes["headrace.option.load_s"] == "0.1"
    (load,) = (span for span in told.spans if span.name == names.LOAD)
    assert [link.context for link in load.links] == [start.context]
    (record,) = told.records
    assert record.metrics.load_ms >= 100


async def test_a_load_that_fails() -> None:
    """W5, T3: both spans have failed."""
    told = Told()
    pool = pool_of(told, echo(fail_load="It would not."))
    try:
        with pytest.raises(LoadFailed):
            await read(pool, ask("abc", model="echo"))
    finally:
        await pool.aclose()
    told.check(1)
    (start,) = (span for span in told.spans if span.name == names.START)
    assert not start.status.is_ok
    assert start.status.description == "It would not."
    assert told.records[0].error == "LoadFailed"


async def test_embeddings_on_a_process() -> None:
    told = Told()
    async with running(told, task="embed") as pool:
        await collect_vectors(pool.ask(EmbedRequest(inputs=("abc",), model="echo")))
    told.check(1)
    drawn = {span.name: span for span in told.records[0].spans}
    assert told.records[0].spans[0].name == "embeddings echo"
    assert {names.ATTEMPT, names.PREFILL} <= drawn.keys()
    assert drawn[names.ATTEMPT].attributes[names.INPUT_TOKENS] == 3


@pytest.mark.parametrize("how", ["read", "refused", "left"])
async def test_what_has_ended_is_not_left_to_the_garbage_collector(how: str) -> None:
    """Nothing holds in a circle what belonged to a request, or all streams stop for it later."""
    told, kept = Told(), list[object]()
    async with running(
        told, text="abc" if how == "read" else "x" * 99, tokens_per_second=50
    ) as pool:
        for _ in range(2):  # in the first, much is made once
            gc.collect()
            gc.set_debug(gc.DEBUG_SAVEALL)
            try:
                for stream in (False, True):
                    body = chat(model="none" if how == "refused" else "echo", stream=stream)
                    wire = Wire(pool, CHAT, body)
                    if how == "left":
                        await asyncio.sleep(0.1)
                        await wire.leave()
                    await wire.task
                await asyncio.sleep(0.1)
                del wire
                gc.collect()
                known = GenerateRequest | Exchange | Span
                kept = [one for one in gc.garbage if isinstance(one, known)]
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
        outcomes = {"read": "ok", "refused": "refused", "left": "cancelled"}
        assert [record.outcome for record in told.records] == [outcomes[how]] * 4
        assert kept == []


async def test_the_log_of_a_worker_names_the_trace(caplog: pytest.LogCaptureFixture) -> None:
    """T1: the child's own record belongs to the same trace."""
    caplog.set_level("INFO", "headrace.worker")
    worker = Worker(echo(), resolve)
    await worker.start()
    try:
        await read(worker, ask("abc", traceparent=parent(77)))
    finally:
        await worker.aclose()
    (line,) = (one for one in caplog.records if one.getMessage() == "headrace.request")
    assert vars(line)["data"]["trace_id"] == f"{77:032x}"


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up(phase: str, *, stream: bool) -> None:
    """T3: the end of the connection is the end of the span, in each phase."""
    told, stuck = Told(), Stuck(*PHASES[phase])
    wire = Wire(told.observe(FakeBackend(stuck)), CHAT, chat(stream=stream))
    await stuck.there.wait()
    await wire.leave()
    told.check(1)
    assert told.records[0].outcome == "cancelled"
    assert not told.records[0].spans[0].failed


def _remote(spec: ModelSpec, on_progress: OnProgress) -> WorkerSpec:
    provider, _, model = spec.model.partition(":")
    file = ModelFile(path=model, format="remote", provider=provider)
    return WorkerSpec(model=spec, file=file, engine="openai", engine_reason="")


@pytest.mark.parametrize("otel", [True, False])
async def test_an_upstream_is_told_the_trace(*, otel: bool) -> None:
    """T1: the call is a client's span, below which the upstream's are; nobody hangs on air."""
    upstream, told = Upstream(), Told(otel=otel)
    await upstream.start()
    options = {"base_url": f"{upstream.url}/v1"}
    spec = ModelSpec(name="far", model="openai:gpt-far", options=options)
    remote = Worker(spec, _remote)
    await remote.start()
    observed = told.observe(remote, attempts=spec)
    request = GenerateRequest(
        model="far",
        messages=(Message("user", "Hello"),),
        traceparent=parent(3),
        tracestate="vendor=1",
    )
    try:
        await read(observed, request)
        await read(observed, GenerateRequest(model="far", messages=request.messages))
    finally:
        await remote.aclose()
        await upstream.stop()
    record, second = told.records
    (call,) = (span for span in record.spans if span.kind == "client")
    assert call.name == "chat gpt-far"
    expected = {names.PROVIDER: "openai", names.SERVER_ADDRESS: "127.0.0.1"}
    assert expected.items() <= call.attributes.items()
    headers = upstream.requests[0].headers
    told_parent = Parent.parse(headers["traceparent"])
    assert told_parent is not None
    assert told_parent.trace_id == record.trace_id == f"{3:032x}"
    assert told_parent.span_id == (call.span_id if otel else f"{3:016x}")
    assert headers["tracestate"] == "vendor=1"
    assert Parent.parse(upstream.requests[1].headers["traceparent"])[0] == second.trace_id  # pyright: ignore[reportOptionalSubscript]
    assert "tracestate" not in upstream.requests[1].headers
    if otel:
        told.check(2)
