"""/tokenize and /detokenize on the wire, as llama-server and vLLM have them."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from headrace.api.wire_chat import ChatMessage
from headrace.api.wire_common import ModelName, TokenId


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One of `content` (llama-server), `prompt` or `messages` (vLLM).

    Special tokens are added to a `prompt` unless `add_special_tokens` is false, and to `content`
    only when `add_special` is true; messages have those of their template.
    """

    REFUSED: ClassVar[frozenset[str]] = frozenset({"tools"})

    model: ModelName | None = None
    content: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: None = None


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids, null where the engine cannot tell; `estimated` marks a count that is a guess."""

    tokens: list[int] | None
    count: int
    estimated: bool = False


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids to be turned into text."""

    model: ModelName | None = None
    tokens: list[TokenId]


class Text(msgspec.Struct, frozen=True):
    """The text of token ids."""

    content: str
