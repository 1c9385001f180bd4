"""What is known of a request while it runs, and what is kept of it once it has ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

from headrace.core.metrics import InferenceMetrics
from headrace.core.request import Operation

Outcome = Literal["ok", "refused", "error", "cancelled"]
"""How it ended: `refused` is a RequestError or a CapacityError, `error` anything else raised."""

Phase = Literal["queued", "loading", "prefill", "decode"]

Attribute = str | bool | int | float | tuple[str, ...]


class SpanRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step of a request. `start_ms` counts from when the request was received.

    Ids are lower-case hex of 8 bytes; the root's `parent_id` is empty, or the caller's.
    """

    name: str
    span_id: str
    parent_id: str
    start_ms: float
    ms: float
    kind: Literal["server", "client", "internal"] = "internal"
    failed: bool = False
    attributes: dict[str, Attribute] = {}


class Content(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was asked and answered, redacted; kept only where that is switched on.

    `asked` is the core request's messages or prompt (or inputs, or query and documents) as
    builtins, `answered` one text for each choice.
    """

    asked: Any = None
    answered: tuple[str, ...] = ()


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request that has ended, in whatever way.

    `time` is Unix seconds when it was received. `model` is the served model's name, or what was
    asked for if there is none of that name. `client` is a short id of the key. `error` is the
    name of the error's class, `message` what the client was told. `parameters` are the request's
    settings that were given. `spans` has the root first.
    """

    id: str
    trace_id: str
    time: float
    operation: Operation
    model: str
    outcome: Outcome
    metrics: InferenceMetrics
    client: str = ""
    finish_reasons: tuple[str, ...] = ()
    error: str = ""
    message: str = ""
    parameters: dict[str, Any] = {}
    spans: tuple[SpanRecord, ...] = ()
    content: Content | None = None


class RunningRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request that runs now. `since` is Unix time; tokens are those of all choices so far."""

    id: str
    model: str
    operation: Operation
    client: str
    since: float
    phase: Phase
    time_to_first_token_ms: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """How one model has done of late, over `window_s` seconds. Latencies are milliseconds.

    Percentiles are None where no request that ended in the window has such a figure.
    """

    model: str
    window_s: float
    requests: int = 0
    failed: int = 0
    prompt_tokens_per_second: float = 0.0
    completion_tokens_per_second: float = 0.0
    time_to_first_token_p50_ms: float | None = None
    time_to_first_token_p99_ms: float | None = None
    time_per_output_token_p50_ms: float | None = None
    time_per_output_token_p99_ms: float | None = None


class Activity(msgspec.Struct, frozen=True, kw_only=True):
    """What goes on now: running requests, oldest first, and the rates of each model."""

    running: tuple[RunningRequest, ...] = ()
    rates: tuple[Rates, ...] = ()


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request as it ended. `route` is a path of the table of routes, or `-`.

    `status` is 0 when the client left before the headers.
    """

    method: str
    route: str
    status: int
    outcome: Outcome
    seconds: float


class Sink(Protocol):
    """Somebody who is told of each request that has ended, on the event loop; never raises."""

    def record(self, record: RequestRecord) -> None:
        """Take note, without waiting for anything."""
        ...


class Observer(Protocol):
    """What the HTTP surface can tell, and be told, of requests."""

    def activity(self) -> Activity:
        """Tell what goes on now, without waiting."""
        ...

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return all figures as Prometheus reads them, and their content type. May block."""
        ...

    def called(self, call: Call) -> None:
        """Take note of an HTTP request that has ended, without waiting."""
        ...


Sinks = Sequence[Sink]
