"""OpenTelemetry's spans behind the few calls that are made of them here."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TraceState,
)

from headrace.core.record import Attribute
from headrace.telemetry.span import Exported, Kind
from headrace.telemetry.traceparent import Parent

_KINDS: dict[Kind, SpanKind] = {
    "server": SpanKind.SERVER,
    "client": SpanKind.CLIENT,
    "internal": SpanKind.INTERNAL,
}


class OpenTelemetrySpan:
    """One span of a tracer."""

    __slots__ = ("context", "is_recording", "native")

    def __init__(self, native: trace.Span) -> None:
        self.native = native
        self.is_recording = native.is_recording()
        self.context = _told(native.get_span_context())

    def end(
        self, name: str, attributes: dict[str, Attribute], failure: str | None, end_ns: int
    ) -> None:
        """End it; `failure` makes it one that has failed."""
        if self.is_recording:
            self.native.update_name(name)
            self.native.set_attributes(attributes)
            if failure is not None:
                self.native.set_status(Status(StatusCode.ERROR, failure))
        self.native.end(end_ns)


class OpenTelemetry:
    """A tracer of the SDK, ours or the host program's."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def current(self) -> Parent | None:
        """Return the span that the calling program is in."""
        known = trace.get_current_span().get_span_context()
        return _told(known) if known.is_valid else None

    def start(
        self,
        name: str,
        parent: Parent | Exported | None,
        kind: Kind,
        start_ns: int,
        attributes: dict[str, Attribute],
        links: Sequence[Exported],
    ) -> OpenTelemetrySpan:
        """Begin a span. The context is given, never the task's own."""
        context = Context()
        if isinstance(parent, Parent):
            context = trace.set_span_in_context(NonRecordingSpan(_remote(parent)), context)
        elif parent is not None:
            context = trace.set_span_in_context(parent.native, context)
        return OpenTelemetrySpan(
            self._tracer.start_span(
                name,
                context=context,
                kind=_KINDS[kind],
                attributes=attributes,
                links=[Link(one.native.get_span_context()) for one in links],
                start_time=start_ns,
            )
        )


def _told(known: SpanContext) -> Parent:
    return Parent(
        f"{known.trace_id:032x}",
        f"{known.span_id:016x}",
        int(known.trace_flags),
        known.trace_state.to_header(),
    )


def _remote(parent: Parent) -> SpanContext:
    return SpanContext(
        int(parent.trace_id, 16),
        int(parent.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(parent.flags),
        trace_state=TraceState.from_header([parent.state]) if parent.state else None,
    )
