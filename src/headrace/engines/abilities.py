"""What an engine may have beside the contract of `headrace.engines.base`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Protocol, runtime_checkable

from headrace.core.events import PromptToken
from headrace.engines.base import Engine


@runtime_checkable
class Piecewise(Protocol):
    """An engine whose tokenizer can take long, so that it is asked for a piece at a time."""

    def tokenize_pieces(self, text: str, *, add_special: bool) -> Iterator[Sequence[int]]:
        """Yield what `tokenize` returns, piece after piece. Each step blocks for a moment."""
        ...


@runtime_checkable
class PlainText(Engine, Protocol):
    """An engine that can take markers in a text as text, which `tokenize` does not."""

    def plain_pieces(self, text: str, markers: Sequence[str]) -> Iterator[Sequence[int]]:
        """Yield the token ids of a text, piece after piece. Each step blocks for a moment.

        Neither a control token of the model nor one of `markers` is made of it.
        """
        ...


class PromptScorer(Engine, Protocol):
    """An engine that declares `prompt_logprobs`."""

    def prompt_tokens(
        self, token_ids: Sequence[int], candidates: int
    ) -> AsyncGenerator[Sequence[PromptToken], None]:
        """Yield all tokens of a prompt with their log probabilities, a part at a time.

        Each has `candidates`, but for the first, which nothing precedes. The data of a control
        token is its text. When the generator is closed the engine has stopped.
        """
        ...
