"""POST /v1/rerank, compatible with Jina and Cohere."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from headrace.api import fields, limits
from headrace.api.answers import ReadUsage
from headrace.api.exchange import Call, Exchange, Service
from headrace.api.fields import Body, Peers
from headrace.api.limits import ApiSettings
from headrace.api.wire import Count, KeepAlive, ModelName, request_fields
from headrace.core import events
from headrace.core.metrics import InferenceMetrics
from headrace.core.request import RerankRequest
from headrace.core.stream import result


class DocumentText(msgspec.Struct, frozen=True):
    """A document as an object; its other fields are ignored."""

    text: str


class RankRequest(Body, frozen=True, kw_only=True):
    """A query, and the documents to be ranked; `top_n` limits the results.

    Documents that do not fit into the context are cut; with `truncate` false they are refused.
    """

    query: Annotated[str, Meta(min_length=1)]
    documents: Annotated[
        list[str | DocumentText], Meta(min_length=1, max_length=limits.MAX_DOCUMENTS)
    ]
    model: ModelName | None = None
    top_n: Count | None = None
    return_documents: bool | None = None
    truncate: bool | None = None
    keep_alive: KeepAlive | None = None

    peers: ClassVar[Peers] = fields.RERANK


class RankedDocument(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A result; `index` is the position of the document in the request."""

    index: int
    relevance_score: float
    document: DocumentText | None = None


class ApiVersion(msgspec.Struct, frozen=True):
    """The version of Cohere's API."""

    version: Literal["2"] = "2"


class TokensRead(msgspec.Struct, frozen=True):
    """Tokens as Cohere counts them."""

    input_tokens: int


class RankMeta(msgspec.Struct, frozen=True, kw_only=True):
    """Cohere's metadata of the results."""

    api_version: ApiVersion = ApiVersion()
    tokens: TokensRead


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """The best documents, best first; `usage` is Jina's format, `meta` Cohere's."""

    id: str
    object: Literal["list"] = "list"
    model: str
    results: list[RankedDocument]
    usage: ReadUsage
    meta: RankMeta
    metrics: InferenceMetrics


_DECODER = msgspec.json.Decoder(RankRequest)


async def rerank(service: Service, exchange: Exchange) -> None:
    """Rank documents by their relevance to a query."""
    wire = await exchange.read(_DECODER)
    request = to_request(wire, exchange.settings, exchange.call)
    best, finish = await exchange.unless_gone(result(service.backend.ask(request), events.Ranking))
    documents = request.documents if wire.return_documents else None
    tokens = finish.usage.prompt_tokens
    ranking = Ranking(
        id=exchange.call.id,
        model=service.model_name(wire.model),
        results=[_ranked(ranked, documents) for ranked in best.ranking],
        usage=ReadUsage(tokens, tokens),
        meta=RankMeta(tokens=TokensRead(tokens)),
        metrics=finish.metrics,
    )
    await exchange.answer(ranking, finish.metrics)


def to_request(wire: RankRequest, settings: ApiSettings, call: Call) -> RerankRequest:
    """Build the core request.

    Raises:
        InvalidRequest: a field has a value that the core refuses.
    """
    texts = (item if isinstance(item, str) else item.text for item in wire.documents)
    return RerankRequest(
        query=wire.query,
        documents=tuple(texts),
        top_n=wire.top_n,
        truncate=wire.truncate is not False,
        **request_fields(wire, settings, call),
    )


def _ranked(ranked: events.Ranked, documents: tuple[str, ...] | None) -> RankedDocument:
    document = None if documents is None else DocumentText(documents[ranked.index])
    return RankedDocument(index=ranked.index, relevance_score=ranked.score, document=document)
