"""A Backend around a Backend, that notes of each request what happened and what it cost."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from headrace.core.backend import Backend
from headrace.core.events import Event, Finish
from headrace.core.model import ModelInfo, ModelSpec
from headrace.core.record import Sinks
from headrace.core.request import (
    CountRequest,
    DetokenizeRequest,
    EmbedRequest,
    EmbedResult,
    GenerateRequest,
    RerankRequest,
    RerankResult,
    TokenCount,
)
from headrace.pool.watch import Asked, Seen, Unseen
from headrace.telemetry.content import Capture
from headrace.telemetry.span import Tracing
from headrace.telemetry.watcher import Watcher

Encoding = TypeVar("Encoding", EmbedRequest, RerankRequest)
Encoded = TypeVar("Encoded", EmbedResult, RerankResult)


class Observed:
    """Passes everything on, and has a Watcher see it: for whatever has none look on, as a pool has.

    `attempts` is the specification of the one model that is behind it, if what is asked is to
    have a span of its own. A request that is read by nobody, as its generator was never started,
    is none.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        tracing: Tracing,
        sinks: Sinks = (),
        capture: Capture | None = None,
        attempts: ModelSpec | None = None,
    ) -> None:
        self.watcher = Watcher(backend.models, tracing=tracing, sinks=sinks, capture=capture)
        self._backend = backend
        self._spec = attempts

    def __repr__(self) -> str:
        """Tell what is around what."""
        return f"<Observed {self.watcher!r}, {self._backend!r}>"

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield what the backend does. Closing it closes that."""
        with self.watcher.asked(request) as seen, self._attempted(seen.request) as attempt:
            stream = self._backend.generate(attempt.request)
            try:
                async for event in stream:
                    seen.saw(event)
                    if isinstance(event, Finish):
                        attempt.saw(event)
                    yield event
            finally:
                await stream.aclose()

    async def embed(self, request: EmbedRequest) -> EmbedResult:
        """Return the backend's vectors."""
        return await self._encoded(request, self._backend.embed)

    async def rerank(self, request: RerankRequest) -> RerankResult:
        """Return the backend's order."""
        return await self._encoded(request, self._backend.rerank)

    async def count_tokens(self, request: CountRequest) -> TokenCount:
        """Return the backend's count."""
        return await self._backend.count_tokens(request)

    async def detokenize(self, request: DetokenizeRequest) -> str:
        """Return the backend's text."""
        return await self._backend.detokenize(request)

    def models(self) -> Sequence[ModelInfo]:
        """Return the backend's models."""
        return self._backend.models()

    async def aclose(self) -> None:
        """Close the backend. The tracing stays, for it may have further users."""
        await self._backend.aclose()
        self.watcher.closed()

    async def _encoded(
        self, request: Encoding, ask: Callable[[Encoding], Awaitable[Encoded]]
    ) -> Encoded:
        with self.watcher.asked(request) as seen, self._attempted(seen.request) as attempt:
            result = await ask(attempt.request)
            attempt.saw(result)
            seen.saw(result)
            return result

    def _attempted(self, request: Asked) -> AbstractContextManager[Seen[Asked]]:
        if self._spec is None:
            return Unseen(request)
        return self.watcher.attempted(request, self._backend, self._spec)
