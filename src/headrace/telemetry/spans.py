"""Spans: kept with the record of a request and, if enabled, exported to OpenTelemetry.

Contexts are passed explicitly. None is attached to a task: a stream can be read by any task, and a
context that is attached before a `yield` may be detached in another task, or never.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from headrace.core.errors import CapacityError, HeadraceError, QueueFull, QueueTimeout, RequestError
from headrace.core.record import Attribute, SpanRecord
from headrace.telemetry import names

Kind = Literal["server", "client", "internal"]

# A W3C traceparent. Later versions may add fields to the four of the first version.
_HEADER = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_LONGEST_STATE = 512
_SAMPLED = 1


class Parent(NamedTuple):
    """The context of a span. Ids are lower-case hex; `state` is passed on unchanged."""

    trace_id: str
    span_id: str
    flags: int = _SAMPLED
    state: str = ""

    @classmethod
    def parse(cls, traceparent: str, tracestate: str = "") -> Parent | None:
        """Parse the two headers; None if they are malformed."""
        match = _HEADER.fullmatch(traceparent.strip())
        if match is None:
            return None
        version, trace_id, span_id, flags, more = match.groups()
        is_null = not int(trace_id, 16) * int(span_id, 16)
        if version == "ff" or (version == "00" and more) or is_null:
            return None
        # A state that is too long may be dropped, but not cut.
        state = tracestate.strip()
        state = state if len(state) <= _LONGEST_STATE and state.isascii() else ""
        return cls(trace_id, span_id, int(flags, 16), state if state.isprintable() else "")

    @property
    def traceparent(self) -> str:
        """The header that makes another span a child of this one."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


class Exported(Protocol):
    """A span of OpenTelemetry."""

    context: Parent
    is_recording: bool
    native: Any

    def end(
        self, name: str, attributes: dict[str, Attribute], failure: str | None, end_ns: int
    ) -> None:
        """End the span; `failure` marks it as failed."""
        ...


class Exporter(Protocol):
    """Makes OpenTelemetry spans; times are nanoseconds since 1970."""

    def start(
        self,
        name: str,
        parent: Parent | Exported | None,
        kind: Kind,
        start_ns: int,
        attributes: dict[str, Attribute],
        links: Sequence[Exported],
    ) -> Exported:
        """Start a span."""
        ...

    def current(self) -> Parent | None:
        """Return the current span of the calling program."""
        ...


class Trace:
    """The trace of one request: its ended spans, its attempts, and its two clocks.

    `began` is monotonic seconds, as all times of spans are.
    """

    __slots__ = ("attempts", "began", "ended", "offset_ns", "parent", "root")

    def __init__(self, began: float, parent: Parent | None) -> None:
        self.began = began
        self.parent = parent
        self.ended: list[SpanRecord] = []
        self.attempts: list[Span] = []
        self.root: Span | None = None
        self.offset_ns = time.time_ns() - time.monotonic_ns()

    def forget(self) -> None:
        """Drop the spans, which refer to the trace, so that no reference cycle is left."""
        self.root = None
        self.attempts.clear()

    def unix_ns(self, at: float) -> int:
        """Return a monotonic time as nanoseconds since 1970."""
        return int(at * 1e9) + self.offset_ns


class Span:
    """One step of a request. It ends once; later calls of `end` are ignored."""

    __slots__ = (
        *("attributes", "began", "context", "ended", "exported", "kind", "name", "parent_id"),
        "trace",
    )

    def __init__(
        self,
        trace: Trace,
        name: str,
        kind: Kind,
        began: float,
        attributes: dict[str, Attribute],
        parent: Parent | Span | None,
        exported: Exported | None,
    ) -> None:
        self.trace, self.name, self.began = trace, name, began
        self.kind: Kind = kind
        self.attributes, self.exported = attributes, exported
        self.ended: float | None = None
        inherited = parent.context if isinstance(parent, Span) else parent
        self.parent_id = inherited.span_id if inherited else ""
        if exported is None:
            trace_id = inherited.trace_id if inherited else secrets.token_hex(16)
            flags, state = (inherited.flags, inherited.state) if inherited else (0, "")
            self.context = Parent(trace_id, secrets.token_hex(8), flags, state)
        else:
            self.context = exported.context

    @property
    def is_unexported(self) -> bool:
        """Whether it is not exported to OpenTelemetry."""
        return self.exported is None or not self.exported.is_recording

    @property
    def outside(self) -> Parent:
        """The parent of spans in other processes: without an export, the caller's own span.

        Otherwise their parent would be a span that is never exported.
        """
        if self.exported is None and self.trace.parent is not None:
            return self.trace.parent
        return self.context

    def end(self, ended: float, error: BaseException | None = None) -> None:
        """End the span, with the error if it has failed."""
        if self.ended is not None:
            return
        self.ended = max(ended, self.began)
        failure = None if error is None else failed(error)
        if error is not None and (kind := error_type(error)):
            self.attributes[names.ERROR] = kind
        if self.exported is not None:
            end_ns = self.trace.unix_ns(self.ended)
            self.exported.end(self.name, self.attributes, failure, end_ns)
        self.trace.ended.append(
            SpanRecord(
                name=self.name,
                span_id=self.context.span_id,
                parent_id=self.parent_id,
                start_ms=round((self.began - self.trace.began) * 1000, 3),
                ms=round((self.ended - self.began) * 1000, 3),
                kind=self.kind,
                failed=failure is not None,
                attributes=self.attributes,
            )
        )


class Tracing:
    """Makes spans. `exporter` is OpenTelemetry, if enabled.

    `exports_content` is whether spans may hold content. `close` ends the export; it may block.
    `loads` holds the last load of each model.
    """

    def __init__(
        self,
        exporter: Exporter | None = None,
        *,
        exports_content: bool = False,
        close: Callable[[], None] | None = None,
    ) -> None:
        self.exporter = exporter
        self.exports_content = exports_content
        self.loads: dict[str, Span] = {}
        self._close = close

    def span(
        self,
        trace: Trace,
        name: str,
        parent: Parent | Span | None,
        began: float,
        *,
        kind: Kind = "internal",
        attributes: dict[str, Attribute] | None = None,
        links: Sequence[Span] = (),
    ) -> Span:
        """Start a span: a child of another, of the caller's, or a root."""
        given, exported = attributes or {}, None
        above = parent.exported if isinstance(parent, Span) else parent
        # Children of a span that was not sampled are not exported.
        if self.exporter is not None and not (isinstance(parent, Span) and parent.is_unexported):
            linked = [link.exported for link in links if link.exported is not None]
            start_ns = trace.unix_ns(began)
            exported = self.exporter.start(name, above, kind, start_ns, given, linked)
        return Span(trace, name, kind, began, given, parent, exported)

    async def aclose(self) -> None:
        """Export the remaining spans, for about two seconds at most. Idempotent."""
        close, self._close = self._close, None
        if close is not None:
            await asyncio.to_thread(close)


def error_type(error: BaseException) -> str:
    """Return the class name of an error; empty for a cancelled request."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return ""
    return type(error).__name__


def failed(error: BaseException) -> str | None:
    """Return the message of a failed span; None if the span has not failed.

    As in the conventions for HTTP, client errors (status 400 to 499) and disconnects are not
    failures of the service.
    """
    if isinstance(error, RequestError | QueueFull | QueueTimeout) or not error_type(error):
        return None
    return error.message if isinstance(error, HeadraceError) else type(error).__name__


def was_refused(error: BaseException) -> bool:
    """Whether a request was refused: it is invalid, or there is no capacity."""
    return isinstance(error, RequestError | CapacityError)
