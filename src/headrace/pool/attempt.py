"""Attempt: one attempt at a request, with its ticket, its lease and the worker's stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing
from types import TracebackType
from typing import Self

from headrace.core.errors import WorkerDied
from headrace.core.events import ChoicesLeft, Delta, Event, Finish
from headrace.core.request import AnyRequest
from headrace.pool.continuation import Continuation
from headrace.pool.entry import ModelEntry
from headrace.pool.loader import Loader
from headrace.pool.observer import AttemptObservation, Observation
from headrace.pool.worker import PooledWorker
from headrace.worker.process import WorkerProcess


class Attempt:
    """A context manager that holds the ticket and the lease, and releases them at exit.

    `has_begun` is whether the worker has sent a token or a result; until then a request that is
    `alone` has a replica of its own.
    """

    def __init__(
        self,
        loader: Loader,
        entry: ModelEntry,
        continuation: Continuation,
        observation: Observation,
        *,
        alone: bool = False,
    ) -> None:
        self._loader = loader
        self._entry = entry
        self._continuation = continuation
        self._observation = observation
        self.has_begun = False
        self._is_alone = alone
        self._tokens: float | None = None
        self._observing: AbstractContextManager[AttemptObservation] | None = None
        self._observed: AttemptObservation | None = None
        self._stream: AsyncGenerator[Event, None] | None = None

    async def __aenter__(self) -> Self:
        """Join the queue.

        Raises:
            HeadraceError: the queue is full, or the model is not served.
        """
        continuation = self._continuation
        self._ticket = self._entry.join(
            continuation.request,
            priority=continuation.way is not None,
            alone=self._is_alone,
        )
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
        if isinstance(error, WorkerDied):
            self._loader.worker_failed(self._entry, self._ticket.lease.result(), error)
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
        wait_s = self._entry.wait_s(self._ticket.request, self._ticket.joined)
        await asyncio.wait({self._ticket.lease}, timeout=wait_s)

    def events(self) -> AsyncGenerator[Event, None]:
        """Return the worker's stream.

        Raises:
            HeadraceError: the request has failed in the queue.
        """
        worker, request = self._begin()
        self._stream = worker.ask(request)
        return self._stream

    async def relay(self, deliver: Callable[[Event], None]) -> None:
        """Deliver the events of the worker's stream by calls, and return at its end; see `events`.

        An exception of `deliver` ends the stream, and is raised.
        """
        worker, request = self._begin()
        if isinstance(worker, WorkerProcess):
            await worker.relay(request, deliver)
            return
        async with aclosing(worker.ask(request)) as stream:
            async for event in stream:
                deliver(event)

    def _begin(self) -> tuple[PooledWorker, AnyRequest]:
        """Return the worker, and the request for it."""
        worker = self._ticket.lease.result().worker
        request = self._continuation.start(self._ticket.load_s)
        self._observing = self._observation.attempt(request, worker, self._entry.spec)
        self._observed = self._observing.__enter__()
        return worker, self._observed.request

    def saw(self, event: Event) -> None:
        """Note the worker's first token or result; an echoed prompt is none."""
        if type(event) is not Delta or event.token_ids:
            self.has_begun = True
            self._entry.has_begun(self._ticket)

    def choice_ended(self, left: ChoicesLeft) -> None:
        """Note that one of several choices has ended, and give its slot to the next request."""
        lease = self._ticket.lease.result()
        lease.replica.choice_ended(lease, left.count)
        self._entry.grant()

    def finished(self, finish: Finish) -> None:
        """Note the worker's Finish."""
        self._tokens = finish.usage.total_tokens
        if self._observed is not None:
            self._observed.finished(finish)
