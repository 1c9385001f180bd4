"""/v1/chat/completions on the wire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from headrace.api.wire_common import Answer, ChunkHead, Count, GenerateFields, Nothing
from headrace.core.events import FinishReason, TokenLogprob, TopLogprob
from headrace.core.request import Role


class TextPart(msgspec.Struct, frozen=True):
    """A part of a message. Only text is supported."""

    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: Role
    content: str | list[TextPart]
    name: str | None = None
    tool_calls: Nothing | None = None
    function_call: None = None


class ChatRequest(GenerateFields, frozen=True, kw_only=True):
    """OpenAI's chat request, with common extensions."""

    REFUSED: ClassVar[frozenset[str]] = GenerateFields.REFUSED | {
        "audio", "function_call", "functions", "modalities", "reasoning_effort", "tool_choice",
        "tools", "verbosity", "web_search_options",
    }  # fmt: skip

    messages: list[ChatMessage]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    audio: None = None
    function_call: Literal["none"] | None = None
    functions: Nothing | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: None = None
    tool_choice: Literal["none"] | None = None
    tools: Nothing | None = None
    verbosity: None = None
    web_search_options: None = None


class ChatTop(msgspec.Struct, frozen=True):
    """A candidate for a position."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(msgspec.Struct, frozen=True):
    """A chosen token, and the candidates beside it."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[ChatTop]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of an answer's tokens."""

    content: list[ChatToken]
    refusal: None = None


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer. `reasoning_content` is the model's thinking, where it has been told apart."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType | None = msgspec.UNSET


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One complete answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer, frozen=True, kw_only=True):
    """A whole answer."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning_content: str | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What a chunk adds to a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(ChunkHead, frozen=True, kw_only=True):
    """One `data:` line of a stream; `data: [DONE]` is the last line of one that ended well."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> ChatLogprobs:
    """Say it in OpenAI's words."""
    return ChatLogprobs(
        [
            ChatToken(_text(token.data), token.logprob, list(token.data), [*map(_top, token.top)])
            for token in tokens
        ]
    )


def _top(top: TopLogprob) -> ChatTop:
    return ChatTop(_text(top.data), top.logprob, list(top.data))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
