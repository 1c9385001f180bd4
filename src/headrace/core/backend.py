"""The one shape: everything that answers requests is a Backend."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from headrace.core.events import Event
from headrace.core.model import ModelInfo
from headrace.core.request import CountRequest, DetokenizeRequest, GenerateRequest, TokenCount


class Backend(Protocol):
    """Answers requests with streams of events.

    A Worker, a WorkerProcess and a Pool are all one, so nobody above knows which it holds.
    """

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield deltas and then one Finish. Closing the generator frees all that it holds.

        Raises:
            HeadraceError: of any family, at any time before the Finish.
        """
        ...

    async def count_tokens(self, request: CountRequest) -> TokenCount:
        """Count without waiting behind generation."""
        ...

    async def detokenize(self, request: DetokenizeRequest) -> str:
        """Return the text of token ids."""
        ...

    def models(self) -> Sequence[ModelInfo]:
        """Tell what is served here, without waiting."""
        ...

    async def aclose(self) -> None:
        """Stop, and give everything back. Idempotent."""
        ...
