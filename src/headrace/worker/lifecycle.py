"""The states of a worker and the moves between them (contract W7)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from headrace.core.errors import Draining, HeadraceError, LoadFailed, Loading
from headrace.core.model import State


class Lifecycle:
    """created -> loading -> ready -> draining -> stopped; failed from anywhere, with a reason.

    `start` may be called by many at once and at any time: one load answers them all.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: State = "created"
        self.reason: str | None = None
        self._starting: asyncio.Task[None] | None = None

    async def start(self, load: Callable[[], Awaitable[None]]) -> None:
        """Run `load` unless the worker is ready or loading already.

        Raises:
            Draining: the worker is being stopped.
            HeadraceError: what `load` raised; the state is then failed.
        """
        if self.state == "ready":
            return
        if self.state == "draining":
            raise Draining(f"{self.name} is stopping.")
        if self._starting is None or self._starting.done():
            self.state, self.reason = "loading", None
            self._starting = asyncio.create_task(self._start(load), name=f"load {self.name}")
        # The load belongs to all who wait for it: one that gives up does not end it.
        try:
            await asyncio.shield(self._starting)
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise Draining(f"{self.name} was stopped while it was loading.") from None

    async def _start(self, load: Callable[[], Awaitable[None]]) -> None:
        try:
            await load()
        except HeadraceError as error:
            self.fail(error.message)
            raise
        except Exception as error:
            # The machine can refuse anything: a process, a socket, a directory.
            self.fail(f"{type(error).__name__}: {error}")
            raise LoadFailed(f"{self.name} could not be loaded.", detail=self.reason) from error
        except BaseException:
            self.fail("Loading was given up.")
            raise
        self.state = "ready"

    def fail(self, reason: str) -> None:
        """Enter `failed`, unless the worker is being stopped anyway."""
        if self.state not in {"draining", "stopped"}:
            self.state, self.reason = "failed", reason

    async def abandon_start(self) -> None:
        """Cancel a load under way and wait until it has ended."""
        task = self._starting
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait({task})
        if task is not None and not task.cancelled():
            task.exception()

    def require_ready(self) -> None:
        """Refuse a request that comes at the wrong time.

        Raises:
            Loading, Draining, LoadFailed: by state.
        """
        if self.state == "ready":
            return
        if self.state in {"draining", "stopped"}:
            raise Draining(f"{self.name} is {self.state}.")
        if self.state == "failed":
            raise LoadFailed(f"{self.name} has failed: {self.reason}")
        raise Loading(f"{self.name} is not ready: {self.state}.")

    def __repr__(self) -> str:
        """Tell the state and its reason."""
        return f"<{self.name} {self.state}{f': {self.reason}' if self.reason else ''}>"


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
