"""OpenRequests: the requests that a pool answers, for whose end its close waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress


class OpenRequests:
    """The number of open requests."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._count = 0
        self._until = float("inf")
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """How many requests are open."""
        return self._count

    @contextmanager
    def counted(self) -> Generator[None]:
        """Count a request until it has ended."""
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1
            self._changed.set()

    def limit_wait(self, wait_s: float) -> None:
        """Let `wait` end after `wait_s` seconds, counted from now; it never becomes later."""
        self._until = min(self._until, self._clock() + wait_s)
        self._changed.set()

    async def wait(self) -> None:
        """Wait until no request is open, or `limit_wait` has passed."""
        while self._count and (left := self._until - self._clock()) > 0:
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()
