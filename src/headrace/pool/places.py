"""What loads share: the places of those that run at a time, and a process that is kept warm."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

_UNKNOWN_S, _SHORTEST_S, _SLACK = 60.0, 1.0, 1.25


class KeepWarm(Protocol):
    """Keeps a process started ahead of the next load."""

    def keep(self, wanted: bool) -> None:
        """Start the process or end it, without waiting."""
        ...

    async def aclose(self) -> None:
        """End the process, and wait for it."""
        ...


class Places:
    """The places of loads, of which each takes one, not much longer than it should need it.

    A load that takes longer, or hangs, goes on without a place.
    """

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)

    @contextlib.asynccontextmanager
    async def hold(
        self, expected_s: float | None, overdue: Callable[[], None]
    ) -> AsyncGenerator[None]:
        """Wait for a place and hold it; `overdue` is called when it is lost to others."""
        await self._free.acquire()
        held = [self._free.release]

        def leave() -> None:
            while held:
                held.pop()()

        def expire() -> None:
            leave()
            overdue()

        longest_s = _UNKNOWN_S if expected_s is None else max(_SHORTEST_S, expected_s)
        timer = asyncio.get_running_loop().call_later(_SLACK * longest_s, expire)
        try:
            yield
        finally:
            timer.cancel()
            leave()
