"""Attempt: one attempt at a request, with its ticket, its lease and the worker's stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from headrace.core.errors import QueueTimeout
from headrace.core.events import Event, Finish
from headrace.pool.continuation import Continuation
from headrace.pool.entry import ModelEntry
from headrace.pool.loader import Loader
from headrace.pool.observer import AttemptObservation, Observation

_PROGRESS_S = 0.5


class Attempt:
    """A context manager that holds the ticket and the lease, and releases them at exit."""

    def __init__(
        self,
        loader: Loader,
        entry: ModelEntry,
        continuation: Continuation,
        observation: Observation,
        clock: Callable[[], float],
    ) -> None:
        self._loader = loader
        self._entry = entry
        self._continuation = continuation
        self._observation = observation
        self._clock = clock
        self._tokens: float | None = None
        self._observing: AbstractContextManager[AttemptObservation] | None = None
        self._observed: AttemptObservation | None = None
        self._stream: AsyncGenerator[Event, None] | None = None

    async def __aenter__(self) -> Self:
        """Join the queue.

        Raises:
            HeadraceError: the queue is full, or the model is not served.
        """
        is_second = self._continuation.way is not None
        self._ticket = self._entry.join(self._continuation.request, priority=is_second)
        try:
            if not self.is_granted:
                self._loader.ensure_loaded(self._entry)
        except BaseException:
            self._entry.leave(self._ticket)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the stream, and release the ticket or the slots."""
        try:
            if self._stream is not None:
                await self._stream.aclose()
        finally:
            if self._observing is not None:
                self._observing.__exit__(kind, error, trace)
            self._entry.leave(self._ticket, self._tokens)
            self._loader.request_ended(self._entry)

    @property
    def is_granted(self) -> bool:
        """Whether the request has got a lease, or has failed."""
        return self._ticket.lease.done()

    async def wait(self) -> None:
        """Wait a moment for the lease.

        Raises:
            QueueTimeout: the request's deadline has passed.
            Loading: the load takes longer than the request's `load_wait_s`.
        """
        if (loading := self._entry.load_wait_error(self._ticket)) is not None:
            raise loading
        deadline, wait_s = self._ticket.request.deadline, _PROGRESS_S
        if deadline is not None:
            left = deadline - self._clock()
            if left <= 0:
                where = "in the queue" if self._entry.is_ready else "for the model to load"
                raise QueueTimeout(f"The deadline passed while the request waited {where}.")
            wait_s = min(wait_s, left)
        await asyncio.wait({self._ticket.lease}, timeout=wait_s)

    def events(self) -> AsyncGenerator[Event, None]:
        """Return the worker's stream.

        Raises:
            HeadraceError: the request has failed in the queue.
        """
        worker = self._ticket.lease.result().worker
        request = self._continuation.start(self._ticket.load_s)
        self._observing = self._observation.attempt(request, worker, self._entry.spec)
        self._observed = self._observing.__enter__()
        self._stream = worker.ask(self._observed.request)
        return self._stream

    def finished(self, finish: Finish) -> None:
        """Note the worker's Finish."""
        self._tokens = finish.usage.total_tokens
        if self._observed is not None:
            self._observed.finished(finish)
