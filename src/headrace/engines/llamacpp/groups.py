"""Requests of different adapters take turns: a batch of llama.cpp has one adapter.

Its server computes the batch of its first busy slot and of those with the same adapter, and all
others wait until no such slot is busy, for as long as requests come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Groups:
    """Runs requests of one adapter at a time, in the order in which their groups came.

    Requests of the group that runs begin at once, until one of another group waits; from then on
    those that run end, and the first that waits begins with all others of its group.
    """

    def __init__(self) -> None:
        self._current = ""
        self._running = 0
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def turn(self, adapter: str) -> AsyncGenerator[None]:
        """Wait until requests of an adapter may run, and hold the place of one."""
        if self._running and (self._waiting or adapter != self._current):
            await self._wait(adapter)
        else:
            self._current = adapter
            self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._next()

    async def _wait(self, adapter: str) -> None:
        entry = (adapter, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        try:
            await entry[1]
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:
                self._running -= 1
            self._next()
            raise

    def _next(self) -> None:
        """Begin a group if none runs, or if none of another group waits any more."""
        if not self._waiting:
            return
        if not self._running:
            self._current = self._waiting[0][0]
        elif any(adapter != self._current for adapter, _ in self._waiting):
            return
        begun = [entry for entry in self._waiting if entry[0] == self._current]
        self._waiting = deque(entry for entry in self._waiting if entry[0] != self._current)
        for _, future in begun:
            self._running += 1
            future.set_result(None)
