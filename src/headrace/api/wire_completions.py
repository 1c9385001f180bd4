"""/v1/completions on the wire."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from headrace.api.wire_common import Answer, ChunkHead, GenerateFields, TokenId
from headrace.core.events import FinishReason, TokenLogprob


class CompletionRequest(GenerateFields, frozen=True, kw_only=True):
    """OpenAI's completion request, with common extensions. `best_of` is `n` or absent.

    `max_tokens` is 16 when it is absent, as OpenAI has it.
    """

    REFUSED: ClassVar[frozenset[str]] = GenerateFields.REFUSED | {"suffix"}

    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    suffix: Literal[""] | None = None


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of an answer's tokens; `text_offset` counts characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One complete answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(Answer, frozen=True, kw_only=True):
    """A whole answer."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class CompletionChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to a choice."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class CompletionChunk(ChunkHead, frozen=True, kw_only=True):
    """One `data:` line of a stream; `data: [DONE]` is the last line of one that ended well."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChunkChoice]


class LogprobText:
    """Writes the log probabilities of one choice, and keeps count of its characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(self, tokens: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """Say it in OpenAI's words; tokens come in the order of the text."""
        return CompletionLogprobs(
            [_name(token.data) for token in tokens],
            [token.logprob for token in tokens],
            [{_name(top.data): top.logprob for top in token.top} for token in tokens],
            [self._advance(token.data) for token in tokens],
        )

    def _advance(self, data: bytes) -> int:
        start = self._offset
        self._offset += len(self._decoder.decode(data))
        return start


def _name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        # OpenAI's way to name a part of a character, so that two parts differ.
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
