"""Events of the pool, written to the log and published to subscribers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from headrace.core.status import EventKind, PoolEvent

log = logging.getLogger("headrace.pool")

_MAX_UNREAD = 1000
_WARNINGS: frozenset[EventKind] = frozenset(
    {"load_failed", "not_loaded", "died", "failed", "continued"}
)


class EventBus:
    """Publishes events to any number of subscribers; slow ones lose the oldest events."""

    def __init__(self) -> None:
        self._subscribers: set[_Subscriber] = set()
        self._closed = False

    def publish(self, kind: EventKind, model: str = "", replica: int = 0, **data: Any) -> None:
        """Log an event and pass it to the subscribers."""
        level = logging.WARNING if kind in _WARNINGS else logging.INFO
        log.log(level, "headrace.pool.%s", kind, extra={"data": {"model": model, **data}})
        self.forward(
            PoolEvent(time=time.time(), kind=kind, model=model, replica=replica, data=data)
        )

    def forward(self, event: PoolEvent) -> None:
        """Pass an event to the subscribers alone."""
        for subscriber in self._subscribers:
            subscriber.put(event)

    def close(self) -> None:
        """End all subscriptions, after the events published so far."""
        self._closed = True
        for subscriber in self._subscribers:
            subscriber.put(None)

    async def subscribe(self) -> AsyncGenerator[PoolEvent, None]:
        """Yield events from now on, until the pool is closed."""
        subscriber = _Subscriber()
        self._subscribers.add(subscriber)
        try:
            while not (self._closed and not subscriber.unread):
                if (event := await subscriber.get()) is None:
                    return
                yield event
        finally:
            self._subscribers.discard(subscriber)


class _Subscriber:
    def __init__(self) -> None:
        self.unread: deque[PoolEvent | None] = deque(maxlen=_MAX_UNREAD)
        self._arrived = asyncio.Event()

    def put(self, event: PoolEvent | None) -> None:
        self.unread.append(event)
        self._arrived.set()

    async def get(self) -> PoolEvent | None:
        while not self.unread:
            self._arrived.clear()
            await self._arrived.wait()
        return self.unread.popleft()
