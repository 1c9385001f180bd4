"""Who looks on at what a pool does: loads, requests, and the attempts at each.

Told where the events pass anyway: a generator around each stream would cost more than all that
it does.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Generic, Protocol, Self, TypeVar

from headrace.core.backend import Backend
from headrace.core.events import Event
from headrace.core.model import ModelSpec
from headrace.core.request import (
    EmbedRequest,
    EmbedResult,
    GenerateRequest,
    RerankRequest,
    RerankResult,
)

Asked = TypeVar("Asked", GenerateRequest, EmbedRequest, RerankRequest)


class Seen(Protocol[Asked]):
    """A request that is looked at; `request` is what is to be asked on its behalf."""

    request: Asked

    def saw(self, what: Event | EmbedResult | RerankResult) -> None:
        """Take note of an event, or of the result, without waiting. Never raises."""
        ...


class Watch(Protocol):
    """Looks on. What is raised within, or thrown in, is how a request or an attempt ended."""

    def asked(self, request: Asked) -> AbstractContextManager[Seen[Asked]]:
        """Look at a request, which is told of each of its events."""
        ...

    def attempted(
        self, request: Asked, worker: Backend, spec: ModelSpec
    ) -> AbstractContextManager[Seen[Asked]]:
        """Look at what one worker makes of a request; it is told of the Finish, or the result."""
        ...

    def loading(self, worker: Backend, spec: ModelSpec) -> AbstractAsyncContextManager[None]:
        """Look at a load."""
        ...

    def closed(self) -> None:
        """What was looked at is closed: requests that are read to no end will have none."""
        ...


class Unseen(Generic[Asked]):
    """A request that nobody looks at."""

    def __init__(self, request: Asked) -> None:
        self.request = request

    def saw(self, what: Event | EmbedResult | RerankResult) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        """Do nothing."""
        return self

    def __exit__(self, *how: object) -> None:
        """Do nothing."""


class Nobody:
    """Looks on at nothing."""

    def asked(self, request: Asked) -> Unseen[Asked]:
        """Do nothing."""
        return Unseen(request)

    def attempted(self, request: Asked, worker: Backend, spec: ModelSpec) -> Unseen[Asked]:
        """Do nothing."""
        return Unseen(request)

    def loading(self, worker: Backend, spec: ModelSpec) -> AbstractAsyncContextManager[None]:
        """Do nothing."""
        return contextlib.nullcontext()

    def closed(self) -> None:
        """Do nothing."""
