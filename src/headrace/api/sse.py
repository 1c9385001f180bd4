"""Streams of events as server-sent events: ready bytes, one body message for each event."""

from __future__ import annotations

import time

from headrace.api import problems
from headrace.api.exchange import Exchange
from headrace.api.frames import Frames
from headrace.api.timing import header
from headrace.core.errors import GenerationFailed
from headrace.core.events import Delta, Finish, Progress
from headrace.core.stream import Primed, Stream, prime

START = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"))
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
        await exchange.start(200, (*START, *timing))
        last = await _pump(exchange, primed, frames)
    except Exception as error:  # noqa: BLE001 - the edge: whatever failed is told to the client
        last = _break_off(exchange, error)
    finally:
        await primed.aclose()
    # Only now: who has read the last byte finds everything given back, and what the server does
    # at the end of an answer cannot cut the closing short.
    await exchange.send({"type": "http.response.body", "body": last})


def comment(text: str) -> bytes:
    """Return what every reader of events passes over."""
    return f": {text}\n\n".encode()


def _stage(progress: Progress | None) -> bytes:
    if progress is None:
        return comment("waiting")
    # In a queue the total is how many wait, and nobody is a part of it.
    if not progress.total or progress.stage == "queued":
        return comment(progress.stage)
    return comment(f"{progress.stage} {min(100 * progress.done // progress.total, 100)}%")


async def _pump(exchange: Exchange, primed: Primed, frames: Frames) -> bytes:
    """Send all but the last chunks, and return those."""
    send = exchange.send
    while not primed.first.done():
        waiting = _stage(primed.progress)
        await send({"type": "http.response.body", "body": waiting, "more_body": True})
        await primed.settled(exchange.settings.comment_every_s)
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
            else:
                waiting = _stage(event)
                await send({"type": "http.response.body", "body": waiting, "more_body": True})
    if not isinstance(event, Finish):
        raise GenerationFailed("The stream ended without a Finish.")
    return chunk + frames.finish(event) + _DONE


def _break_off(exchange: Exchange, error: Exception) -> bytes:
    exchange.call.outcome = "error"
    problems.log(error, exchange.call.id)
    return b"data: " + problems.describe(error, exchange.call.id).body() + b"\n\n"
