"""A Backend around a Backend, that notes of each request what happened and what it cost."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec

from headrace.core.backend import Backend
from headrace.core.errors import HeadraceError
from headrace.core.events import Delta, Event
from headrace.core.model import ModelInfo
from headrace.core.record import RequestRecord, RunningRequest, Sink, Sinks
from headrace.core.request import (
    CountRequest,
    DetokenizeRequest,
    EmbedRequest,
    EmbedResult,
    GenerateRequest,
    RerankRequest,
    RerankResult,
    TokenCount,
)
from headrace.telemetry import content as contents
from headrace.telemetry import names, traceparent
from headrace.telemetry.content import Capture
from headrace.telemetry.running import Running, draw
from headrace.telemetry.span import Trace, Tracing, error_type

_log = logging.getLogger("headrace.telemetry")
_KNOWN_S = 2.0

Asked = TypeVar("Asked", GenerateRequest, EmbedRequest, RerankRequest)
Encoding = TypeVar("Encoding", EmbedRequest, RerankRequest)
Encoded = TypeVar("Encoded", EmbedResult, RerankResult)


class Observed:
    """Passes everything on. Each request has one root span and one record, however it ends.

    `sinks` are told of each request that has ended. `capture` keeps content, redacted. A request
    that is read by nobody, as its generator was never started, is none.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        tracing: Tracing,
        sinks: Sinks = (),
        capture: Capture | None = None,
    ) -> None:
        self.tracing = tracing
        self._backend = backend
        self._sinks = tuple(sinks)
        self._capture = capture
        self._failing: set[int] = set()
        self._running: dict[int, Running] = {}
        self._known: dict[str, ModelInfo] = {}
        self._known_at = float("-inf")

    def __repr__(self) -> str:
        """Tell what is around what."""
        return f"<Observed {len(self._running)} running, {self._backend!r}>"

    def running(self) -> tuple[RunningRequest, ...]:
        """Tell what runs now, oldest first, without waiting."""
        return tuple(run.snapshot() for run in self._running.values())

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield what the backend does. Closing it closes that."""
        run, request = self._begin(request)
        stream: AsyncGenerator[Event, None] | None = None
        try:
            stream = self._backend.generate(request)
            # The way of every token: it only counts.
            async for event in stream:
                if type(event) is Delta:
                    run.chunks += 1
                    run.tokens += len(event.token_ids)
                    if run.visible_at is None:
                        run.speaks(event)
                    if run.said is not None:
                        contents.say(run.said, event)
                else:
                    run.goes_on(event)  # pyright: ignore[reportArgumentType] - no Delta
                yield event
        except BaseException as error:
            run.error = error
            raise
        finally:
            try:
                if stream is not None:
                    await stream.aclose()
            finally:
                self._end(run)

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Return the backend's vectors."""
        return await self._encoded(request, self._backend.embed)

    async def rerank(self, request: RerankRequest) -> RerankResult:
        """Return the backend's order."""
        return await self._encoded(request, self._backend.rerank)

    async def count_tokens(self, request: CountRequest) -> TokenCount:
        """Return the backend's count."""
        return await self._backend.count_tokens(request)

    async def detokenize(self, request: DetokenizeRequest) -> str:
        """Return the backend's text."""
        return await self._backend.detokenize(request)

    def models(self) -> Sequence[ModelInfo]:
        """Return the backend's models."""
        return self._backend.models()

    async def aclose(self) -> None:
        """Close the backend. The tracing stays, for it may have further users."""
        await self._backend.aclose()

    async def _encoded(
        self, request: Encoding, ask: Callable[[Encoding], Awaitable[Encoded]]
    ) -> Encoded:
        run, request = self._begin(request)
        try:
            result = await ask(request)
        except BaseException as error:
            run.error = error
            raise
        else:
            run.finish = result
            return result
        finally:
            self._end(run)

    def _begin(self, request: Asked) -> tuple[Running, Asked]:
        info = self._info(request.model)
        parent = traceparent.parse(request.traceparent, request.tracestate)
        attributes = names.asked(request, names.provider(info) if info else names.HERE)
        attributes[names.REQUEST_ID] = request.id
        if request.client:
            attributes[names.CLIENT] = request.client
        what, trace = names.operation(request), Trace(request.received, parent)
        root = self.tracing.span(
            trace,
            # Names from outside have no end: they do not become those of spans.
            f"{what} {info.id}" if info else what,
            parent,
            request.received,
            kind="server",
            attributes=attributes,
        )
        trace.root = root
        run = Running(request, info, root, listens=self._capture is not None)
        self._running[id(run)] = run
        self.tracing.traces[root.traceparent] = trace
        return run, msgspec.structs.replace(
            request, traceparent=root.traceparent, tracestate=root.state
        )

    def _end(self, run: Running) -> None:
        ended = time.monotonic()
        del self._running[id(run)]
        self.tracing.traces.pop(run.root.traceparent, None)
        try:
            record = self._record(run, ended)
        except Exception:  # noqa: BLE001  # see below
            # Whatever is wrong here is not the request's fault.
            _log.exception("A request could not be recorded.")
            run.root.end(ended, run.failure)
            return
        for sink in self._sinks:
            self._tell(record, sink)

    def _record(self, run: Running, ended: float) -> RequestRecord:
        metrics, root, capture = run.metrics(ended), run.root, self._capture
        failure, outcome = run.failure, run.outcome
        reasons = () if run.finish is None else getattr(run.finish, "finish_reasons", ())
        kept = None if capture is None else contents.content(run.request, run.said or {}, capture)
        root.attributes |= names.usage(metrics) | names.figures(metrics)
        root.attributes[names.OUTCOME] = outcome
        if metrics.engine:
            root.attributes[names.ENGINE] = metrics.engine
        if run.finish is not None:
            root.attributes[names.RESPONSE_MODEL] = metrics.model or run.model
        if reasons:
            root.attributes[names.FINISH_REASONS] = tuple(reasons)
        if kept is not None and self.tracing.tells_content:
            root.attributes |= contents.attributes(run.request, kept, reasons)
        draw(run, metrics, self.tracing, ended)
        root.end(ended, failure)
        first, *others = reversed(run.trace.ended)
        return RequestRecord(
            id=run.request.id,
            trace_id=root.trace_id,
            time=run.trace.unix_ns(run.trace.began) / 1e9,
            operation=names.operation(run.request),
            model=metrics.model or run.model,
            outcome=outcome,
            metrics=metrics,
            client=run.request.client,
            finish_reasons=tuple(reasons),
            error=error_type(failure) if failure else "",
            message=failure.message if isinstance(failure, HeadraceError) else "",
            parameters=contents.parameters(run.request, capture),
            spans=(first, *sorted(others, key=lambda one: (one.start_ms, -one.ms))),
            content=kept,
        )

    def _tell(self, record: RequestRecord, sink: Sink) -> None:
        try:
            sink.record(record)
        except Exception:  # noqa: BLE001  # see below
            # A sink is not to raise; one that does costs a line of the log, and no request.
            if id(sink) not in self._failing:
                self._failing.add(id(sink))
                _log.exception("A sink of records failed; this is told once.")

    def _info(self, name: str) -> ModelInfo | None:
        """Return the metadata of a model; for up to `_KNOWN_S` they may be a little old."""
        now = time.monotonic()
        if now - self._known_at > _KNOWN_S or name not in self._known:
            self._known_at, models = now, self._backend.models()
            self._known = {one: info for info in models for one in (info.id, *info.aliases)}
            if len(models) == 1:
                self._known[""] = models[0]
        return self._known.get(name)
