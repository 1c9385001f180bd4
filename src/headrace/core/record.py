"""Records of requests: while they run, and after they have ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec

from headrace.core.envelope import Operation
from headrace.core.metrics import InferenceMetrics

Outcome = Literal["ok", "refused", "error", "cancelled"]
"""How it ended: `refused` is a RequestError or a CapacityError, `error` any other error."""

Phase = Literal["queued", "loading", "prefill", "decode"]

Attribute = str | bool | int | float | tuple[str, ...]


class SpanRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step of a request. `start_ms` counts from the reception of the request.

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
    """The content of a request and its answer, redacted; kept only if that is enabled.

    `input` (`asked` in JSON) is the messages or prompt of the request (or its inputs, or query and
    documents) as builtins, `answered` is one text for each choice, with a line for each of its
    calls. `tools` are those of the request, `suffix` is what follows its gap.
    """

    input: Any = msgspec.field(default=None, name="asked")
    answered: tuple[str, ...] = ()
    tools: Any = None
    suffix: str | None = None


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request that has ended.

    `time` is Unix seconds when it was received. `model` is the name of the served model, or the
    requested name if there is none. `client` is a short id of the key. `error` is the class name
    of the error, `message` its message to the client. `parameters` are the settings in the
    request. `spans` has the root first.
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
    """One running request. `since` is Unix time; tokens are those of all choices so far."""

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
    """The rates of one model over the last `window_s` seconds. Latencies are milliseconds.

    Percentiles are None if no request that ended in the window has such a figure.
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
    """Running requests, oldest first, and the rates of each model."""

    running: tuple[RunningRequest, ...] = ()
    rates: tuple[Rates, ...] = ()


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One HTTP request that has ended. `route` is a path of the table of routes, or `-`.

    `status` is 0 if the client disconnected before the headers were sent.
    """

    method: str
    route: str
    status: int
    outcome: Outcome
    seconds: float


class Sink(Protocol):
    """Receives the record of each finished request, on the event loop."""

    def record(self, record: RequestRecord) -> None:
        """Take a record, without waiting. Never raises."""
        ...


class Monitor(Protocol):
    """The telemetry that the HTTP API serves, and to which it reports its own requests."""

    def activity(self) -> Activity:
        """Return running requests and rates, without waiting."""
        ...

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in a format of Prometheus, and its content type. May block."""
        ...

    def called(self, call: Call) -> None:
        """Count an HTTP request that has ended, without waiting."""
        ...


Sinks = Sequence[Sink]
