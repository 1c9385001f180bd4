"""Recorder: the observer of a pool that makes spans and records of requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from urllib.parse import urlsplit

import msgspec

from headrace import machine
from headrace.core.errors import Draining, HeadraceError
from headrace.core.events import Finish
from headrace.core.model import TRACED_SETTINGS, ModelInfo, ModelSpec
from headrace.core.record import Attribute, RequestRecord, RunningRequest, Sink, Sinks
from headrace.core.request import AnyRequest
from headrace.models.providers import PROVIDERS
from headrace.pool.observer import ObservedWorker
from headrace.telemetry import content as contents
from headrace.telemetry import names
from headrace.telemetry.content import Redactor
from headrace.telemetry.running import Running, add_spans
from headrace.telemetry.spans import Kind, Parent, Span, Trace, Tracing, error_type

_log = logging.getLogger("headrace.telemetry")
_KNOWN_S = 2.0


class Recorder:
    """Observes a pool. Each request has one root span and one record, however it ends.

    `models` returns the served models. `sinks` receive the record of each finished request.
    `capture` keeps content, redacted.
    """

    def __init__(
        self,
        models: Callable[[], Sequence[ModelInfo]],
        *,
        tracing: Tracing,
        sinks: Sinks = (),
        capture: Redactor | None = None,
    ) -> None:
        self.tracing = tracing
        self._models = models
        self._sinks = tuple(sinks)
        self._capture = capture
        self._failing: set[int] = set()
        self._running: dict[int, _Observation] = {}
        self._known: dict[str, ModelInfo] = {}
        self._known_at = float("-inf")

    def __repr__(self) -> str:
        """Describe how many requests run."""
        return f"<Recorder, {len(self._running)} running>"

    def add(self, sink: Sink) -> None:
        """Add a sink. Call before the first request."""
        self._sinks = (*self._sinks, sink)

    def running(self) -> tuple[RunningRequest, ...]:
        """Return the running requests, oldest first, without waiting."""
        return tuple(run.snapshot() for run in self._running.values())

    @contextmanager
    def observe(self, request: AnyRequest) -> Generator[_Observation]:
        """Observe a request."""
        run = self._begin(request)
        try:
            yield run
        except BaseException as error:
            run.error = error
            raise
        finally:
            self._end(run)
            # The traceback of the error refers to this frame: that would be a reference cycle.
            run.error = None
            run.trace.forget()

    @contextmanager
    def attempt(
        self, run: Running, request: AnyRequest, worker: ObservedWorker, spec: ModelSpec
    ) -> Generator[_Attempt]:
        """Observe one worker's attempt: a child span of the request's."""
        span, request = self._attempt_span(run, request, worker, spec)
        attempt, error = _Attempt(request), None
        try:
            yield attempt
        except BaseException as failure:
            error = failure
            raise
        finally:
            finish = attempt.finish
            if finish is not None:
                span.attributes |= names.usage(finish.metrics)
                span.attributes[names.ENGINE] = finish.metrics.engine
                if request.task == "generate":
                    span.attributes[names.FINISH_REASONS] = finish.finish_reasons
            span.end(time.monotonic(), None if finish is not None else error)

    @asynccontextmanager
    async def loading(self, worker: ObservedWorker, spec: ModelSpec) -> AsyncGenerator[None]:
        """Observe a load: a separate trace, if OpenTelemetry is enabled."""
        if self.tracing.exporter is None or worker.models()[0].state == "ready":
            yield
            return
        began = time.monotonic()
        attributes = await asyncio.to_thread(_machine)
        attributes |= _settings(spec)
        span = self.tracing.span(
            Trace(began, None), names.START, None, began, attributes=attributes
        )
        error: BaseException | None = None
        try:
            yield
        except BaseException as failure:
            error = failure
            raise
        finally:
            span.attributes |= _loaded(worker.models()[0], _pid(worker))
            span.end(time.monotonic(), error)
            self.tracing.loads[spec.name] = span

    def closed(self) -> None:
        """End all open requests, before exporters and sinks are closed."""
        now, error = time.monotonic(), Draining("The model was stopped.")
        for run in list(self._running.values()):
            run.error = error
            for attempt in run.trace.attempts:
                attempt.end(now, error)
            self._end(run)

    def _begin(self, request: AnyRequest) -> _Observation:
        info = self._info(request.model)
        parent = Parent.parse(request.traceparent, request.tracestate)
        attributes = names.request_attributes(request, names.provider(info) if info else names.HERE)
        attributes[names.REQUEST_ID] = request.id
        if request.client:
            attributes[names.CLIENT] = request.client
        if request.batch:
            attributes[names.BATCH] = True
        operation, trace = request.operation, Trace(request.received, parent)
        root = self.tracing.span(
            trace,
            # Span names must be of low cardinality: unknown models are not in them.
            f"{operation} {info.id}" if info else operation,
            parent,
            request.received,
            kind="server",
            attributes=attributes,
        )
        trace.root = root
        request = msgspec.structs.replace(
            request, traceparent=root.context.traceparent, tracestate=root.context.state
        )
        run = _Observation(self, request, info, root, captures=self._capture is not None)
        self._running[id(run)] = run
        return run

    def _attempt_span(
        self, run: Running, request: AnyRequest, worker: ObservedWorker, spec: ModelSpec
    ) -> tuple[Span, AnyRequest]:
        now, trace = time.monotonic(), run.trace
        kind, name, attributes = _step(request, worker, spec)
        span = self.tracing.span(trace, name, run.root, now, kind=kind, attributes=attributes)
        trace.attempts.append(span)
        parent = span.outside
        return span, msgspec.structs.replace(
            request, traceparent=parent.traceparent, tracestate=parent.state
        )

    def _end(self, run: _Observation) -> None:
        ended = time.monotonic()
        if self._running.pop(id(run), None) is None:
            return
        try:
            record = self._record(run, ended)
        except Exception:  # noqa: BLE001  # see below
            # An error here must not fail the request.
            _log.exception("A request could not be recorded.")
            run.root.end(ended, run.failure)
            return
        for sink in self._sinks:
            self._deliver(record, sink)

    def _record(self, run: Running, ended: float) -> RequestRecord:
        metrics, root, capture = run.metrics(ended), run.root, self._capture
        failure, outcome = run.failure, run.outcome
        reasons: tuple[str, ...] = ()
        if run.finish is not None and run.request.task == "generate":
            reasons = run.finish.finish_reasons
        kept = (
            None if capture is None else contents.content(run.request, run.answers or {}, capture)
        )
        root.attributes |= names.usage(metrics) | names.figures(metrics)
        root.attributes[names.OUTCOME] = outcome
        if metrics.engine:
            root.attributes[names.ENGINE] = metrics.engine
        if run.finish is not None:
            root.attributes[names.RESPONSE_MODEL] = metrics.model or run.model
        if reasons:
            root.attributes[names.FINISH_REASONS] = tuple(reasons)
        if kept is not None and self.tracing.exports_content:
            root.attributes |= contents.attributes(run.request, kept, reasons)
        add_spans(run, metrics, self.tracing, ended)
        root.end(ended, failure)
        first, *others = reversed(run.trace.ended)
        return RequestRecord(
            id=run.request.id,
            trace_id=root.context.trace_id,
            time=run.trace.unix_ns(run.trace.began) / 1e9,
            operation=run.request.operation,
            model=metrics.model or run.model,
            outcome=outcome,
            metrics=metrics,
            client=run.request.client,
            finish_reasons=tuple(reasons),
            error=error_type(failure) if failure else "",
            message=failure.message if isinstance(failure, HeadraceError) else "",
            parameters=contents.parameters(run.request, capture),
            spans=(first, *sorted(others, key=lambda span: (span.start_ms, -span.ms))),
            content=kept,
            batch=run.request.batch,
        )

    def _deliver(self, record: RequestRecord, sink: Sink) -> None:
        try:
            sink.record(record)
        except Exception:  # noqa: BLE001  # see below
            # Sinks must not raise; an error is logged once, and no request fails.
            if id(sink) not in self._failing:
                self._failing.add(id(sink))
                _log.exception("A sink of records failed; further failures are not logged.")

    def _info(self, name: str) -> ModelInfo | None:
        """Return the metadata of a model, cached for up to `_KNOWN_S` seconds."""
        now = time.monotonic()
        if now - self._known_at > _KNOWN_S or name not in self._known:
            self._known_at, models = now, self._models()
            self._known = {alias: info for info in models for alias in (info.id, *info.aliases)}
            if len(models) == 1:
                self._known[""] = models[0]
        return self._known.get(name)


class _Observation(Running):
    """A request that is observed."""

    __slots__ = ("_recorder",)

    def __init__(
        self,
        recorder: Recorder,
        request: AnyRequest,
        info: ModelInfo | None,
        root: Span,
        *,
        captures: bool,
    ) -> None:
        super().__init__(request, info, root, captures=captures)
        self._recorder = recorder

    def attempt(
        self, request: AnyRequest, worker: ObservedWorker, spec: ModelSpec
    ) -> AbstractContextManager[_Attempt]:
        """Observe one worker's attempt."""
        return self._recorder.attempt(self, request, worker, spec)


class _Attempt:
    """One worker's attempt at a request."""

    def __init__(self, request: AnyRequest) -> None:
        self.request = request
        self.finish: Finish | None = None

    def finished(self, finish: Finish) -> None:
        """Record the Finish."""
        self.finish = finish


def _step(
    request: AnyRequest, worker: ObservedWorker, spec: ModelSpec
) -> tuple[Kind, str, dict[str, Attribute]]:
    """Return kind, name and attributes of an attempt's span; for an upstream, a client span."""
    pid = _pid(worker)
    is_local = getattr(worker, "node", None) is None
    if is_local and pid is None and (upstream := _upstream(spec)) is not None:
        attributes = (
            names.request_attributes(request, names.provider(worker.models()[0])) | upstream
        )
        return (
            "client",
            f"{attributes[names.OPERATION]} {attributes[names.REQUEST_MODEL]}",
            attributes,
        )
    about: dict[str, Attribute] = {"headrace.model": spec.name}
    if node := getattr(worker, "node", None):
        # The node makes spans of its own below this one.
        return "client", names.ATTEMPT, about | {names.NODE: node}
    return "internal", names.ATTEMPT, about if pid is None else about | {names.WORKER_PID: pid}


def _pid(worker: ObservedWorker) -> int | None:
    """Return the process id of a worker with a process of its own."""
    return getattr(worker, "pid", None)


def _machine() -> dict[str, Attribute]:
    return machine.attributes(machine.system())


def _upstream(spec: ModelSpec) -> dict[str, Attribute] | None:
    """Return model and address at an upstream; None for a local model."""
    known, _, model = spec.model.partition(":")
    if known not in PROVIDERS:
        return None
    attributes: dict[str, Attribute] = {names.REQUEST_MODEL: model}
    place = urlsplit(str(spec.options.get("base_url") or PROVIDERS[known].base_url or ""))
    if place.hostname:
        attributes[names.SERVER_ADDRESS] = place.hostname
        attributes[names.SERVER_PORT] = place.port or (80 if place.scheme == "http" else 443)
    return attributes


def _settings(spec: ModelSpec) -> dict[str, Attribute]:
    """Return the traced settings of a model."""
    given = {name: getattr(spec, name) for name in TRACED_SETTINGS}
    attributes: dict[str, Attribute] = {"headrace.model": spec.name, "headrace.source": spec.model}
    return attributes | {
        f"headrace.{name}": value for name, value in given.items() if value is not None
    }


def _loaded(info: ModelInfo, pid: int | None) -> dict[str, Attribute]:
    """Return the result of a load. Secrets in options are masked."""
    attributes: dict[str, Attribute] = {
        names.ENGINE: info.engine,
        "headrace.engine.reason": info.engine_reason,
        "headrace.device": info.device,
        "headrace.format": info.format,
    }
    attributes |= {f"headrace.option.{name}": str(value) for name, value in info.options.items()}
    if pid is not None:
        attributes[names.WORKER_PID] = pid
    if info.context_length:
        attributes["headrace.context_length"] = info.context_length
    return attributes
