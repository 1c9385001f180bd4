"""A process that has started already, so that the next load does not wait for Python."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from headrace.core.errors import WorkerDied
from headrace.worker.spawn import ChildProcess

OnGone = Callable[[WorkerDied], None]
Spawn = Callable[[str, OnGone], Awaitable[ChildProcess]]
"""Returns a running child for the model of that name."""


async def spawn(name: str, on_gone: OnGone) -> ChildProcess:
    """Start a child, from nothing."""
    child = ChildProcess(name, on_gone)
    await child.spawn()
    return child


class WarmProcess:
    """Keeps one child ahead of its use, while it is told to. All methods belong to one loop."""

    def __init__(self) -> None:
        self._coming: asyncio.Task[ChildProcess] | None = None
        self._going: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        """Tell whether there is one."""
        return f"<WarmProcess {'none' if self._coming is None else 'kept'}>"

    def keep(self, wanted: bool) -> None:
        """Have one or have none, from now on. Returns at once; idempotent."""
        coming = self._coming
        if coming is not None and coming.done() and _child(coming) is None:
            self._discard(coming)
            coming = self._coming = None
        if wanted and coming is None:
            self._coming = asyncio.create_task(spawn("nobody", _unnoticed), name="spare process")
        elif not wanted and coming is not None:
            self._coming = None
            self._discard(coming)

    async def take(self, name: str, on_gone: OnGone) -> ChildProcess:
        """Return a running child for the model `name`: the one that was kept, or a new one."""
        coming, self._coming = self._coming, None
        if coming is not None:
            try:
                await asyncio.wait({coming})
            except asyncio.CancelledError:
                self._discard(coming)
                raise
            if (child := _child(coming)) is not None:
                child.adopt(name, on_gone)
                return child
            self._discard(coming)
        return await spawn(name, on_gone)

    async def aclose(self) -> None:
        """Keep none, and wait until it is gone. Idempotent."""
        self.keep(False)
        if self._going:
            await asyncio.wait(self._going)

    def _discard(self, coming: asyncio.Task[ChildProcess]) -> None:
        going = asyncio.create_task(_ended(coming), name="end the spare process")
        self._going.add(going)
        going.add_done_callback(self._going.discard)


def _child(coming: asyncio.Task[ChildProcess]) -> ChildProcess | None:
    """Return what has come, unless it could not be started or has ended since."""
    if coming.cancelled() or coming.exception() is not None or coming.result().gone.is_set():
        return None
    return coming.result()


async def _ended(coming: asyncio.Task[ChildProcess]) -> None:
    # A machine that could not start a process has told those who needed one.
    with contextlib.suppress(OSError):
        await (await coming).end()


def _unnoticed(error: WorkerDied) -> None:
    """NullObserver used it."""
