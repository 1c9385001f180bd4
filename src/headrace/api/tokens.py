"""POST /tokenize and /detokenize."""

from __future__ import annotations

import msgspec

from headrace.api import translate
from headrace.api.exchange import Exchange, Service
from headrace.api.wire_tokens import DetokenizeRequest, Text, TokenizeRequest, Tokens
from headrace.core import request as core

_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


async def tokenize(service: Service, exchange: Exchange) -> None:
    """Tell the tokens of a text or a conversation."""
    request = translate.count(await exchange.read(_TOKENIZE), exchange.settings)
    result = await exchange.unless_gone(service.backend.count_tokens(request))
    ids = None if result.token_ids is None else list(result.token_ids)
    answer = Tokens(tokens=ids, count=result.count, estimated=result.estimated)
    await exchange.reply(msgspec.json.encode(answer))


async def detokenize(service: Service, exchange: Exchange) -> None:
    """Tell the text of tokens."""
    wire = await exchange.read(_DETOKENIZE)
    request = core.DetokenizeRequest(token_ids=tuple(wire.tokens), model=wire.model or "")
    text = await exchange.unless_gone(service.backend.detokenize(request))
    await exchange.reply(msgspec.json.encode(Text(text)))
