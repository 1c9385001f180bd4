"""Attempt: one attempt at a request, at one node."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from headrace.cluster.link import NodeLink
from headrace.cluster.view import Node, View
from headrace.core.events import Event, Finish
from headrace.core.model import ModelInfo, ModelSpec
from headrace.core.request import AnyRequest
from headrace.core.status import ModelStatus
from headrace.pool.observer import AttemptObservation, Observation


class NodeWorker:
    """What an observer reads of a node."""

    def __init__(self, node: str, infos: Sequence[ModelInfo]) -> None:
        self.node = node
        self._infos = infos

    def models(self) -> Sequence[ModelInfo]:
        """Return the metadata of the model."""
        return self._infos


class Attempt:
    """A context manager that counts the request at its node, and closes the stream at exit.

    `has_begun` is whether the node has sent more than progress, which the pool notes.
    """

    def __init__(
        self,
        view: View,
        node: Node,
        link: NodeLink,
        status: ModelStatus,
        observation: Observation,
        blocks: Sequence[int],
    ) -> None:
        self.has_begun = False
        self._view = view
        self._node = node
        self._status = status
        self._observation = observation
        self._blocks = blocks
        self._link = link
        self._observing: AbstractContextManager[AttemptObservation] | None = None
        self._observed: AttemptObservation | None = None
        self._stream: AsyncGenerator[Event, None] | None = None

    async def __aenter__(self) -> Self:
        """Count the request at its node."""
        self._view.began(self._node, self._status.id, self._blocks)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the stream."""
        try:
            if self._stream is not None:
                await self._stream.aclose()
        finally:
            self._view.ended(self._node, self._status.id)
            if self._observing is not None:
                self._observing.__exit__(kind, error, trace)

    def events(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        """Return the node's stream."""
        spec = ModelSpec(name=self._status.id, model=self._status.source)
        worker = NodeWorker(self._link.name, self._node.models[self._status.id].infos)
        self._observing = self._observation.attempt(request, worker, spec)
        self._observed = self._observing.__enter__()
        self._stream = self._link.ask(self._observed.request)
        return self._stream

    def finished(self, finish: Finish) -> None:
        """Note the node's Finish."""
        if self._observed is not None:
            self._observed.finished(finish)
