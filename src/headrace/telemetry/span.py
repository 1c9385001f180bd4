"""Spans: kept with the record of a request and, where it is switched on, told to OpenTelemetry.

Contexts are handed over as they are. Nothing is attached to a task: a stream is read by whoever
likes, and what is attached before a `yield` may be detached in another task, or never.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from headrace.core.errors import CapacityError, HeadraceError, QueueFull, QueueTimeout, RequestError
from headrace.core.record import Attribute, SpanRecord
from headrace.telemetry import names, traceparent
from headrace.telemetry.traceparent import Parent

Kind = Literal["server", "client", "internal"]


class Exported(Protocol):
    """A span of OpenTelemetry."""

    context: Parent
    is_recording: bool
    native: Any

    def end(
        self, name: str, attributes: dict[str, Attribute], failure: str | None, end_ns: int
    ) -> None:
        """End it; `failure` makes it one that has failed."""
        ...


class Exporter(Protocol):
    """Makes spans of OpenTelemetry; times are nanoseconds since 1970."""

    def start(
        self,
        name: str,
        parent: Parent | Exported | None,
        kind: Kind,
        start_ns: int,
        attributes: dict[str, Attribute],
        links: Sequence[Exported],
    ) -> Exported:
        """Begin one."""
        ...

    def current(self) -> Parent | None:
        """Return the span that the calling program is in."""
        ...


class Trace:
    """What belongs to one request: its spans that have ended, its attempts, and its two clocks.

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
        """Let go of the spans, which hold the trace: the garbage collector is spared a circle."""
        self.root = None
        self.attempts.clear()

    def unix_ns(self, at: float) -> int:
        """Return a monotonic time as nanoseconds since 1970."""
        return int(at * 1e9) + self.offset_ns


class Span:
    """One step. It ends once: what is said to it afterwards is not heard."""

    __slots__ = (
        *("attributes", "began", "ended", "exported", "flags", "id", "kind", "name", "parent_id"),
        *("state", "trace", "trace_id"),
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
        inherited = _context(parent)
        self.parent_id = inherited.span_id if inherited else ""
        if exported is None:
            trace_id = inherited.trace_id if inherited else secrets.token_hex(16)
            flags, state = (inherited.flags, inherited.state) if inherited else (0, "")
            own = Parent(trace_id, secrets.token_hex(8), flags, state)
        else:
            own = exported.context
        self.trace_id, self.id, self.flags, self.state = own

    @property
    def is_silent(self) -> bool:
        """Whether OpenTelemetry hears nothing of it."""
        return self.exported is None or not self.exported.is_recording

    @property
    def traceparent(self) -> str:
        """The header that makes another span one below this."""
        return traceparent.written(self.trace_id, self.id, self.flags)

    @property
    def outside(self) -> Parent:
        """What others are told: where nothing is exported, the caller's own span is their parent.

        It would hang on a span that nobody will ever see.
        """
        if self.exported is None and self.trace.parent is not None:
            return self.trace.parent
        return Parent(self.trace_id, self.id, self.flags, self.state)

    def end(self, ended: float, error: BaseException | None = None) -> None:
        """End it, with what went wrong."""
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
                span_id=self.id,
                parent_id=self.parent_id,
                start_ms=round((self.began - self.trace.began) * 1000, 3),
                ms=round((self.ended - self.began) * 1000, 3),
                kind=self.kind,
                failed=failure is not None,
                attributes=self.attributes,
            )
        )


class Tracing:
    """Makes spans. `exporter` is OpenTelemetry, where it is switched on.

    `tells_content` is whether spans may hold content. `close` ends the export; it may block.
    `loads` holds the last load of each model.
    """

    def __init__(
        self,
        exporter: Exporter | None = None,
        *,
        tells_content: bool = False,
        close: Callable[[], None] | None = None,
    ) -> None:
        self.exporter = exporter
        self.tells_content = tells_content
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
        """Begin a span below another, below the caller's, or below none."""
        given, exported = attributes or {}, None
        above = parent.exported if isinstance(parent, Span) else parent
        # Below a span that was not sampled nothing is.
        if self.exporter is not None and not (isinstance(parent, Span) and parent.is_silent):
            linked = [link.exported for link in links if link.exported is not None]
            start_ns = trace.unix_ns(began)
            exported = self.exporter.start(name, above, kind, start_ns, given, linked)
        return Span(trace, name, kind, began, given, parent, exported)

    async def aclose(self) -> None:
        """Send what is still to be sent, for about two seconds at most. Idempotent."""
        close, self._close = self._close, None
        if close is not None:
            await asyncio.to_thread(close)


def _context(parent: Parent | Span | None) -> Parent | None:
    if isinstance(parent, Span):
        return Parent(parent.trace_id, parent.id, parent.flags, parent.state)
    return parent


def error_type(error: BaseException) -> str:
    """Return the class of an error; nothing for a request that was cancelled."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return ""
    return type(error).__name__


def failed(error: BaseException) -> str | None:
    """Return what a failed span says, and None where the span has not failed.

    As HTTP's conventions have it: what the client could do better (a status of 400 to 499) is no
    failure of the service, and neither is that he went away. All else is.
    """
    if isinstance(error, RequestError | QueueFull | QueueTimeout) or not error_type(error):
        return None
    return error.message if isinstance(error, HeadraceError) else type(error).__name__


def was_refused(error: BaseException) -> bool:
    """Tell whether nothing is broken: the request is wrong, or there is no room."""
    return isinstance(error, RequestError | CapacityError)
