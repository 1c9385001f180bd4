"""The observer interface of a pool: requests, their attempts, and loads.

The pool calls an observer for each event: a generator around each stream would cost more than the
work of an observer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Protocol, Self

from headrace.core.events import Event, Finish
from headrace.core.model import ModelInfo, ModelSpec
from headrace.core.request import AnyRequest


class ObservedWorker(Protocol):
    """What an observer reads of a worker.

    It may have a `pid`, that of its process, and a `node`, the name of its machine.
    """

    def models(self) -> Sequence[ModelInfo]:
        """Return the metadata of its models, without waiting."""
        ...


class AttemptObservation(Protocol):
    """One worker's attempt at a request; `request` is the request for the worker."""

    request: AnyRequest

    def finished(self, finish: Finish) -> None:
        """Record the Finish, without waiting. Never raises."""
        ...


class Observation(Protocol):
    """A request that is observed; `request` replaces the original."""

    request: AnyRequest

    def saw(self, event: Event) -> None:
        """Record an event, without waiting. Never raises."""
        ...

    def attempt(
        self, request: AnyRequest, worker: ObservedWorker, spec: ModelSpec
    ) -> AbstractContextManager[AttemptObservation]:
        """Observe one worker's attempt. An exception within the context is its failure."""
        ...


class Observer(Protocol):
    """Observes a pool. An exception within a context is the failure of the request or load."""

    def observe(self, request: AnyRequest) -> AbstractContextManager[Observation]:
        """Observe a request; the pool reports each of its events."""
        ...

    def loading(self, worker: ObservedWorker, spec: ModelSpec) -> AbstractAsyncContextManager[None]:
        """Observe a load."""
        ...

    def closed(self) -> None:
        """End all open observations: the pool is closed, and unread streams will not end."""
        ...


class NullObservation:
    """Observes nothing."""

    def __init__(self, request: AnyRequest) -> None:
        self.request = request

    def saw(self, event: Event) -> None:
        """Do nothing."""

    def finished(self, finish: Finish) -> None:
        """Do nothing."""

    def attempt(
        self, request: AnyRequest, worker: ObservedWorker, spec: ModelSpec
    ) -> NullObservation:
        """Do nothing."""
        return NullObservation(request)

    def __enter__(self) -> Self:
        """Do nothing."""
        return self

    def __exit__(self, *how: object) -> None:
        """Do nothing."""


class NullObserver:
    """Observes nothing."""

    def observe(self, request: AnyRequest) -> NullObservation:
        """Do nothing."""
        return NullObservation(request)

    def loading(self, worker: ObservedWorker, spec: ModelSpec) -> AbstractAsyncContextManager[None]:
        """Do nothing."""
        return contextlib.nullcontext()

    def closed(self) -> None:
        """Do nothing."""
