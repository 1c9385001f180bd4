"""What the pool needs of a worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Protocol

from headrace.core.backend import Backend
from headrace.core.errors import HeadraceError
from headrace.core.model import ModelSpec, State
from headrace.worker.spec import OnProgress


class PooledWorker(Backend, Protocol):
    """A Backend that is started and closed. `died` is set when it has ended unexpectedly."""

    died: asyncio.Event
    failure: HeadraceError | None
    """Why it has ended, once `died` is set."""

    @property
    def held(self) -> Mapping[str, int]:
        """The memory that it holds as it was last measured, in bytes by device."""
        ...

    @property
    def drafting(self) -> bool | None:
        """As in `ReplicaStatus`."""
        ...

    @property
    def state(self) -> State:
        """One of the states of contract W7."""
        ...

    @property
    def pid(self) -> int | None:
        """The id of its process, if there is one."""
        ...

    async def start(self) -> None:
        """Load. Idempotent."""
        ...

    async def adapt(self, spec: ModelSpec) -> bool:
        """Serve a specification that differs in its adapters; return False if it cannot.

        Running requests go on with the adapters that they have.

        Raises:
            LoadFailed, OutOfMemory: one cannot be loaded, and nothing has changed; or it takes too
                long, and may come about later.
            WorkerDied: it ended meanwhile.
        """
        ...

    async def memory(self) -> dict[str, int]:
        """Return the memory that it holds, in bytes by device."""
        ...

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Drain and close; when it returns, the memory is free."""
        ...

    def abandon(self) -> None:
        """End its process, after the event loop was closed."""
        ...


OpenWorker = Callable[[ModelSpec, OnProgress], PooledWorker]
