"""POST /tokenize and /detokenize, compatible with llama-server and vLLM."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import msgspec

from headrace.api import fields
from headrace.api.exchange import Call, Exchange, Service
from headrace.api.fields import Body, Peers
from headrace.api.images import ImageReader, body_limit, held
from headrace.api.limits import ApiSettings
from headrace.api.messages import (
    TEMPLATE_NAMES,
    Messages,
    Tools,
    image_urls,
    to_messages,
    to_template,
    to_tools,
)
from headrace.api.wire import ModelName, TokenId, envelope
from headrace.core import events
from headrace.core import request as core
from headrace.core.errors import InvalidRequest
from headrace.core.stream import result


class TokenizeRequest(Body, frozen=True, kw_only=True):
    """One of `content` (llama-server), `prompt` or `messages` (vLLM).

    Special tokens are added to a `prompt` unless `add_special_tokens` is false, and to `content`
    only when `add_special` is true; messages get those of their template.
    """

    model: ModelName | None = None
    content: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Tools | None = None

    peers: ClassVar[Peers] = fields.TOKENIZE


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids, null if the engine has none; `estimated` marks a count that is not exact."""

    tokens: list[int] | None
    count: int
    estimated: bool = False


class DetokenizeRequest(Body, frozen=True, kw_only=True):
    """Token ids to be turned into text."""

    model: ModelName | None = None
    tokens: list[TokenId]

    peers: ClassVar[Peers] = fields.DETOKENIZE


class Text(msgspec.Struct, frozen=True):
    """The text of token ids."""

    content: str


_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


async def tokenize(service: Service, exchange: Exchange) -> None:
    """Return the tokens of a text or a conversation."""
    wire = await exchange.read(_TOKENIZE, body_limit(service, exchange.settings))
    exchange.call.names = TEMPLATE_NAMES
    async with held(exchange, image_urls(wire.messages or ())) as translation:
        request = await translation.run(partial(to_request, wire, exchange.settings, exchange.call))
    count, _ = await exchange.unless_gone(result(service.backend.ask(request), events.TokenCount))
    if count.token_ids is None and count.count > events.MAX_TOKEN_IDS:
        raise InvalidRequest(
            f"It has {count.count:,} tokens, and {events.MAX_TOKEN_IDS:,} at most are returned.",
            param="prompt" if wire.content is None else "content",
        )
    ids = None if count.token_ids is None else list(count.token_ids)
    await exchange.answer(Tokens(tokens=ids, count=count.count, estimated=count.estimated))


async def detokenize(service: Service, exchange: Exchange) -> None:
    """Return the text of tokens."""
    wire = await exchange.read(_DETOKENIZE)
    given = envelope(wire.model, exchange.settings, exchange.call)
    request = core.DetokenizeRequest(token_ids=tuple(wire.tokens), **given)
    text, _ = await exchange.unless_gone(result(service.backend.ask(request), events.Text))
    await exchange.answer(Text(text.text))


def to_request(
    wire: TokenizeRequest, settings: ApiSettings, call: Call, reader: ImageReader
) -> core.CountRequest:
    """Build the core request.

    Raises:
        InvalidRequest: not exactly one of content, prompt and messages is given.
    """
    texts = [text for text in (wire.content, wire.prompt) if text is not None]
    if len(texts) + (wire.messages is not None) != 1:
        raise InvalidRequest("Give one of content, prompt and messages.", param="prompt")
    special = wire.add_special if wire.add_special_tokens is None else wire.add_special_tokens
    return core.CountRequest(
        text=texts[0] if texts else None,
        messages=None if wire.messages is None else to_messages(wire.messages, reader=reader),
        add_special=wire.prompt is not None if special is None else special,
        **to_template(wire),
        tools=to_tools(wire.tools),
        **envelope(wire.model, settings, call),
    )
