"""A worker of a pool, whose loads and answers are spans: one for each attempt at a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec

from headrace import machine
from headrace.core.events import Event, Finish
from headrace.core.model import ModelInfo, ModelSpec, State
from headrace.core.record import Attribute
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
from headrace.models.providers import PROVIDERS
from headrace.pool.replica import PooledWorker
from headrace.telemetry import names, traceparent
from headrace.telemetry.span import Span, Trace, Tracing

Asked = TypeVar("Asked", GenerateRequest, EmbedRequest, RerankRequest)
Encoding = TypeVar("Encoding", EmbedRequest, RerankRequest)
Encoded = TypeVar("Encoded", EmbedResult, RerankResult)
_LIKE_A_SETTING = (
    *("device", "context_length", "max_running", "max_queued", "keep_alive", "continuation"),
    *("replicas", "revision", "task"),
)


class ObservedWorker:
    """Passes everything on. What is asked has its span below that of `Observed`."""

    def __init__(self, worker: PooledWorker, spec: ModelSpec, tracing: Tracing) -> None:
        self.died = worker.died
        self._worker = worker
        self._spec = spec
        self._tracing = tracing

    def __repr__(self) -> str:
        """Tell what it is around."""
        return f"<ObservedWorker {self._worker!r}>"

    @property
    def state(self) -> State:
        """That of the worker."""
        return self._worker.state

    @property
    def pid(self) -> int | None:
        """That of the worker."""
        return self._worker.pid

    async def start(self) -> None:
        """Load, under a span of its own. Without OpenTelemetry nobody would see it."""
        if self._tracing.exporter is None or self._worker.state == "ready":
            await self._worker.start()
            return
        began, spec = time.monotonic(), self._spec
        attributes = await asyncio.to_thread(_machine)
        attributes |= _settings(spec)
        span = self._tracing.span(
            Trace(began, None), names.START, None, began, attributes=attributes
        )
        error: BaseException | None = None
        try:
            await self._worker.start()
        except BaseException as failure:
            error = failure
            raise
        finally:
            info = self._worker.models()[0]
            span.attributes |= _loaded(info, self._worker.pid)
            span.end(time.monotonic(), error)
            self._tracing.loads[spec.name] = span

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield what the worker does. Closing it closes that."""
        span, request = self._begin(request)
        stream = self._worker.generate(request)
        event: Event | None = None
        error: BaseException | None = None
        try:
            async for event in stream:
                yield event
        except BaseException as failure:
            error = failure
            raise
        finally:
            try:
                await stream.aclose()
            finally:
                self._end(span, event if isinstance(event, Finish) else None, error)

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Return the worker's vectors."""
        return await self._encoded(request, self._worker.embed)

    async def rerank(self, request: RerankRequest) -> RerankResult:
        """Return the worker's order."""
        return await self._encoded(request, self._worker.rerank)

    async def count_tokens(self, request: CountRequest) -> TokenCount:
        """Return the worker's count."""
        return await self._worker.count_tokens(request)

    async def detokenize(self, request: DetokenizeRequest) -> str:
        """Return the worker's text."""
        return await self._worker.detokenize(request)

    def models(self) -> Sequence[ModelInfo]:
        """Return the worker's one model."""
        return self._worker.models()

    async def memory(self) -> dict[str, int]:
        """Return what the worker holds."""
        return await self._worker.memory()

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Close the worker."""
        await self._worker.aclose(drain_s)

    async def _encoded(
        self, request: Encoding, ask: Callable[[Encoding], Awaitable[Encoded]]
    ) -> Encoded:
        span, request = self._begin(request)
        result: Encoded | None = None
        error: BaseException | None = None
        try:
            result = await ask(request)
        except BaseException as failure:
            error = failure
            raise
        else:
            return result
        finally:
            self._end(span, result, error)

    def _begin(self, request: Asked) -> tuple[Span, Asked]:
        now = time.monotonic()
        trace = self._tracing.traces.get(request.traceparent)
        parent: Span | traceparent.Parent | None
        if trace is not None:
            parent = trace.root
        else:
            # Nobody observes the pool: what the caller sent is all there is.
            parent = traceparent.parse(request.traceparent, request.tracestate)
            trace = Trace(now, parent)
        span = self._span(trace, parent, request, now)
        trace.attempts.append(span)
        told = span.outside
        return span, msgspec.structs.replace(
            request,
            traceparent=traceparent.written(told.trace_id, told.span_id, told.flags),
            tracestate=told.state,
        )

    def _span(
        self,
        trace: Trace,
        parent: Span | traceparent.Parent | None,
        request: names.Request,
        now: float,
    ) -> Span:
        if self._worker.pid is None and (upstream := _upstream(self._spec)) is not None:
            asked = names.asked(request, names.provider(self._worker.models()[0]))
            asked |= upstream
            name = f"{asked[names.OPERATION]} {asked[names.REQUEST_MODEL]}"
            return self._tracing.span(trace, name, parent, now, kind="client", attributes=asked)
        about: dict[str, Attribute] = {"headrace.model": self._spec.name}
        if self._worker.pid is not None:
            about[names.WORKER_PID] = self._worker.pid
        return self._tracing.span(trace, names.ATTEMPT, parent, now, attributes=about)

    def _end(
        self,
        span: Span,
        result: Finish | EmbedResult | RerankResult | None,
        error: BaseException | None,
    ) -> None:
        if result is not None:
            span.attributes |= names.usage(result.metrics)
            span.attributes[names.ENGINE] = result.metrics.engine
            if isinstance(result, Finish):
                span.attributes[names.FINISH_REASONS] = result.finish_reasons
        span.end(time.monotonic(), None if result is not None else error)


def _machine() -> dict[str, Attribute]:
    return machine.attributes(machine.system())


def _upstream(spec: ModelSpec) -> dict[str, Attribute] | None:
    """Return which model of which upstream is asked, and where; None for a model that is here."""
    known, _, model = spec.model.partition(":")
    if known not in PROVIDERS:
        return None
    told: dict[str, Attribute] = {names.REQUEST_MODEL: model}
    place = urlsplit(str(spec.options.get("base_url") or PROVIDERS[known].base_url or ""))
    if place.hostname:
        told[names.SERVER_ADDRESS] = place.hostname
        told[names.SERVER_PORT] = place.port or (80 if place.scheme == "http" else 443)
    return told


def _settings(spec: ModelSpec) -> dict[str, Attribute]:
    """Return how a model is configured."""
    given = {name: getattr(spec, name) for name in _LIKE_A_SETTING}
    told: dict[str, Attribute] = {"headrace.model": spec.name, "headrace.source": spec.model}
    return told | {f"headrace.{name}": value for name, value in given.items() if value is not None}


def _loaded(info: ModelInfo, pid: int | None) -> dict[str, Attribute]:
    """Return what came of a load. Options are as they are shown, without keys."""
    told: dict[str, Attribute] = {
        names.ENGINE: info.engine,
        "headrace.engine.reason": info.engine_reason,
        "headrace.device": info.device,
        "headrace.format": info.format,
    }
    told |= {f"headrace.option.{name}": str(value) for name, value in info.options.items()}
    if pid is not None:
        told[names.WORKER_PID] = pid
    if info.context_length:
        told["headrace.context_length"] = info.context_length
    return told
