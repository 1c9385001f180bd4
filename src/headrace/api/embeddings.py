"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import sys
from array import array
from typing import Any

import msgspec

from headrace.api import translate
from headrace.api.answers import model_name
from headrace.api.exchange import Exchange, Service
from headrace.api.timing import server_timing
from headrace.api.wire_embeddings import EmbeddingList, EmbeddingRequest, ReadUsage
from headrace.core.events import Finish, Vectors
from headrace.core.stream import result

_DECODER = msgspec.json.Decoder(EmbeddingRequest)
_encode = msgspec.json.Encoder().encode
# More numbers than these are written in a thread.
_MANY = 1 << 14


async def embeddings(service: Service, exchange: Exchange) -> None:
    """Turn texts into vectors."""
    wire = await exchange.read(_DECODER)
    request = translate.embed(wire, exchange.settings, exchange.call)
    made, finish = await exchange.unless_gone(result(service.backend.ask(request), Vectors))
    model, as_text = model_name(service, wire.model), wire.encoding_format == "base64"
    if sum(map(len, made.vectors)) > 4 * _MANY:
        body = await asyncio.to_thread(_body, made, finish, model, as_text=as_text)
    else:
        body = _body(made, finish, model, as_text=as_text)
    await exchange.reply(body, headers=server_timing(finish.metrics))


def _body(made: Vectors, finish: Finish, model: str, *, as_text: bool) -> bytes:
    tokens = finish.usage.prompt_tokens
    data: Any = [
        # Bytes are written as base64.
        {"object": "embedding", "index": index, "embedding": one if as_text else _list(one)}
        for index, one in enumerate(made.vectors)
    ]
    return _encode(
        EmbeddingList(
            data=data, model=model, usage=ReadUsage(tokens, tokens), metrics=finish.metrics
        )
    )


def _list(vector: bytes) -> list[float]:
    values = array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()
