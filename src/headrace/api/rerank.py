"""POST /v1/rerank."""

from __future__ import annotations

import msgspec

from headrace.api import translate
from headrace.api.answers import model_name
from headrace.api.exchange import Exchange, Service
from headrace.api.timing import server_timing
from headrace.api.wire_embeddings import ReadUsage
from headrace.api.wire_rerank import (
    DocumentText,
    RankedDocument,
    Ranking,
    RankMeta,
    RankRequest,
    TokensRead,
)
from headrace.core import events
from headrace.core.stream import result

_DECODER = msgspec.json.Decoder(RankRequest)


async def rerank(service: Service, exchange: Exchange) -> None:
    """Put documents in the order in which they answer a query."""
    wire = await exchange.read(_DECODER)
    request = translate.rank(wire, exchange.settings, exchange.call)
    ranked, finish = await exchange.unless_gone(
        result(service.backend.ask(request), events.Ranking)
    )
    tokens = finish.usage.prompt_tokens
    answer = Ranking(
        id=exchange.call.id,
        model=model_name(service, wire.model),
        results=[
            RankedDocument(
                index=item.index,
                relevance_score=item.score,
                document=DocumentText(request.documents[item.index])
                if wire.return_documents
                else None,
            )
            for item in ranked.ranking
        ],
        usage=ReadUsage(tokens, tokens),
        meta=RankMeta(tokens=TokensRead(tokens)),
        metrics=finish.metrics,
    )
    await exchange.reply(msgspec.json.encode(answer), headers=server_timing(finish.metrics))
