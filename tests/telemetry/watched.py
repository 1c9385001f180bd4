"""Backends that do as they are told, observed; and what must be true of all that is told of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from tests.pool.rig import Machine
from tests.worker.rig import resolve

from headrace.core.events import Delta, Event, Finish, Progress, Ranked, Ranking, Vectors
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.model import ModelInfo, ModelSpec
from headrace.core.record import RequestRecord
from headrace.core.request import AnyRequest, EmbedRequest, GenerateRequest, RerankRequest
from headrace.pool.ledger import Ledger
from headrace.pool.observer import AttemptObservation, NullObservation
from headrace.pool.pool import Pool
from headrace.pool.worker import PooledWorker
from headrace.telemetry.otel import OpenTelemetry
from headrace.telemetry.recorder import Recorder
from headrace.telemetry.spans import Tracing
from headrace.testing import Barrier, ScriptedBackend, Step
from headrace.worker.process import WorkerProcess

MODEL = ModelInfo(id="m", source="builtin:m", engine="scripted", aliases=("also",))
STEPS: dict[str, list[Event]] = {
    "queued": [Progress("queued")],
    "loading": [Progress("queued"), Progress("loading")],
    "prefill": [Progress("loading"), Progress("prefill", 1, 7)],
    "decode": [Progress("prefill", 7, 7), Delta("a", (1,)), Delta("b", (2,))],
}
"""What has come when a request is in a phase."""
USAGE = Usage(prompt_tokens=7, completion_tokens=2)


def finish(request: AnyRequest) -> Finish:
    metrics = InferenceMetrics(
        started_at=1.0,
        queue_ms=0.0,
        prefill_ms=0.01,
        total_ms=1.0,
        chunks=2,
        usage=USAGE,
        engine="scripted",
        model="m",
    )
    return Finish(("stop",), USAGE, metrics)


class Scripted(ScriptedBackend):
    """Plays the script of a request's id: events, an error, or None for a step without an end."""

    def __init__(self, *models: ModelInfo) -> None:
        super().__init__(self._steps, models or (MODEL,))
        self.scripts: dict[str, Sequence[Event | Exception | None]] = {}
        self._barriers: dict[str, Barrier] = {}

    def barrier(self, number: str) -> Barrier:
        """The step without an end of a request."""
        return self._barriers.setdefault(number, Barrier())

    def received_as(self, number: str) -> Any:
        """The request of that id, as it arrived here."""
        return next(request for request in self.requests if request.id == number)

    def _steps(self, request: AnyRequest) -> Iterator[Step]:
        usual = {EmbedRequest: [Vectors((b"1234",))], RerankRequest: [Ranking((Ranked(0, 1.0),))]}
        events = usual.get(type(request), STEPS["decode"])
        for step in self.scripts.get(request.id, [*events, finish(request)]):
            yield self.barrier(request.id) if step is None else step


class Observed:
    """A backend whose requests are recorded, as a pool's are."""

    def __init__(self, backend: Any, recorder: Recorder, attempts: ModelSpec | None = None) -> None:
        self.recorder = recorder
        self._backend = backend
        self._spec = attempts

    async def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        with self.recorder.observe(request) as observation, ExitStack() as attempts:
            attempt: AttemptObservation = NullObservation(observation.request)
            if self._spec is not None:
                attempt = attempts.enter_context(
                    observation.attempt(observation.request, self._backend, self._spec)
                )
            stream = self._backend.ask(attempt.request)
            try:
                async for event in stream:
                    observation.saw(event)
                    if isinstance(event, Finish):
                        attempt.finished(event)
                    yield event
            finally:
                await stream.aclose()

    def models(self) -> Sequence[ModelInfo]:
        return self._backend.models()

    async def aclose(self) -> None:
        await self._backend.aclose()
        self.recorder.closed()


class Told:
    """An exporter in memory, and a sink; what they were told must be one story."""

    def __init__(self, *, otel: bool = True, content: bool = False) -> None:
        self._memory = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False, resource=Resource({}))
        self.provider.add_span_processor(SimpleSpanProcessor(self._memory))
        exporter = OpenTelemetry(self.provider.get_tracer("headrace")) if otel else None
        self.tracing = Tracing(exporter, exports_content=content)
        self.records: list[RequestRecord] = []

    def record(self, record: RequestRecord) -> None:
        self.records.append(record)

    def observe(self, backend: Any, *, attempts: ModelSpec | None = None, **more: Any) -> Observed:
        known: dict[str, Any] = {"tracing": self.tracing, "sinks": [self], **more}
        return Observed(backend, Recorder(backend.models, **known), attempts)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._memory.get_finished_spans())

    def of(self, record: RequestRecord) -> list[ReadableSpan]:
        ids = {span.span_id for span in record.spans}
        return [span for span in self.spans if f"{_context(span).span_id:016x}" in ids]

    def check(self, ended: int) -> None:
        """Each request has one ended root, and a record that tells what its spans do."""
        assert len(self.records) == ended
        roots = [span for span in self.spans if span.kind is SpanKind.SERVER]
        assert len(roots) == ended
        numbers = [_context(span).span_id for span in self.spans]
        assert len(numbers) == len(set(numbers)), "a span has ended twice"
        assert len({record.spans[0].span_id for record in self.records}) == ended
        for record in self.records:
            self._check_one(record)

    def _check_one(self, record: RequestRecord) -> None:
        by_id = {f"{_context(span).span_id:016x}": span for span in self.of(record)}
        assert by_id.keys() == {one.span_id for one in record.spans}
        root = record.spans[0]
        assert (root.kind, root.start_ms) == ("server", 0.0)
        for one in record.spans:
            span = by_id[one.span_id]
            assert span.name == one.name
            assert f"{_context(span).trace_id:032x}" == record.trace_id
            assert span.kind.name.lower() == one.kind
            assert (span.status.status_code is StatusCode.ERROR) == one.failed
            assert span.end_time is not None
            assert span.start_time is not None
            assert abs((span.end_time - span.start_time) / 1e6 - one.ms) < 0.01
            assert 0 <= one.start_ms <= one.start_ms + one.ms <= root.ms + 0.01
            parent = f"{span.parent.span_id:016x}" if span.parent else ""
            assert parent == one.parent_id
            assert one is root or parent in by_id, "below a span of the same request"


def _context(span: ReadableSpan) -> Any:
    assert span.context is not None
    return span.context


def parent(number: int) -> str:
    """The header of a caller's span, another for each number."""
    return f"00-{number:032x}-{number:016x}-01"


def ask(number: int = 1, **given: Any) -> GenerateRequest:
    known: dict[str, Any] = {"model": "m", "prompt": "x", "traceparent": parent(number)}
    return GenerateRequest(**{**known, **given})


def pool_of(told: Told, spec: ModelSpec, open_worker: Callable[..., Any] | None = None) -> Pool:
    """A pool of real processes, watched."""
    machine = Machine()
    machine.total = 64 << 30

    def opened(one: ModelSpec, report: Callable[[str, int, int], None]) -> PooledWorker:
        return (open_worker or WorkerProcess)(one, resolve, on_progress=report)

    ledger = Ledger({"cpu": machine.total}, machine.read)
    pool = Pool([spec], opened, sizing=machine, ledger=ledger)
    pool.attach_observer(Recorder(pool.models, tracing=told.tracing, sinks=[told]))
    return pool
