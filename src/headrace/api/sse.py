"""Streams of events as server-sent events: ready bytes, one body message for each event."""

from __future__ import annotations

import time

from headrace.api import problems
from headrace.api.exchange import Exchange
from headrace.api.frames import Frames
from headrace.api.timing import header
from headrace.core.errors import GenerationFailed
from headrace.core.events import Delta, Finish
from headrace.core.stream import Primed, Stream, prime

_START = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
_COMMENT = b": waiting\n\n"
_DONE = b"data: [DONE]\n\n"


async def send_stream(exchange: Exchange, stream: Stream, frames: Frames) -> None:
    """Answer with a stream, and close it whatever happens.

    A failure before the first delta is raised, so that it gets its own status; a later one is
    told as an event, after which the answer ends without `[DONE]`.

    Raises:
        HeadraceError: nothing has been sent yet.
    """
    primed = await prime(stream, exchange.settings.headers_after_s)
    try:
        waited = (time.monotonic() - exchange.call.received) * 1000
        timing = header({"ttft" if primed.first.done() else "waiting": waited})
        await exchange.start(200, (*_START, *timing))
        last = await _pump(exchange, primed, frames)
    except Exception as error:  # noqa: BLE001 - the edge: whatever failed is told to the client
        last = _break_off(exchange, error)
    finally:
        await primed.aclose()
    # Only now: who has read the last byte finds everything given back, and what the server does
    # at the end of an answer cannot cut the closing short.
    await exchange.send({"type": "http.response.body", "body": last})


async def _pump(exchange: Exchange, primed: Primed, frames: Frames) -> bytes:
    """Send all but the last chunks, and return those."""
    send = exchange.send
    while not await primed.settled(exchange.settings.comment_every_s):
        await send({"type": "http.response.body", "body": _COMMENT, "more_body": True})
    event = await primed.first
    chunk = frames.opening()
    if isinstance(event, Delta):
        chunk += frames.delta(event)
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        chunk = b""
        async for event in primed.stream:
            if isinstance(event, Delta):
                if data := frames.delta(event):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            elif isinstance(event, Finish):
                break
    if not isinstance(event, Finish):
        raise GenerationFailed("The stream ended without a Finish.")
    return chunk + frames.finish(event) + _DONE


def _break_off(exchange: Exchange, error: Exception) -> bytes:
    exchange.call.outcome = "error"
    problems.log(error, exchange.call.id)
    return b"data: " + problems.describe(error, exchange.call.id).body() + b"\n\n"
