"""What happens in a pool, as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from headrace.api.exchange import Exchange
from headrace.api.frames import encode
from headrace.api.sse import START, comment
from headrace.core.status import PoolEvent

Events = AsyncGenerator[PoolEvent, None]


async def send_events(exchange: Exchange, events: Events) -> None:
    """Send each event as it comes, comments in between, and end when the events do.

    Raises:
        Exception: what `events` raises at its start; nothing has been sent yet.
    """
    coming = _next(events)
    try:
        # It has begun to listen before the headers go out: who has seen them misses nothing.
        await asyncio.wait({coming}, timeout=0)
        if coming.done():
            coming.result()
        await exchange.start(200, START)
        data = comment("listening")
        while data and exchange.scope["method"] != "HEAD":
            await exchange.send({"type": "http.response.body", "body": data, "more_body": True})
            await asyncio.wait({coming}, timeout=exchange.settings.comment_every_s)
            if not coming.done():
                data = comment("listening")
                continue
            data = _write(coming.result())
            coming = _next(events)
    finally:
        coming.cancel()
        await asyncio.wait({coming})
        # Looked at, or asyncio would complain of a failure that nobody is there to read.
        _ = coming.cancelled() or coming.exception()
        await events.aclose()
    await exchange.send({"type": "http.response.body", "body": b""})


def _next(events: Events) -> asyncio.Future[PoolEvent | None]:
    return asyncio.ensure_future(anext(events, None))


def _write(event: PoolEvent | None) -> bytes:
    """Return the event's bytes; none at the end."""
    return b"event: %b\ndata: %b\n\n" % (event.kind.encode(), encode(event)) if event else b""
