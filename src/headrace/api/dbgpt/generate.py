"""POST /api/worker/generate and generate_stream: outputs with all of the text so far."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec

from headrace.api.dbgpt.figures import figures, usage_body
from headrace.api.dbgpt.wire import NAMES, PromptRequest, core_fields, image_urls, to_request
from headrace.api.exchange import ClientGone, Exchange, Service
from headrace.api.images import body_limit, held
from headrace.core.errors import GenerationFailed
from headrace.core.events import Delta, Event, Finish, PromptTokens
from headrace.core.metrics import InferenceMetrics
from headrace.core.stream import Stream

FRAME_EVERY_S = 0.025
"""Between two frames of a short answer. A frame has the whole text, which is long with time."""

_Send = Callable[[Exchange, Stream], Coroutine[Any, Any, None]]

_LONGER_EVERY = 4096
_SLOWEST = 4
_FRAMES = ((b"content-type", b"application/octet-stream"), (b"cache-control", b"no-cache"))
_DECODER = msgspec.json.Decoder(PromptRequest)
_encode = msgspec.json.Encoder().encode
# Any other value has clients cut the beginning of the text.
_CONTEXT = b'{"prompt_echo_len_char":-1,"has_format_prompt":false,"echo":false}'


async def generate(service: Service, exchange: Exchange) -> None:
    """Answer with one output; a failure is one too, with the status 200."""
    await _or_failure(exchange, _answer(service, exchange, _reply))


async def generate_stream(service: Service, exchange: Exchange) -> None:
    """Answer with frames: outputs, each followed by a byte 0."""
    await _or_failure(exchange, _answer(service, exchange, _send))


async def _answer(service: Service, exchange: Exchange, send: _Send) -> None:
    wire = await exchange.read(_DECODER, body_limit(service, exchange.settings))
    exchange.call.names = NAMES
    common = core_fields(service, exchange, wire, "generate")
    async with held(exchange, image_urls(wire)) as translation:
        request = await translation.run(lambda reader: to_request(wire, common, reader))
        await exchange.unless_gone(send(exchange, service.backend.ask(request)))


async def _or_failure(exchange: Exchange, work: Awaitable[None]) -> None:
    """Send an exception as an output: clients do not read the status of a stream."""
    try:
        await work
    except Exception as error:
        if isinstance(error, ClientGone):
            raise
        problem = exchange.problem(error)
        exchange.call.outcome = "error" if problem.status >= 500 else "refused"
        body = exchange.dialect.write(problem, exchange.call.id)
        if exchange.call.status:
            await exchange.send({"type": "http.response.body", "body": body})
        else:
            await exchange.reply(body)


async def _reply(exchange: Exchange, stream: Stream) -> None:
    answer = Answer()
    await _collect(stream, answer)
    exchange.call.metrics = answer.metrics
    await exchange.reply(answer.last())


async def _collect(stream: Stream, answer: Answer) -> None:
    try:
        async for event in stream:
            answer.add(event)
    finally:
        await stream.aclose()


async def _send(exchange: Exchange, stream: Stream) -> None:
    """Send the first text at once, and what has come since then after each pause."""
    answer, changed = Answer(), asyncio.Event()
    answer.on_change = changed.set
    reading = asyncio.create_task(_collect(stream, answer))
    reading.add_done_callback(lambda _: changed.set())
    try:
        while True:
            await changed.wait()
            changed.clear()
            if reading.done():
                break
            if not exchange.call.status:
                await exchange.start(200, _FRAMES)
            frame = answer.frame()
            await exchange.send({"type": "http.response.body", "body": frame, "more_body": True})
            await asyncio.wait({reading}, timeout=answer.pause_s)
        reading.result()
    finally:
        reading.cancel()
        await asyncio.wait({reading})
        # Retrieved, or asyncio would log an exception that was never retrieved.
        _ = reading.cancelled() or reading.exception()
        del reading
    last = answer.last() + b"\0"
    exchange.call.metrics = answer.metrics
    if not exchange.call.status:
        await exchange.start(200, _FRAMES)
    await exchange.send({"type": "http.response.body", "body": last})


class Answer:
    """The answer so far. Texts are kept as they are sent, as the inside of strings in JSON.

    `on_change` is called when there is more to send.
    """

    def __init__(self) -> None:
        self.on_change: Callable[[], object] = lambda: None
        self._text, self._thinking = bytearray(), bytearray()
        self._finish: Finish | None = None
        self._first_tokens = 0
        self._frames = 0

    @property
    def metrics(self) -> InferenceMetrics | None:
        """The figures of an answer that has ended."""
        return self._finish and self._finish.metrics

    @property
    def pause_s(self) -> float:
        """How long to wait with the next frame: longer for a longer text, but never long."""
        longer = (len(self._text) + len(self._thinking)) / _LONGER_EVERY
        return FRAME_EVERY_S * min(1 + longer, _SLOWEST)

    def add(self, event: Event) -> None:
        """Take an event of the stream."""
        if isinstance(event, Delta):
            self._add(event.text, event.reasoning, len(event.token_ids))
        elif isinstance(event, PromptTokens):
            self._add(event.text, "", 0)
        elif isinstance(event, Finish):
            self._finish = event

    def _add(self, text: str, thinking: str, tokens: int) -> None:
        if not (text or thinking):
            return
        self._first_tokens = self._first_tokens or tokens
        self._text += _encode(text)[1:-1]
        if thinking:
            self._thinking += _encode(thinking)[1:-1]
        self.on_change()

    def frame(self) -> bytes:
        """Return the output so far, and the byte after it."""
        self._frames += 1
        return self._output(b"null", b"null", b"null") + b"\0"

    def last(self) -> bytes:
        """Return the whole output, with the reason of its end and the figures.

        Raises:
            GenerationFailed: the stream ended without a Finish.
        """
        if (finish := self._finish) is None:
            raise GenerationFailed("The stream ended without a Finish.")
        self._frames += 1
        reason = b'"length"' if finish.finish_reason == "length" else b'"stop"'
        measured = figures(finish.metrics, self._frames, self._first_tokens)
        return self._output(reason, _encode(usage_body(finish.usage)), _encode(measured))

    def _output(self, reason: bytes, usage: bytes, metrics: bytes) -> bytes:
        content = _part(b"text", self._text)
        if self._thinking:
            # Clients look for a text in any output.
            content = b"[%b,%b]" % (_part(b"thinking", self._thinking), content)
        parts = (content, _CONTEXT, reason, usage, metrics)
        return (
            b'{"content":%b,"error_code":0,"incremental":false,"model_context":%b,'
            b'"finish_reason":%b,"usage":%b,"metrics":%b}' % parts
        )


def _part(kind: bytes, text: bytearray) -> bytes:
    return b'{"object":{"data":"%b","format":"text"},"type":"%b"}' % (text, kind)
