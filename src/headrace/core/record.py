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
    request. `spans` has the root first. `batch` is whether it is of a batch.
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
    batch: bool = False


class RunningRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One running request. `since` is Unix time; tokens are those of all choices so far.

    `base` is the model that answers, of a name with a preset or an adapter of its own.
    """

    id: str
    model: str
    operation: Operation
    client: str
    since: float
    phase: Phase
    time_to_first_token_ms: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    base: str | None = None


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


class TraceFilter(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """A filter of records; None matches all. Times are Unix seconds of the reception.

    `slower_than_ms` is compared with the whole duration; `client` is a prefix of a key's id.
    """

    since: float | None = None
    until: float | None = None
    model: str | None = None
    outcome: Outcome | None = None
    slower_than_ms: float | None = None
    client: str = ""

    def takes(self, record: RequestRecord) -> bool:
        """Whether a record matches."""
        return (
            (self.since is None or record.time >= self.since)
            and (self.until is None or record.time <= self.until)
            and self.model in (None, record.model)
            and self.outcome in (None, record.outcome)
            and (self.slower_than_ms is None or record.metrics.total_ms > self.slower_than_ms)
            and record.client.startswith(self.client)
        )


class Amounts(msgspec.Struct, kw_only=True):
    """How much was used. `seconds` are of engines, `joules` of GPUs; None where not known."""

    requests: int = 0
    failed: int = 0
    refused: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    seconds: float = 0.0
    joules: float | None = None

    def add(self, other: Amounts) -> None:
        """Add other amounts."""
        for name in self.__struct_fields__[:-1]:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.joules is not None:
            self.joules = (self.joules or 0.0) + other.joules


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """The usage of one group; `group` has the values it was grouped by."""

    group: dict[str, str]
    amounts: Amounts


UsageGroup = Literal["day", "model", "key", "operation", "priority"]


class UsageFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Days (YYYY-MM-DD, UTC, both included), model and key of usage; None is all."""

    since: str = ""
    until: str = ""
    model: str | None = None
    key: str | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The service at one time (Unix seconds): requests, rates of all models, booked memory.

    Tokens per second are those of the last 5 s. The time to the first token is the median of the
    last minute, of the model where it is longest. `memory` is in bytes by device.
    """

    time: float
    running: int = 0
    queued: int = 0
    prompt_tokens_per_second: float = 0.0
    completion_tokens_per_second: float = 0.0
    time_to_first_token_p50_ms: float | None = None
    memory: dict[str, int] = {}


class History(msgspec.Struct, frozen=True, kw_only=True):
    """The samples of the last minutes, oldest first, one every `every_s` seconds."""

    every_s: float
    samples: tuple[Sample, ...] = ()


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

    def history(self) -> History:
        """Return the samples of the last minutes, without waiting."""
        ...

    def traces(self, wanted: TraceFilter, skip: int, limit: int) -> list[RequestRecord]:
        """Return kept records, newest first, without the first `skip`. Blocking.

        Raises:
            ConfigError: the files cannot be read.
        """
        ...

    def trace(self, name: str) -> RequestRecord:
        """Return the kept record with an id, or a prefix of one. Blocking.

        Raises:
            UnknownRequest: there is none.
            InvalidRequest: there is more than one.
            ConfigError: the files cannot be read.
        """
        ...

    def usage(self, by: Sequence[UsageGroup], wanted: UsageFilter) -> Sequence[UsageRow]:
        """Return the usage of each group, in order. Blocking.

        Raises:
            ConfigError: the database cannot be read.
        """
        ...


Sinks = Sequence[Sink]
