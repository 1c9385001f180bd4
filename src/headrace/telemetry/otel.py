"""OpenTelemetry, if its standard variables or the host program enable it.

Its libraries are imported only then.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from headrace import __version__
from headrace.core.install import install_command
from headrace.core.record import Attribute
from headrace.telemetry.spans import Exported, Kind, Parent, Tracing

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import SpanContext, Tracer

_log = logging.getLogger("headrace.telemetry")
_exporter_log = logging.getLogger("opentelemetry.exporter")
_NAME = "headrace"
_EXPORTER = "OTEL_TRACES_EXPORTER"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
_CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_CONTENT_VALUES = frozenset({"true", "span_only", "span_and_event"})
_LAST_S = 2.0


class OpenTelemetrySpan:
    """One span of a tracer."""

    __slots__ = ("context", "is_recording", "native")

    def __init__(self, native: trace.Span) -> None:
        self.native = native
        self.is_recording = native.is_recording()
        self.context = _parent(native.get_span_context())

    def end(
        self, name: str, attributes: dict[str, Attribute], failure: str | None, end_ns: int
    ) -> None:
        """End the span; `failure` marks it as failed."""
        if self.is_recording:
            self.native.update_name(name)
            self.native.set_attributes(attributes)
            if failure is not None:
                from opentelemetry.trace import StatusCode

                self.native.set_status(StatusCode.ERROR, failure)
        self.native.end(end_ns)


class OpenTelemetry:
    """A tracer of the SDK, ours or the host program's."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def current(self) -> Parent | None:
        """Return the current span of the calling program."""
        from opentelemetry import trace

        context = trace.get_current_span().get_span_context()
        return _parent(context) if context.is_valid else None

    def start(
        self,
        name: str,
        parent: Parent | Exported | None,
        kind: Kind,
        start_ns: int,
        attributes: dict[str, Attribute],
        links: Sequence[Exported],
    ) -> OpenTelemetrySpan:
        """Start a span in an explicit context, not that of the task."""
        from opentelemetry import trace
        from opentelemetry.context import Context

        context = Context()
        if isinstance(parent, Parent):
            context = trace.set_span_in_context(trace.NonRecordingSpan(_remote(parent)), context)
        elif parent is not None:
            context = trace.set_span_in_context(parent.native, context)
        return OpenTelemetrySpan(
            self._tracer.start_span(
                name,
                context=context,
                kind=trace.SpanKind[kind.upper()],
                attributes=attributes,
                links=[trace.Link(link.native.get_span_context()) for link in links],
                start_time=start_ns,
            )
        )


def _parent(context: SpanContext) -> Parent:
    return Parent(
        f"{context.trace_id:032x}",
        f"{context.span_id:016x}",
        int(context.trace_flags),
        context.trace_state.to_header(),
    )


def _remote(parent: Parent) -> SpanContext:
    from opentelemetry.trace import SpanContext, TraceFlags, TraceState

    return SpanContext(
        int(parent.trace_id, 16),
        int(parent.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(parent.flags),
        trace_state=TraceState.from_header([parent.state]) if parent.state else None,
    )


def configure(version: str = __version__, environment: Mapping[str, str] = os.environ) -> Tracing:
    """Return the tracing of this process.

    Spans are exported if OTEL_TRACES_EXPORTER or an OTLP endpoint is set, and to the provider of
    the host program if it has set one. Otherwise nothing is imported. It never raises: errors are
    logged.
    """
    exports_content = environment.get(_CONTENT, "").strip().lower() in _CONTENT_VALUES
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return Tracing()
    if (host := _host_exporter(version)) is not None:
        return Tracing(host, exports_content=exports_content)
    if switched_on_by(environment) is None:
        return Tracing()
    try:
        provider = _provider(version, environment)
    except ImportError:
        _log.warning("OpenTelemetry is enabled but not installed: %s", install_command("otlp"))
        return Tracing()
    except Exception as error:  # noqa: BLE001  # each library has its own errors
        _log.warning("OpenTelemetry could not be set up: %s", error)
        return Tracing()
    exporter = OpenTelemetry(provider.get_tracer(_NAME, version))
    return Tracing(exporter, exports_content=exports_content, close=lambda: _shut_down(provider))


def _host_exporter(version: str) -> OpenTelemetry | None:
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    provider = trace.get_tracer_provider()
    unset = isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider)
    return None if unset else OpenTelemetry(provider.get_tracer(_NAME, version))


def switched_on_by(environment: Mapping[str, str]) -> str | None:
    """Return the variable that enables the export of spans, or None."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if environment.get(_EXPORTER, "").strip():
        return _EXPORTER if any(_exporters(environment)) else None
    return next((name for name in _ENDPOINTS if environment.get(name, "").strip()), None)


def _exporters(environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the entry points of the exporters; OTLP by default."""
    protocol = (
        environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "http/protobuf"
    ).strip()
    for name in (environment.get(_EXPORTER, "").strip() or "otlp").split(","):
        if (known := name.strip().lower()) == "otlp":
            yield _PROTOCOLS.get(protocol, protocol)
        elif known not in ("", "none"):
            yield name.strip()


def _provider(version: str, environment: Mapping[str, str]) -> TracerProvider:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # Retries are not logged; the reason for the loss of a batch is.
    _exporter_log.setLevel(logging.ERROR)
    known = {"service.version": version}
    if not environment.get("OTEL_SERVICE_NAME") and "service.name=" not in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        known["service.name"] = _NAME
    # Its own shutdown at exit has no time limit; `_shut_down` has. Sampler, limits and queue are
    # configured by the variables.
    provider = TracerProvider(resource=Resource.create(known), shutdown_on_exit=False)
    for name in _exporters(environment):
        where = next(filter(None, map(environment.get, _ENDPOINTS)), name)
        exporter: Any = _Exporter(where, _load(name)())
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


class _Exporter:
    """Wraps an exporter, to log the first loss of spans and the recovery."""

    def __init__(self, where: str, inner: Any) -> None:
        self._where, self._inner, self._lost = where, inner, 0
        self.shutdown = inner.shutdown

    def export(self, spans: list[Any]) -> Any:
        count, result = len(spans), self._inner.export(spans)
        # The traceback of an error refers to this frame: the batch would stay in memory until
        # the next garbage collection.
        spans.clear()
        if result.value:
            if not self._lost:
                _log.warning(
                    "%s does not accept spans: they are lost. This is logged once.", self._where
                )
            self._lost += count
        elif self._lost:
            _log.warning("%s accepts spans again; %d were lost.", self._where, self._lost)
            self._lost = 0
        _exporter_log.setLevel(logging.CRITICAL if self._lost else logging.ERROR)
        return result


def _load(name: str) -> Any:
    exporters = metadata.entry_points(group="opentelemetry_traces_exporter", name=name)
    if not exporters:
        if name in (*_PROTOCOLS.values(), "console"):
            raise ImportError(name)
        raise ValueError(f"there is no exporter named {name!r}")
    return next(iter(exporters)).load()


def _shut_down(provider: TracerProvider) -> None:
    """Export the rest. A collector that does not answer is not waited for: a daemon thread."""
    thread = threading.Thread(target=provider.shutdown, name="headrace-otel-end", daemon=True)
    thread.start()
    thread.join(_LAST_S)
