"""Streams of events as server-sent events, one ASGI body message for each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import msgspec

from headrace.api import limits
from headrace.api.answers import usage_body
from headrace.api.exchange import Exchange, Service, timing_header
from headrace.api.problems import Headers, Problem
from headrace.api.wire import GenerateFields
from headrace.core.errors import GenerationFailed
from headrace.core.events import (
    Choice,
    Delta,
    Event,
    Finish,
    Progress,
    PromptTokens,
    ToolCallDelta,
)
from headrace.core.status import PoolEvent
from headrace.core.stream import Primed, Stream, collect, prime

EVENTS: Headers = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
)
_DONE = b"data: [DONE]\n\n"
_SYSTEM_FINGERPRINT = "headrace"

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True)
class ChunkFormat:
    """How a route writes a choice: `role` opens it, `text` and `after` enclose the text.

    `reasoning_too` is a second place for thinking. `empty` is written when a choice has ended.
    `logprobs` returns the value to encode, `call` the delta of a tool call, `rest` what the calls
    of a choice have left at its end, `prompt` the log probabilities of an echo.
    """

    object: str
    role: bytes
    text: bytes
    reasoning: bytes
    after: bytes
    empty: bytes
    logprobs: Callable[[Delta], Any]
    reasoning_too: bytes = b""
    call: Callable[[ToolCallDelta], Any] | None = None
    rest: Callable[[int], Iterable[Any]] | None = None
    prompt: Callable[[PromptTokens], Any] | None = None


class Encoder(Protocol):
    """Writes the events of an answer; empty where there is nothing to send."""

    @property
    def start(self) -> Headers:
        """The headers of the answer."""
        ...

    def waiting(self, progress: Progress | None) -> bytes:
        """Return what keeps a silent stream alive."""
        ...

    def opening(self, progress: Progress | None) -> bytes:
        """Return what comes before the first event; `progress` is the latest before it."""
        ...

    def delta(self, delta: Delta) -> bytes:
        """Return the addition to the text or the thinking."""
        ...

    def rare(self, event: ToolCallDelta | PromptTokens) -> bytes:
        """Return the addition to a call of a tool, or the tokens of the prompt."""
        ...

    def finish(self, finish: Finish) -> bytes:
        """Return the end of an answer."""
        ...

    def failure(self, problem: Problem, request_id: str) -> bytes:
        """Return the end of an answer that failed."""
        ...


class ChunkEncoder:
    """Writes OpenAI's chunks. Only the text of a delta is encoded; the rest is prepared once.

    A chunk is `data: {head,"choices":[{"index":0, text ,"finish_reason":null}]}`.
    """

    start = EVENTS

    def __init__(
        self, head: dict[str, Any], form: ChunkFormat, choices: int, *, usage: bool
    ) -> None:
        fields = {**head, "object": form.object}
        self._head = b"data: " + encode(fields)[:-1] + b',"choices":['
        self._form = form
        self._choices = choices
        self._usage = usage
        self._end = b'],"usage":null}\n\n' if usage else b"]}\n\n"
        self._close = b',"finish_reason":null}' + self._end
        self._plain = form.after + b',"logprobs":null' + self._close
        self._text = [self._before(index) + form.text for index in range(choices)]

    def waiting(self, progress: Progress | None) -> bytes:
        """Return a comment."""
        return comment(progress)

    def opening(self, progress: Progress | None) -> bytes:
        """Return a chunk with the role for each choice, if the route has one."""
        del progress
        if not self._form.role:
            return b""
        tail = self._form.role + b',"logprobs":null' + self._close
        return b"".join(self._before(index) + tail for index in range(self._choices))

    def delta(self, delta: Delta) -> bytes:
        """Return the chunk of a delta; empty if the delta has no text."""
        if delta.logprobs or delta.reasoning:
            return self._rare(delta)
        if not delta.text:
            return b""
        return self._text[delta.index] + encode(delta.text) + self._plain

    def rare(self, event: ToolCallDelta | PromptTokens) -> bytes:
        """Return the chunk of an event that few answers have; empty if the route has none."""
        return self._prompt(event) if isinstance(event, PromptTokens) else self._call(event)

    def _call(self, delta: ToolCallDelta) -> bytes:
        # What a call that was cut has sent cannot be taken back.
        if self._form.call is None or delta.cut:
            return b""
        return self._addition(delta.index, self._form.call(delta))

    def _addition(self, index: int, delta: Any) -> bytes:
        body = b'"delta":' + encode(delta) + b',"logprobs":null' + self._close
        return self._before(index) + body

    def _prompt(self, event: PromptTokens) -> bytes:
        form = self._form
        if form.prompt is None or not event.text:
            return b""
        logprobs = form.after + b',"logprobs":' + encode(form.prompt(event))
        before = self._before(event.index) + form.text + encode(event.text)
        return before + logprobs + self._close

    def finish(self, finish: Finish) -> bytes:
        """Return the reason of each choice, the usage if it was requested, and the end."""
        chunks = [self._ended(index, reason) for index, reason in enumerate(finish.finish_reasons)]
        last: dict[str, Any] = {"metrics": finish.metrics}
        if self._usage:
            chunks = [chunk + self._end for chunk in chunks]
            last = {"usage": usage_body(finish.usage), **last}
            chunks.append(self._head + b"]," + encode(last)[1:] + b"\n\n")
        else:
            chunks[:-1] = [chunk + self._end for chunk in chunks[:-1]]
            chunks[-1] += b"]," + encode(last)[1:] + b"\n\n"
        if (rest := self._form.rest) is not None:
            indices = range(self._choices)
            left = [self._addition(index, delta) for index in indices for delta in rest(index)]
            chunks = [*left, *chunks]
        return b"".join(chunks) + _DONE

    def failure(self, problem: Problem, request_id: str) -> bytes:
        """Return OpenAI's error as an event; `[DONE]` does not follow."""
        del request_id
        return b"data: " + problem.body() + b"\n\n"

    def _rare(self, delta: Delta) -> bytes:
        form, before, chunk = self._form, self._before(delta.index), b""
        if delta.reasoning:
            text = encode(delta.reasoning)
            again = form.reasoning_too + text if form.reasoning_too else b""
            chunk = before + form.reasoning + text + again + self._plain
        if delta.logprobs:
            logprobs = form.after + b',"logprobs":' + encode(form.logprobs(delta))
            chunk += before + form.text + encode(delta.text) + logprobs + self._close
        elif delta.text:
            chunk += before + form.text + encode(delta.text) + self._plain
        return chunk

    def _before(self, index: int) -> bytes:
        return self._head + b'{"index":%d,' % index

    def _ended(self, index: int, reason: str) -> bytes:
        end = b',"logprobs":null,"finish_reason":"' + reason.encode() + b'"}'
        return self._before(index) + self._form.empty + end


class Reply(NamedTuple):
    """How a route answers; `write` builds a whole answer from its head and the choices."""

    prefix: str
    form: ChunkFormat
    choices: int
    write: Callable[[dict[str, Any], tuple[Choice, ...]], msgspec.Struct]


async def answer(
    service: Service, exchange: Exchange, wire: GenerateFields, stream: Stream, reply: Reply
) -> None:
    """Send a stream event by event, or collected as one answer.

    Raises:
        HeadraceError, ClientGone: nothing has been sent.
    """
    head: dict[str, Any] = {
        "id": reply.prefix + exchange.call.id,
        "created": int(time.time()),
        "model": service.model_name(wire.model),
        "system_fingerprint": _SYSTEM_FINGERPRINT,
    }
    if wire.stream:
        encoder = ChunkEncoder(head, reply.form, reply.choices, usage=wire.wants_usage)
        await exchange.unless_gone(send_stream(exchange, stream, encoder))
        return
    result = await exchange.unless_gone(collect(stream))
    head |= {"usage": usage_body(result.usage), "metrics": result.metrics}
    await exchange.answer(reply.write(head, result.choices), result.metrics)


async def send_stream(exchange: Exchange, stream: Stream, encoder: Encoder) -> None:
    """Send a stream, and close it in any case.

    A failure before the first delta is raised, so that it gets its own status; a later one is
    sent as an event and ends the answer.

    Raises:
        HeadraceError: nothing has been sent yet.
    """
    primed = await prime(stream, exchange.settings.headers_after_s)
    try:
        waited = (time.monotonic() - exchange.call.received) * 1000
        timing = timing_header({"ttft" if primed.first.done() else "waiting": waited})
        await exchange.start(200, (*encoder.start, *timing))
        last = await _pump(exchange, primed, encoder)
    except Exception as error:  # noqa: BLE001 - sent to the client as an event
        exchange.call.outcome = "error"
        last = encoder.failure(exchange.problem(error), exchange.call.id)
    finally:
        await primed.aclose()
    # Sent last, so that all is released when a client has read the last byte, and the server's
    # work at the end of an answer cannot interrupt the closing.
    await exchange.send({"type": "http.response.body", "body": last})


async def send_events(exchange: Exchange, events: AsyncGenerator[PoolEvent, None]) -> None:
    """Send each event as it happens, comments in between, until the events end.

    Raises:
        Exception: raised by `events` at its start; nothing has been sent yet.
    """
    upcoming = _next(events)
    try:
        # Subscribed before the headers are sent, so that a client that has seen them misses none.
        await asyncio.wait({upcoming}, timeout=0)
        if upcoming.done():
            upcoming.result()
        await exchange.start(200, EVENTS)
        data = _comment("listening")
        while data and exchange.scope["method"] != "HEAD":
            await exchange.send({"type": "http.response.body", "body": data, "more_body": True})
            await asyncio.wait({upcoming}, timeout=limits.COMMENT_EVERY_S)
            if not upcoming.done():
                data = _comment("listening")
                continue
            data = _pool_event(upcoming.result())
            upcoming = _next(events)
    finally:
        upcoming.cancel()
        await asyncio.wait({upcoming})
        # Retrieved, or asyncio would log an exception that was never retrieved.
        _ = upcoming.cancelled() or upcoming.exception()
        await events.aclose()
    await exchange.send({"type": "http.response.body", "body": b""})


def encode(value: Any) -> bytes:
    """Return JSON without the characters that some line readers take for the end of a line.

    JSON allows U+0085, U+2028 and U+2029 as they are.
    """
    data = _encode(value)
    if data.isascii():
        return data
    data = data.replace(b"\xc2\x85", b"\\u0085").replace(b"\xe2\x80\xa8", b"\\u2028")
    return data.replace(b"\xe2\x80\xa9", b"\\u2029")


async def _pump(exchange: Exchange, primed: Primed, encoder: Encoder) -> bytes:
    """Send all chunks but the last, and return that."""
    send = exchange.send
    while not primed.first.done():
        waiting = encoder.waiting(primed.progress)
        await send({"type": "http.response.body", "body": waiting, "more_body": True})
        await primed.settled(limits.COMMENT_EVERY_S)
    event = await primed.first
    chunk = encoder.opening(primed.progress)
    if isinstance(event, Delta | ToolCallDelta | PromptTokens):
        chunk += encoder.delta(event) if isinstance(event, Delta) else encoder.rare(event)
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        chunk, silence = b"", _Silence()
        async for event in primed.stream:
            if isinstance(event, Delta):
                data = encoder.delta(event)
            elif isinstance(event, Finish):
                break
            else:
                data = _rare(encoder, event)
            if data or (data := silence.filled(encoder)):
                silence.since = 0.0
                await send({"type": "http.response.body", "body": data, "more_body": True})
    if not isinstance(event, Finish):
        raise GenerationFailed("The stream ended without a Finish.")
    exchange.call.metrics = event.metrics
    return chunk + encoder.finish(event)


class _Silence:
    """The time in which a model writes what is not sent; `since` is 0 when something is."""

    __slots__ = ("since",)

    def __init__(self) -> None:
        self.since = 0.0

    def filled(self, encoder: Encoder) -> bytes:
        """Return what keeps the stream alive, if it has been silent for long."""
        now = time.monotonic()
        if not self.since:
            self.since = now
        return encoder.waiting(None) if now - self.since > limits.COMMENT_EVERY_S else b""


def _rare(encoder: Encoder, event: Event) -> bytes:
    if isinstance(event, ToolCallDelta | PromptTokens):
        return encoder.rare(event)
    return encoder.waiting(event) if isinstance(event, Progress) else b""


def _comment(text: str) -> bytes:
    """Return a comment, which readers of server-sent events ignore."""
    return f": {text}\n\n".encode()


def comment(progress: Progress | None) -> bytes:
    """Return a comment with the state of a request that has no token yet."""
    if progress is None:
        return _comment("waiting")
    # In a queue the total is its length, of which no part is ever done.
    if not progress.total or progress.stage == "queued":
        return _comment(progress.stage)
    return _comment(f"{progress.stage} {min(100 * progress.done // progress.total, 100)}%")


def _next(events: AsyncGenerator[PoolEvent, None]) -> asyncio.Future[PoolEvent | None]:
    return asyncio.ensure_future(anext(events, None))


def _pool_event(event: PoolEvent | None) -> bytes:
    """Return the bytes of an event; empty at the end of the stream."""
    return b"event: %b\ndata: %b\n\n" % (event.kind.encode(), encode(event)) if event else b""
