"""What happens in the pool, told to the log and to everybody who listens."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from headrace.core.status import EventKind, PoolEvent

log = logging.getLogger("headrace.pool")

_MOST_UNREAD = 1000
_LOUD: frozenset[EventKind] = frozenset({"load_failed", "died", "failed", "continued"})


class Feed:
    """Events to any number of listeners; one who does not read loses the oldest."""

    def __init__(self) -> None:
        self._listeners: set[_Listener] = set()
        self._closed = False

    def tell(self, kind: EventKind, model: str = "", replica: int = 0, **data: Any) -> None:
        """Log an event and pass it on."""
        level = logging.WARNING if kind in _LOUD else logging.INFO
        log.log(level, "headrace.pool.%s", kind, extra={"data": {"model": model, **data}})
        event = PoolEvent(time=time.time(), kind=kind, model=model, replica=replica, data=data)
        for listener in self._listeners:
            listener.put(event)

    def close(self) -> None:
        """End all streams of events, after what has been told."""
        self._closed = True
        for listener in self._listeners:
            listener.put(None)

    async def listen(self) -> AsyncGenerator[PoolEvent, None]:
        """Yield what is told from now on, until the pool is closed."""
        listener = _Listener()
        self._listeners.add(listener)
        try:
            while not (self._closed and not listener.unread):
                if (event := await listener.get()) is None:
                    return
                yield event
        finally:
            self._listeners.discard(listener)


class _Listener:
    def __init__(self) -> None:
        self.unread: deque[PoolEvent | None] = deque(maxlen=_MOST_UNREAD)
        self._something = asyncio.Event()

    def put(self, event: PoolEvent | None) -> None:
        self.unread.append(event)
        self._something.set()

    async def get(self) -> PoolEvent | None:
        while not self.unread:
            self._something.clear()
            await self._something.wait()
        return self.unread.popleft()
