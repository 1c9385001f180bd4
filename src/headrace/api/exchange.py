"""One request and its answer, on raw ASGI."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeVar, get_type_hints

import msgspec
from msgspec.structs import replace
from starlette.types import Receive, Scope, Send

from headrace.api import fields, limits, problems
from headrace.api.bodies import KEPT, ClientGone, encoded, read_body
from headrace.api.fields import Unknown
from headrace.api.limits import ApiSettings
from headrace.api.problems import Dialect, Headers, Problem, Refused
from headrace.core import record
from headrace.core.backend import Admin, Backend
from headrace.core.envelope import new_id
from headrace.core.errors import InvalidRequest
from headrace.core.keys import KeyStore
from headrace.core.metrics import InferenceMetrics
from headrace.core.model import ModelInfo
from headrace.core.record import Monitor, Outcome
from headrace.core.request import GenerateRequest
from headrace.core.stream import Stream
from headrace.core.tools import Thinking
from headrace.core.wording import names_unknown_field, refusal

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)

_LARGE_BODY = 64 << 10
# An unterminated string runs to the end, so that the scan never looks at a byte twice.
_GZIP = b"\x1f\x8b"
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_BYTE = re.compile(r"\(byte (\d+)\)")


@dataclass(eq=False)
class Service:
    """The backend, the settings and the observer that every handler uses.

    `settings` may be replaced; a request that has begun keeps its own. `describe` lets the backend
    read the file of a model that is not loaded, `unload` ends a model, and `called` counts an HTTP
    request that has ended. `kept` is an answer to be used again for a moment.
    `keys` are those of a database.
    """

    backend: Backend
    settings: ApiSettings
    ready: Callable[[], bool] | None = None
    admin: Admin | None = None
    observer: Monitor | None = None
    describe: Callable[[str], Awaitable[object]] | None = None
    unload: Callable[[str], Awaitable[object]] | None = None
    called: Callable[[record.Call], None] | None = None
    kept: object = None
    keys: KeyStore | None = None

    def current(self) -> tuple[ApiSettings, KeyStore | None]:
        """Return the settings of a request that begins now, and the keys that count for it."""
        keys = self.keys if self.settings.uses_database else None
        if keys is not None and keys.required and not self.settings.needs_key:
            self.settings = replace(self.settings, needs_key=True)
        return self.settings, keys

    def models(self, call: Call) -> Sequence[ModelInfo]:
        """Return the models that the key of a call may use."""
        infos = self.backend.models()
        account = self.keys.account(call.client) if self.keys is not None else None
        if account is None:
            return infos
        return [info for info in infos if account.allows((info.id, *info.aliases))]

    def model_name(self, requested: str | None) -> str:
        """Return the model's name for an answer: as requested, or that of the only model."""
        served = self.backend.models() if not requested else ()
        return requested or (served[0].id if len(served) == 1 else "")

    def ask(self, request: GenerateRequest, call: Call) -> Stream:
        """Begin an answer, and note on the call what of the request has no effect at its model."""
        if request.thinking.switched(request.template_options) != Thinking():
            name = self.model_name(request.model)
            for info in self.backend.models():
                # Of an upstream it is not known.
                thinks = info.capabilities.thinking != "none" or not info.tool_format
                if name in (info.id, *info.aliases) and not thinks:
                    call.left_out = (*call.left_out, f"thinking, as {info.id} does not think")
        return self.backend.ask(request)


@dataclass(slots=True)
class Call:
    """The state of a request while it runs; the access log is written from it.

    `received` is monotonic seconds. `status` is 0 until the headers have gone out. `client` is a
    short id of the key, and `is_admin` whether it is an admin's. A request of a `batch` gives way
    to others. `traceparent` and `tracestate` are as the client sent them. `unknown` are the unknown
    fields of the body, `left_out` what of the request is not done, and `names` the names that the
    client used for fields of the core.
    """

    id: str = field(default_factory=new_id)
    received: float = field(default_factory=time.monotonic)
    status: int = 0
    outcome: Outcome | Literal[""] = ""
    client: str = ""
    is_admin: bool = False
    batch: bool = False
    left_out: tuple[str, ...] = ()
    traceparent: str = ""
    tracestate: str = ""
    metrics: InferenceMetrics | None = None
    problem: str = ""
    unknown: tuple[Unknown, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict[str, str])


class Exchange:
    """Reads one request, and sends its answer.

    `held` counts the body among those of all requests; it is None if that is not to be done.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        settings: ApiSettings,
        call: Call,
        dialect: Dialect,
    ) -> None:
        self.scope = scope
        self.send = send
        self.settings = settings
        self.call = call
        self.body_size = 0
        self.held: ExitStack | None = None
        self.dialect = dialect
        self.receive = receive

    @property
    def headers(self) -> dict[bytes, bytes]:
        """The headers of the request, by their names in lower case."""
        return dict(self.scope["headers"])

    async def read(self, decoder: msgspec.json.Decoder[S], limit: int | None = None) -> S:
        """Read the body and decode it; a large one in a thread, so that the loop stays free.

        `limit` replaces `max_body_bytes` of the settings.

        Raises:
            Refused: 408, 413, 415 or 503.
            InvalidRequest: it is not JSON, too deep, or a field is wrong.
            Unsupported: a field is understood but cannot be honoured.
            ClientGone: the client left before its end.
        """
        limit = limit or self.settings.max_body_bytes
        body = await read_body(self.receive, self.headers, limit)
        self.body_size = len(body)
        if self.held is not None:
            self.held.enter_context(KEPT.hold(len(body), self.call.client))
        if len(body) > _LARGE_BODY:
            decoded, unknown = await asyncio.to_thread(decode, body, decoder)
        else:
            decoded, unknown = decode(body, decoder)
        if self.settings.unknown_fields == "refuse":
            fields.check(unknown)
        if self.settings.unknown_fields == "warn":
            self.call.unknown = unknown
        return decoded

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work`; if the client disconnects first, cancel it and wait for its end.

        Raises:
            ClientGone: the client closed the connection.
        """
        task = asyncio.create_task(work)
        disconnect = asyncio.create_task(_disconnected(self.receive))
        try:
            await asyncio.wait({task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise ClientGone
        finally:
            task.cancel()
            disconnect.cancel()
            await asyncio.wait({task, disconnect})
            # Retrieved, or asyncio would log an exception that was never retrieved.
            for ended in (task, disconnect):
                _ = ended.cancelled() or ended.exception()
            # A raised exception refers to this frame, which must not refer back to it.
            del task, disconnect, ended

    def start(self, status: int, headers: Headers) -> Awaitable[None]:
        """Send the status and the headers."""
        return self.send(
            {"type": "http.response.start", "status": status, "headers": list(headers)}
        )

    async def reply(
        self,
        body: bytes,
        *,
        status: int = 200,
        headers: Headers = (),
        kind: bytes = b"application/json",
    ) -> None:
        """Send a whole answer."""
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, ((b"content-type", kind), length, *headers))
        await self.send({"type": "http.response.body", "body": body})

    async def answer(
        self, answer: Any, metrics: InferenceMetrics | None = None, *, status: int = 200
    ) -> None:
        """Send a value as JSON, with its figures as a header."""
        self.call.metrics = metrics
        headers = () if metrics is None else server_timing(metrics)
        await self.reply(msgspec.json.encode(answer), status=status, headers=headers)

    def problem(self, error: Exception) -> Problem:
        """Log an exception, and return it as a problem of the fields that the client sent."""
        problems.log(error, self.call.id)
        problem = problems.renamed(problems.describe(error, self.call.id), self.call.names)
        self.call.metrics, self.call.problem = problem.metrics, problem.message
        return problem

    async def fail(self, error: Exception) -> None:
        """Send the response for an exception, with its figures; no headers have been sent."""
        problem = self.problem(error)
        timing = () if problem.metrics is None else server_timing(problem.metrics)
        body = self.dialect.write(problem, self.call.id)
        await self.reply(body, status=problem.status, headers=(*problem.headers, *timing))


Handler = Callable[[Service, Exchange], Awaitable[None]]


@dataclass(frozen=True)
class Route:
    """One row of the table of routes; `chunk` is the type of the parts of a streamed answer.

    `answer` is a struct or another type, such as a union of them; it is None if there are only
    streams, or text of the media types `texts`. The events of a stream have names if they are
    `named`, or if there is no `answer`; `lines` are lines of JSON instead. `query` has the
    parameters of the URL, `optional` are names of others. `unready` is whether a 503 has the same
    body as a 200. The request is a `form` with a file, or JSON.
    """

    method: str
    path: str
    handler: Handler
    answer: Any
    request: type[msgspec.Struct] | None = None
    chunk: type[msgspec.Struct] | None = None
    named: bool = False
    lines: bool = False
    unready: bool = False
    query: type[msgspec.Struct] | None = None
    optional: tuple[str, ...] = ()
    form: bool = False
    admin: bool = False
    texts: tuple[str, ...] = ()


def server_timing(metrics: InferenceMetrics) -> Headers:
    """Return a `Server-Timing` header of every duration that is defined, in milliseconds."""
    gaps = metrics.inter_token_ms
    return timing_header(
        {
            "queue": metrics.queue_ms,
            "load": metrics.load_ms,
            "prefill": metrics.prefill_ms,
            "ttft": metrics.time_to_first_token_ms,
            "tpot": metrics.time_per_output_token_ms,
            "itl-p50": gaps and gaps.p50,
            "itl-p99": gaps and gaps.p99,
            "itl-max": gaps and gaps.max,
            "total": metrics.total_ms,
        }
    )


def timing_header(durations: dict[str, float | None]) -> Headers:
    """Return one `Server-Timing` header of the durations that are not None."""
    parts = [f"{name};dur={ms:.3f}" for name, ms in durations.items() if ms is not None]
    return ((b"server-timing", ", ".join(parts).encode()),)


def decode(body: bytes, decoder: msgspec.json.Decoder[S]) -> tuple[S, tuple[Unknown, ...]]:
    """Decode a body, and return it with its unknown fields.

    Raises:
        InvalidRequest, Unsupported: see `Exchange.read`.
    """
    limits.check_depth(body)
    try:
        return _decode(body, decoder)
    except msgspec.ValidationError as error:
        raise refusal(error, decoder.type) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _not_json(body, str(error)) from None


@cache
def marked(kind: type[msgspec.Struct], mark: str) -> dict[str, Any]:
    """Return the value of `Meta(extra={mark: ...})` of each field that has it."""
    return {
        name: meta.extra[mark]
        for name, hint in get_type_hints(kind, include_extras=True).items()
        for meta in getattr(hint, "__metadata__", ())
        if isinstance(meta, msgspec.Meta) and meta.extra and mark in meta.extra
    }


def _not_json(body: bytes, problem: str) -> InvalidRequest | Refused:
    """Return the error for a body that cannot be decoded, with its reason."""
    if not body.strip():
        return InvalidRequest("The body is empty; it must be JSON.")
    if body.startswith(_GZIP):
        return encoded("gzip")
    if body.startswith(_BYTE_ORDER_MARKS):
        return InvalidRequest("The body begins with a byte order mark; send UTF-8 without one.")
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return InvalidRequest(f"The body is not UTF-8: {error.reason} (byte {error.start}).")
    match = _BYTE.search(problem)
    place = int(match[1]) if match else len(body)
    # The decoder has just read a surrogate, and what follows it is not the other half.
    if _SURROGATE.search(body, max(place - 14, 0), place + 1) and "character" not in problem:
        message = "half of a surrogate pair (\\ud800 to \\udfff), which is no character"
        return InvalidRequest(f"The body has {message}, before byte {place}.")
    reason = problem.removeprefix("JSON is malformed: ")
    if reason == "Input data was truncated":
        reason = "it ends too early"
    return InvalidRequest(f"The body is not valid JSON: {reason}.")


def _decode(body: bytes, decoder: msgspec.json.Decoder[S]) -> tuple[S, tuple[Unknown, ...]]:
    try:
        return decoder.decode(body), ()
    except msgspec.ValidationError as error:
        if not (names_unknown_field(error) and issubclass(decoder.type, fields.Body)):
            raise
    known, unknown = fields.known(msgspec.json.decode(body), decoder.type)
    return decoder.decode(msgspec.json.encode(known)), unknown


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
