"""Places for work that takes long, shared fairly between clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary


class Places:
    """A number of places, of which a client with a key has one at a time."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def take(self, client: str) -> Callable[[], None]:
        """Wait for a place, and return the function that gives it back."""
        turn = asyncio.Lock()
        if client:
            turn = self._turns.setdefault(client, turn)
        await turn.acquire()
        try:
            await self._free.acquire()
        except BaseException:
            turn.release()
            raise

        def give_back() -> None:
            self._free.release()
            turn.release()

        return give_back

    @asynccontextmanager
    async def place(self, client: str) -> AsyncGenerator[None]:
        """Take a place, which is given back at the end of the context."""
        give_back = await self.take(client)
        try:
            yield
        finally:
            give_back()
