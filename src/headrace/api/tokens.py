"""POST /tokenize and /detokenize."""

from __future__ import annotations

import msgspec

from headrace.api import translate
from headrace.api.exchange import Exchange, Service
from headrace.api.wire_tokens import DetokenizeRequest, Text, TokenizeRequest, Tokens
from headrace.core import events
from headrace.core import request as core
from headrace.core.events import TokenCount
from headrace.core.stream import result

_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)


async def tokenize(service: Service, exchange: Exchange) -> None:
    """Tell the tokens of a text or a conversation."""
    request = translate.count(await exchange.read(_TOKENIZE), exchange.settings)
    counted, _ = await exchange.unless_gone(result(service.backend.ask(request), TokenCount))
    ids = None if counted.token_ids is None else list(counted.token_ids)
    answer = Tokens(tokens=ids, count=counted.count, estimated=counted.estimated)
    await exchange.reply(msgspec.json.encode(answer))


async def detokenize(service: Service, exchange: Exchange) -> None:
    """Tell the text of tokens."""
    wire = await exchange.read(_DETOKENIZE)
    request = core.DetokenizeRequest(token_ids=tuple(wire.tokens), model=wire.model or "")
    made, _ = await exchange.unless_gone(result(service.backend.ask(request), events.Text))
    await exchange.reply(msgspec.json.encode(Text(made.text)))
