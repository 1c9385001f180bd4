"""POST /api/worker/embeddings (vectors, or scores of a reranker) and count_token."""

from __future__ import annotations

import asyncio

import msgspec

from headrace.api import limits
from headrace.api.dbgpt.wire import (
    WORKER_TYPES,
    CountTokenRequest,
    EmbeddingsRequest,
    core_fields,
)
from headrace.api.exchange import Exchange, Service
from headrace.core.errors import InvalidRequest
from headrace.core.events import Finish, Ranking, TokenCount, Vectors, floats_of
from headrace.core.request import CountRequest, EmbedRequest, RerankRequest
from headrace.core.stream import result

_EMBEDDINGS = msgspec.json.Decoder(EmbeddingsRequest)
_COUNT = msgspec.json.Decoder(CountTokenRequest)


async def embeddings(service: Service, exchange: Exchange) -> None:
    """Return a vector for each text, or one list of scores for a reranker's candidates.

    Texts are cut to the context, as DB-GPT's own workers do.
    """
    wire = await exchange.read(_EMBEDDINGS)
    texts = (wire.input,) if isinstance(wire.input, str) else tuple(wire.input)
    if wire.worker_type == WORKER_TYPES["rerank"]:
        await _rerank(service, exchange, wire, texts)
        return
    common = core_fields(service, exchange, wire, "embed")
    request = EmbedRequest(inputs=texts, truncate=True, **common)
    made, finish = await exchange.unless_gone(result(service.backend.ask(request), Vectors))
    # In a thread: the vectors of many texts are millions of numbers.
    body = await asyncio.to_thread(
        lambda: msgspec.json.encode([floats_of(vector).tolist() for vector in made.vectors])
    )
    await _reply(exchange, body, finish)


async def _rerank(
    service: Service, exchange: Exchange, wire: EmbeddingsRequest, texts: tuple[str, ...]
) -> None:
    if not wire.query:
        raise InvalidRequest("A reranker needs a query.", param="query")
    common = core_fields(service, exchange, wire, "rerank")
    limits.check_pairs(wire.query, texts, "query")
    request = RerankRequest(query=wire.query, documents=texts, **common)
    ranked, finish = await exchange.unless_gone(result(service.backend.ask(request), Ranking))
    scores = {document.index: document.score for document in ranked.ranking}
    body = msgspec.json.encode([[scores[index] for index in range(len(texts))]])
    await _reply(exchange, body, finish)


async def count_token(service: Service, exchange: Exchange) -> None:
    """Return the number of tokens of a text."""
    wire = await exchange.read(_COUNT)
    request = CountRequest(text=wire.prompt, **core_fields(service, exchange, wire, "generate"))
    count, finish = await exchange.unless_gone(result(service.backend.ask(request), TokenCount))
    await _reply(exchange, b"%d" % count.count, finish)


async def _reply(exchange: Exchange, body: bytes, finish: Finish) -> None:
    exchange.call.metrics = finish.metrics
    await exchange.reply(body)
