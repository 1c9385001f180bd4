"""Every way that a request can end: one root span, one record, and the same story in both."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import Awaitable, Callable
from itertools import product
from typing import Any, cast

import pytest
from opentelemetry.trace import StatusCode
from tests.telemetry.watched import STEPS, Observed, Scripted, Told, ask, finish, parent

from headrace.core import errors
from headrace.core.constraint import Constraint
from headrace.core.errors import (
    CapacityError,
    GenerationFailed,
    HeadraceError,
    InvalidRequest,
    QueueFull,
    QueueTimeout,
    RequestError,
    UnknownModel,
    WorkerDied,
    kinds,
)
from headrace.core.events import Delta, Event, Finish
from headrace.core.metrics import DeviceUse, InferenceMetrics
from headrace.core.model import ModelSpec
from headrace.core.record import RequestRecord
from headrace.core.request import EmbedRequest, GenerateRequest, Message, RerankRequest
from headrace.core.sampling import Sampling
from headrace.core.stream import collect_ranking, collect_vectors
from headrace.telemetry import content as contents
from headrace.telemetry import names
from headrace.telemetry.content import Redactor

pytestmark = pytest.mark.usefixtures("light_collections")

LEAVES = [kind for kind in kinds() if not kind.__subclasses__()]


async def read(backend: Observed, request: GenerateRequest) -> list[Event]:
    stream = backend.ask(request)
    try:
        return [event async for event in stream]
    finally:
        await stream.aclose()


async def one(told: Told, steps: Any = None, request: GenerateRequest | None = None) -> Any:
    """Have one request end in whatever way, and return its record."""
    backend, request = Scripted(), request or ask()
    if steps is not None:
        backend.scripts[request.id] = steps
    try:
        await read(told.observe(backend), request)
    except (HeadraceError, ValueError):
        assert steps is not None
    told.check(1)
    return told.records[0]


def status(told: Told, record: RequestRecord) -> StatusCode:
    (root,) = (span for span in told.of(record) if span.name == record.spans[0].name)
    return root.status.status_code


async def test_a_whole_answer() -> None:
    """T1, T3: the caller's span is the root's parent, and what has no error has no status."""
    told = Told()
    record = await one(told, request=ask(5, sampling=Sampling(max_tokens=9, stop=("s",)), n=2))
    assert (record.outcome, record.error, record.finish_reasons) == ("ok", "", ("stop",))
    assert record.trace_id == f"{5:032x}"
    assert record.spans[0].parent_id == f"{5:016x}"
    assert status(told, record) is StatusCode.UNSET
    assert record.parameters == {"max_tokens": 9, "stop": ("s",), "n": 2}
    attributes = record.spans[0].attributes
    assert record.spans[0].name == "text_completion m"
    expected = {
        names.OPERATION: "text_completion",
        names.PROVIDER: "headrace",
        names.REQUEST_MODEL: "m",
        names.RESPONSE_MODEL: "m",
        names.INPUT_TOKENS: 7,
        names.OUTPUT_TOKENS: 2,
        names.FINISH_REASONS: ("stop",),
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.stop_sequences": ("s",),
        "gen_ai.request.choice.count": 2,
    }
    assert expected.items() <= attributes.items()
    assert names.INPUT_MESSAGES not in attributes


@pytest.mark.parametrize("kind", LEAVES)
@pytest.mark.parametrize("phase", STEPS)
async def test_each_error_in_each_phase(kind: type[HeadraceError], phase: str) -> None:
    """T3: by HTTP's conventions, what the client could do better is no failed span."""
    told = Told()
    record = await one(told, [*STEPS[phase], kind("It said so.", detail="hidden")])
    refused = issubclass(kind, RequestError | CapacityError)
    unset = issubclass(kind, RequestError | QueueFull | QueueTimeout)
    assert record.outcome == ("refused" if refused else "error")
    assert (record.error, record.message) == (kind.__name__, "It said so.")
    assert status(told, record) is (StatusCode.UNSET if unset else StatusCode.ERROR)
    assert record.spans[0].attributes[names.ERROR] == kind.__name__
    assert "hidden" not in str([span.to_json() for span in told.spans])
    assert record.metrics.total_ms >= 0
    if phase == "decode":
        assert (record.metrics.chunks, record.metrics.usage.completion_tokens) == (2, 2)


async def test_what_is_read_to_no_end_ends_with_the_backend() -> None:
    told, backend = Told(), Scripted()
    observed, streams = told.observe(backend, attempts=ModelSpec(name="m", model="m")), []
    for number, phase in enumerate(STEPS):
        backend.scripts[(asked := ask(number + 1)).id] = [*STEPS[phase], None]
        stream = observed.ask(asked)
        for _ in STEPS[phase]:
            await anext(stream)
        streams.append(stream)
    whole = observed.ask(ask(9))
    while not isinstance(await anext(whole), Finish):
        pass
    await observed.aclose()
    told.check(5)
    assert [one.error for one in told.records] == ["Draining"] * 4 + [""]
    for stream in [*streams, whole]:
        await stream.aclose()
    told.check(5)


async def test_what_is_no_error_of_ours() -> None:
    told = Told()
    record = await one(told, [*STEPS["decode"], ValueError("a secret")])
    assert (record.outcome, record.error, record.message) == ("error", "ValueError", "")
    assert status(told, record) is StatusCode.ERROR


async def test_an_answer_without_an_end_is_an_error() -> None:
    record = await one(Told(), STEPS["decode"])
    assert (record.outcome, record.error) == ("error", "GenerationFailed")


async def test_what_breaks_after_the_last_word_breaks_nothing() -> None:
    told = Told()
    record = await one(told, [*STEPS["decode"], finish(ask()), WorkerDied("late")])
    assert (record.outcome, record.error) == ("ok", "")
    assert status(told, record) is StatusCode.UNSET


async def test_the_error_has_the_figures() -> None:
    """W16: what the engine counted is what is told."""
    figures = finish(ask()).metrics
    record = await one(Told(), [GenerationFailed("broke", metrics=figures)])
    assert record.metrics == figures


async def test_a_name_from_outside_becomes_no_name_of_a_span() -> None:
    told = Told()
    backend, request = Scripted(), ask(model="x" * 5000)
    backend.scripts[request.id] = [UnknownModel("It is not here.")]
    with pytest.raises(UnknownModel):
        await read(told.observe(backend), request)
    told.check(1)
    assert told.records[0].spans[0].name == "text_completion"
    assert len(str(told.records[0].spans[0].attributes[names.REQUEST_MODEL])) == 256


async def consume(stream: Any) -> None:
    async for _ in stream:
        pass


async def by_closing(stream: Any, _task: Any) -> None:
    await stream.aclose()


async def by_cancelling(_stream: Any, task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def by_forgetting(_stream: Any, _task: Any) -> None:
    return


End = Callable[[Any, asyncio.Task[None]], Awaitable[None]]


@pytest.mark.parametrize("phase", STEPS)
@pytest.mark.parametrize("end", [by_closing, by_cancelling, by_forgetting])
async def test_cancelled_in_each_phase(phase: str, end: End) -> None:
    """T3, W16: with the figures that were seen up to then."""
    told, backend, request = Told(), Scripted(), ask()
    backend.scripts[request.id] = [*STEPS[phase], None]
    observed = told.observe(backend)
    stream = observed.ask(request)

    if end is by_cancelling:
        task = asyncio.create_task(consume(stream))
        await backend.barrier(request.id).reached.wait()
    else:
        task = asyncio.create_task(asyncio.sleep(0))
        for _ in STEPS[phase]:
            await anext(stream)
    (running,) = observed.recorder.running()
    assert (running.id, running.phase) == (request.id, phase)
    await end(stream, task)
    del stream
    for _ in range(5):
        gc.collect()
        await asyncio.sleep(0)
    told.check(1)
    (record,) = told.records
    assert (record.outcome, record.error) == ("cancelled", "")
    assert not record.spans[0].failed
    assert record.metrics.outcome == "cancelled"
    assert record.metrics.usage.completion_tokens == (2 if phase == "decode" else 0)
    assert record.metrics.usage.prompt_tokens == (7 if phase in {"prefill", "decode"} else 0)
    assert backend.ended == [request.id]
    assert observed.recorder.running() == ()
    drawn = {span.name for span in record.spans}
    assert (names.DECODE in drawn) == (phase == "decode")
    assert (names.LOAD in drawn) == (phase in {"loading", "prefill"})


async def test_who_leaves_after_the_finish_has_had_his_answer() -> None:
    told = Told()
    stream = told.observe(Scripted()).ask(ask())
    async for event in stream:
        if not isinstance(event, Delta) and hasattr(event, "finish_reasons"):
            break
    await stream.aclose()
    told.check(1)
    assert told.records[0].outcome == "ok"


async def test_sixty_four_at_once_in_every_way() -> None:
    """T3: each has its own root below its own caller, and none sees another's context."""
    told, backend = Told(), Scripted()
    observed = told.observe(backend)
    ways: list[Any] = [
        *([*STEPS[phase], kind("no")] for phase, kind in product(STEPS, LEAVES)),
        *([*steps, None] for steps in STEPS.values()),
        *[None] * 20,
    ]
    ways = ways[::-1][:64]
    asked = [ask(number + 1) for number in range(64)]

    async def run(request: GenerateRequest, way: Any) -> None:
        if way is not None:
            backend.scripts[request.id] = way
        reading = asyncio.create_task(read(observed, request))
        if way is not None and way[-1] is None:
            await backend.barrier(request.id).reached.wait()
            reading.cancel()
        await asyncio.wait({reading})
        _ = reading.cancelled() or reading.exception()

    await asyncio.gather(*map(run, asked, ways))
    told.check(64)
    by_id = {record.id: record for record in told.records}
    for number, request in enumerate(asked, 1):
        record = by_id[request.id]
        assert record.trace_id == f"{number:032x}"
        assert record.spans[0].parent_id == f"{number:016x}"
        handed_on = backend.received_as(request.id).traceparent
        assert handed_on == f"00-{number:032x}-{record.spans[0].span_id}-01"
    assert {record.outcome for record in told.records} == {"ok", "refused", "error", "cancelled"}


async def test_embeddings_and_rankings() -> None:
    told, backend = Told(), Scripted()
    observed = told.observe(backend)
    await collect_vectors(
        observed.ask(EmbedRequest(inputs=("a",), model="m", traceparent=parent(1)))
    )
    await collect_ranking(observed.ask(RerankRequest(query="q", documents=("d",), model="also")))
    bad = EmbedRequest(inputs=("a",), model="m")
    backend.scripts[bad.id] = [InvalidRequest("no")]
    with pytest.raises(InvalidRequest):
        await collect_vectors(observed.ask(bad))
    told.check(3)
    assert [record.outcome for record in told.records] == ["ok", "ok", "refused"]
    assert [record.spans[0].name for record in told.records] == [
        "embeddings m",
        "rerank m",
        "embeddings m",
    ]
    assert told.records[1].model == "m"


async def test_a_sink_that_raises_fails_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def record(self, record: RequestRecord) -> None:
            raise RuntimeError(record.id)

    told, backend = Told(), cast("Any", Scripted())
    observed = told.observe(backend, sinks=[Broken(), told])
    for _ in range(3):
        assert await read(observed, ask())
    told.check(3)
    assert len([one for one in caplog.records if "sink" in one.getMessage()]) == 1


async def test_without_opentelemetry_there_are_records_alone() -> None:
    """T2: ids of our own, the caller's trace, and the caller's own span is handed outside."""
    told = Told(otel=False)
    backend = Scripted()
    await read(told.observe(backend), ask(9))
    await read(told.observe(backend), ask(9, traceparent="broken", tracestate="a=b"))
    assert told.spans == []
    first, second = told.records
    assert (first.trace_id, first.spans[0].parent_id) == (f"{9:032x}", f"{9:016x}")
    assert len(second.trace_id) == 32
    assert second.spans[0].parent_id == ""
    assert second.trace_id != first.trace_id


async def test_content_is_kept_where_it_is_asked_for_and_redacted() -> None:
    """T3: in the record, and on the span where the variable says so too."""
    messages = (Message("user", "My key is sk-abcdefghijklmnopqrstuv."),)
    for tells in (False, True):
        told = Told(content=tells)
        backend = Scripted()
        request = ask(messages=messages, prompt=None)
        backend.scripts[request.id] = [Delta("mail me@exam"), Delta("ple.org"), finish(request)]
        await read(told.observe(backend, capture=Redactor()), request)
        told.check(1)
        (record,) = told.records
        assert record.content is not None
        assert record.content.input == [{"role": "user", "content": "My key is [redacted]."}]
        assert record.content.answered == ("mail [redacted]",)
        attributes = record.spans[0].attributes
        assert (names.INPUT_MESSAGES in attributes) == tells
        if tells:
            assert attributes[names.OUTPUT_MESSAGES] == (
                '[{"role":"assistant","parts":[{"type":"text","content":"mail [redacted]"}],'
                '"finish_reason":"stop"}]'
            )


def test_what_was_asked_is_not_copied_for_the_parameters() -> None:
    """T3: nor told; a schema may hold content, and is kept as that is."""
    schema = {"description": "of jo@example.org", "enum": [1, 2, True, None]}
    prompt = tuple(range(300_000))
    asked = ask(
        prompt=prompt,
        constraint=Constraint(json_schema=schema),
        n=2,
        template_options={"deep": True},
    )
    tracemalloc.start()
    try:
        bare = contents.parameters(asked, None)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert bare == {"n": 2, "constraint": True, "template_options": True}
    kept = contents.parameters(asked, Redactor())
    redacted = {"description": "of [redacted]", "enum": [1, 2, True, None]}
    assert kept["constraint"] == {"json_schema": redacted}
    assert kept["template_options"] == {"deep": True}
    embed = EmbedRequest(inputs=("secret",), dimensions=3, client="c")
    rerank = RerankRequest(query="secret", documents=("secret",), top_n=1)
    assert contents.parameters(embed, None) == {"dimensions": 3}
    assert contents.parameters(rerank, None) == {"top_n": 1}


def test_token_ids_are_not_kept() -> None:
    """T3: nobody can redact them."""
    for asked, kept in (
        (ask(prompt=(1, 2)), None),
        (EmbedRequest(inputs=((1, 2), "card 4111111111111111")), [None, "card [redacted]"]),
    ):
        assert contents.content(asked, {}, Redactor()).input == kept


def test_devices_are_told_by_their_keys() -> None:
    """Mean and peak of memory and of how busy it was, and the energy, where somebody tells."""
    gpu = DeviceUse(
        name="cuda:0 NVIDIA H200",
        total=9,
        used=8,
        worker_used=7,
        worker_mean=5,
        worker_peak=6,
        busy_mean=0.5,
        busy_peak=1.0,
        joules=3.5,
    )
    told = names.figures(InferenceMetrics(started_at=1.0, devices=(gpu,)))
    of_gpu = {name: value for name, value in told.items() if "device" in name}
    assert of_gpu == {
        "headrace.device.cuda:0.worker_mean": 5,
        "headrace.device.cuda:0.worker_peak": 6,
        "headrace.device.cuda:0.busy_mean": 0.5,
        "headrace.device.cuda:0.busy_peak": 1.0,
        "headrace.device.cuda:0.joules": 3.5,
    }


def test_the_tree_of_errors_is_whole() -> None:
    assert {one.__name__ for one in LEAVES} >= {"QueueFull", "NodeGone", "UpstreamError"}
    assert all(issubclass(one, errors.HeadraceError) for one in LEAVES)
