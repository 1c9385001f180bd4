"""Recorder: the Observer that makes spans and records of what a pool does."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from urllib.parse import urlsplit

import msgspec

from headrace import machine
from headrace.core.backend import Backend
from headrace.core.errors import Draining, HeadraceError
from headrace.core.events import Finish
from headrace.core.model import ModelInfo, ModelSpec
from headrace.core.record import Attribute, RequestRecord, RunningRequest, Sink, Sinks
from headrace.core.request import AnyRequest
from headrace.models.providers import PROVIDERS
from headrace.telemetry import content as contents
from headrace.telemetry import names, traceparent
from headrace.telemetry.content import Capture
from headrace.telemetry.running import Running, draw
from headrace.telemetry.span import Kind, Span, Trace, Tracing, error_type

_log = logging.getLogger("headrace.telemetry")
_KNOWN_S = 2.0
_LIKE_A_SETTING = (
    *("device", "context_length", "max_running", "max_queued", "keep_alive", "continuation"),
    *("replicas", "revision", "task"),
)


class Recorder:
    """Observes a pool. Each request has one root span and one record, however it ends.

    `models` returns what is served. `sinks` receive the record of each finished request.
    `capture` keeps content, redacted.
    """

    def __init__(
        self,
        models: Callable[[], Sequence[ModelInfo]],
        *,
        tracing: Tracing,
        sinks: Sinks = (),
        capture: Capture | None = None,
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

    def running(self) -> tuple[RunningRequest, ...]:
        """Return what runs now, oldest first, without waiting."""
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
            # An error's traceback leads here: one more circle.
            run.error = None
            run.trace.forget()

    @contextmanager
    def attempt(
        self, run: Running, request: AnyRequest, worker: Backend, spec: ModelSpec
    ) -> Generator[_Attempt]:
        """Observe one worker's attempt: a span below the request's."""
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
    async def loading(self, worker: Backend, spec: ModelSpec) -> AsyncGenerator[None]:
        """Observe a load: a span of its own, where OpenTelemetry is switched on."""
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
        """End all requests that are open, as nothing more is sent or written from now on."""
        now, error = time.monotonic(), Draining("The model was stopped.")
        for run in list(self._running.values()):
            run.error = error
            for attempt in run.trace.attempts:
                attempt.end(now, error)
            self._end(run)

    def _begin(self, request: AnyRequest) -> _Observation:
        info = self._info(request.model)
        parent = traceparent.parse(request.traceparent, request.tracestate)
        attributes = names.asked(request, names.provider(info) if info else names.HERE)
        attributes[names.REQUEST_ID] = request.id
        if request.client:
            attributes[names.CLIENT] = request.client
        operation, trace = request.operation, Trace(request.received, parent)
        root = self.tracing.span(
            trace,
            # Names from outside are unbounded: they do not become names of spans.
            f"{operation} {info.id}" if info else operation,
            parent,
            request.received,
            kind="server",
            attributes=attributes,
        )
        trace.root = root
        request = msgspec.structs.replace(
            request, traceparent=root.traceparent, tracestate=root.state
        )
        run = _Observation(self, request, info, root, listens=self._capture is not None)
        self._running[id(run)] = run
        return run

    def _attempt_span(
        self, run: Running, request: AnyRequest, worker: Backend, spec: ModelSpec
    ) -> tuple[Span, AnyRequest]:
        now, trace = time.monotonic(), run.trace
        kind, name, attributes = _step(request, worker, spec)
        span = self.tracing.span(trace, name, run.root, now, kind=kind, attributes=attributes)
        trace.attempts.append(span)
        told = span.outside
        return span, msgspec.structs.replace(
            request,
            traceparent=traceparent.written(told.trace_id, told.span_id, told.flags),
            tracestate=told.state,
        )

    def _end(self, run: _Observation) -> None:
        ended = time.monotonic()
        if self._running.pop(id(run), None) is None:
            return
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
        reasons: tuple[str, ...] = ()
        if run.finish is not None and run.request.task == "generate":
            reasons = run.finish.finish_reasons
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
            operation=run.request.operation,
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
            self._known_at, models = now, self._models()
            self._known = {one: info for info in models for one in (info.id, *info.aliases)}
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
        listens: bool,
    ) -> None:
        super().__init__(request, info, root, listens=listens)
        self._recorder = recorder

    def attempt(
        self, request: AnyRequest, worker: Backend, spec: ModelSpec
    ) -> AbstractContextManager[_Attempt]:
        """Observe one worker's attempt."""
        return self._recorder.attempt(self, request, worker, spec)


class _Attempt:
    """One worker's attempt at a request."""

    def __init__(self, request: AnyRequest) -> None:
        self.request = request
        self.finish: Finish | None = None

    def finished(self, finish: Finish) -> None:
        """Note that it ended well."""
        self.finish = finish


def _step(
    request: AnyRequest, worker: Backend, spec: ModelSpec
) -> tuple[Kind, str, dict[str, Attribute]]:
    """Return what an attempt's span is: a call of an upstream is that of its client."""
    pid = _pid(worker)
    if pid is None and (upstream := _upstream(spec)) is not None:
        asked = names.asked(request, names.provider(worker.models()[0])) | upstream
        return "client", f"{asked[names.OPERATION]} {asked[names.REQUEST_MODEL]}", asked
    about: dict[str, Attribute] = {"headrace.model": spec.name}
    return "internal", names.ATTEMPT, about if pid is None else about | {names.WORKER_PID: pid}


def _pid(worker: Backend) -> int | None:
    """Return the process of a worker that has one of its own."""
    return getattr(worker, "pid", None)


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
