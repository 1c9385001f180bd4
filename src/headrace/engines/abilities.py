"""What an engine may have beside the contract of `headrace.engines.base`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Protocol, runtime_checkable

from headrace.core.adapter import AdapterFile
from headrace.core.events import PromptToken
from headrace.engines.base import Engine, EngineFacts

MAX_TEXT = 1 << 20
"""Bytes of a text that a tokenizer gets at once; for long contexts it is `_TOKEN` for each token.

It takes a minute for a few MB of white space, and cannot be stopped.
"""
_TOKEN = 8


def longest_text(facts: EngineFacts) -> int:
    """Return how many bytes of text a tokenizer gets at once at most."""
    return max(MAX_TEXT, _TOKEN * facts.context_length)


@runtime_checkable
class Piecewise(Protocol):
    """An engine whose tokenizer can take long, so that it is asked for a piece at a time."""

    def tokenize_pieces(self, text: str, *, add_special: bool) -> Iterator[Sequence[int]]:
        """Yield what `tokenize` returns, piece after piece. Each step blocks for a moment.

        Raises:
            InvalidRequest: there is no place for a cut in `longest_text` bytes.
        """
        ...


@runtime_checkable
class PlainText(Engine, Protocol):
    """An engine that can take markers in a text as text, which `tokenize` does not."""

    def plain_pieces(self, text: str, markers: Sequence[str]) -> Iterator[Sequence[int]]:
        """Yield the token ids of a text, piece after piece. Each step blocks for a moment.

        Neither a control token of the model nor one of `markers` is made of it.
        """
        ...


@runtime_checkable
class DraftSwitch(Protocol):
    """An engine that drafts tokens only while that is faster."""

    @property
    def drafting(self) -> bool | None:
        """Whether tokens are drafted now; None if it is off as configured."""
        ...


@runtime_checkable
class AdapterSwitch(Protocol):
    """An engine that takes and drops adapters while it answers. No name is used twice."""

    async def add_adapter(self, file: AdapterFile) -> None:
        """Load an adapter; requests can name it then. After an error nothing has changed.

        Raises:
            Unsupported: only a model that is opened again can have it.
            LoadFailed, OutOfMemory: the library refused.
        """
        ...

    async def remove_adapter(self, name: str) -> None:
        """Free an adapter, which no request uses any more."""
        ...


class PromptScorer(Engine, Protocol):
    """An engine that declares `prompt_logprobs`."""

    def prompt_tokens(
        self, token_ids: Sequence[int], candidates: int, adapter: str = ""
    ) -> AsyncGenerator[Sequence[PromptToken], None]:
        """Yield all tokens of a prompt with their log probabilities, a part at a time.

        Each has `candidates`, but for the first, which nothing precedes. `adapter` is as that of an
        `EngineRequest`. The data of a control token is its text. When the generator is closed the
        engine has stopped.
        """
        ...
