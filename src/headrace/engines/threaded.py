"""The bridge from blocking engines to async streams."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, TypeVar

from headrace.core.stream import Mailbox

T = TypeVar("T")

_GATHER_S = 0.0005

Emit = Callable[[T], bool]
"""Hands an item to the stream; returns True when the stream is closed and the producer may stop."""


class Inbox:
    """Passes calls from many threads to one event loop, which wakes up once for all pending ones.

    The threads of an engine step call within moments of each other. With several streams open, the
    loop waits `gather_s` for the other threads, so that a step is one turn of the loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, gather_s: float = _GATHER_S) -> None:
        self.open = 0
        self._loop = loop
        self._gather_s = gather_s
        self._lock = threading.Lock()
        self._waiting: list[tuple[Callable[[Any], None], Any]] = []

    def put(self, receive: Callable[[T], None], item: T) -> None:
        """Call `receive(item)` on the loop, in the order of the puts. From any thread."""
        with self._lock:
            self._waiting.append((receive, item))
            wake = len(self._waiting) == 1
        if wake:
            self._loop.call_soon_threadsafe(self._gather)

    def take(self, receive: Callable[[T], None], item: T) -> None:
        """Call `receive(item)` as `put` does, on the thread of the event loop."""
        with self._lock:
            self._waiting.append((receive, item))
            waiting = len(self._waiting)
        if waiting >= self.open:
            self._drain()
        elif waiting == 1:
            self._loop.call_later(self._gather_s, self._drain)

    @contextmanager
    def opened(self) -> Generator[None]:
        """Count an open stream."""
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    def _gather(self) -> None:
        if len(self._waiting) < self.open:
            self._loop.call_later(self._gather_s, self._drain)
        else:
            self._drain()

    def _drain(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for receive, item in waiting:
            receive(item)


class _End:
    """Marks the end of what the producer's thread emits."""


async def stream(
    produce: Callable[[Emit[T]], None], *, inbox: Inbox, executor: Executor
) -> AsyncGenerator[T, None]:
    """Run `produce(emit)` on a thread and yield what it emits.

    An exception in `produce` is raised here after what was emitted before it. When this
    generator is closed, the thread has ended.
    """
    mailbox: Mailbox[object] = Mailbox()
    closed = False

    def emit(item: T) -> bool:
        inbox.put(mailbox.put, item)
        return closed

    def run() -> None:
        try:
            if not closed:
                produce(emit)
        finally:
            inbox.put(mailbox.put, _End)

    thread = asyncio.get_running_loop().run_in_executor(executor, run)
    with inbox.opened():
        try:
            while (item := await mailbox.get()) is not _End:
                yield item  # pyright: ignore[reportReturnType]  # produce emits only T
            await thread
        finally:
            closed = True
            await _ended(thread)


async def finished(thread: asyncio.Future[T]) -> T:
    """Return the result of a thread; if this is cancelled, the thread has ended too."""
    try:
        return await asyncio.shield(thread)
    finally:
        await _ended(thread)


async def _ended(thread: asyncio.Future[Any]) -> None:
    await asyncio.wait({thread})
    if not thread.cancelled():
        thread.exception()
