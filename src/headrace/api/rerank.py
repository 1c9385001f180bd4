"""POST /v1/rerank, compatible with Jina, Cohere and TEI; and DB-GPT's /v1/beta/relevance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from headrace.api import fields, limits
from headrace.api.answers import ReadUsage
from headrace.api.exchange import Call, Exchange, Service
from headrace.api.fields import Body, Peers
from headrace.api.limits import ApiSettings
from headrace.api.wire import Count, KeepAlive, ModelName, request_fields, truncates
from headrace.core import events
from headrace.core.errors import InvalidRequest
from headrace.core.metrics import InferenceMetrics
from headrace.core.request import RerankRequest
from headrace.core.stream import result


class DocumentText(msgspec.Struct, frozen=True):
    """A document as an object; its other fields are ignored."""

    text: str


Documents = Annotated[list[str | DocumentText], Meta(min_length=1, max_length=limits.MAX_DOCUMENTS)]


class RankRequest(Body, frozen=True, kw_only=True):
    """A query, and the documents to be ranked; `top_n` limits the results.

    Documents that do not fit into the context are cut; with `truncate` false they are refused.
    With TEI's `texts` in place of documents the answer has its form, and the texts themselves with
    `return_text`.
    """

    query: Annotated[str, Meta(min_length=1)]
    documents: Documents | None = None
    texts: Annotated[list[str], Meta(min_length=1, max_length=limits.MAX_DOCUMENTS)] | None = None
    model: ModelName | None = None
    top_n: Count | None = None
    return_documents: bool | None = None
    return_text: bool | None = None
    truncate: bool | None = None
    truncate_prompt_tokens: int | None = None
    keep_alive: KeepAlive | None = None

    peers: ClassVar[Peers] = fields.RERANK


class RankedDocument(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A result; `index` is the position of the document in the request."""

    index: int
    relevance_score: float
    document: DocumentText | None = None


class RankedText(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A result as TEI has it."""

    index: int
    score: float
    text: str | None = None


class RelevanceRequest(Body, frozen=True, kw_only=True):
    """A query, and the documents that are scored."""

    query: Annotated[str, Meta(min_length=1)]
    documents: Documents
    model: ModelName | None = None
    keep_alive: KeepAlive | None = None

    peers: ClassVar[Peers] = fields.RELEVANCE


class Relevance(msgspec.Struct, frozen=True, kw_only=True):
    """A score for each document, in the order of the request."""

    object: Literal["list"] = "list"
    model: str
    data: list[float]
    usage: ReadUsage
    metrics: InferenceMetrics


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
_RELEVANCE = msgspec.json.Decoder(RelevanceRequest)


async def rerank(service: Service, exchange: Exchange) -> None:
    """Rank documents by their relevance to a query."""
    wire = await exchange.read(_DECODER)
    request = to_request(wire, exchange.settings, exchange.call)
    best, finish = await exchange.unless_gone(result(service.backend.ask(request), events.Ranking))
    if wire.texts is not None:
        texts = request.documents if wire.return_text else None
        tei = [_ranked_text(ranked, texts) for ranked in best.ranking]
        await exchange.answer(tei, finish.metrics)
        return
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
        InvalidRequest: a field has a value that the core refuses, there are no documents, or the
            pairs are too long.
        Unsupported: documents are to be cut to a number of tokens.
    """
    if (wire.documents is None) == (wire.texts is None):
        raise InvalidRequest("Give either documents or texts.", param="documents")
    documents = _texts(wire.documents or wire.texts or ())
    limits.check_pairs(wire.query, documents, "query")
    return RerankRequest(
        query=wire.query,
        documents=documents,
        top_n=wire.top_n,
        truncate=truncates(wire) is not False,
        **request_fields(wire, settings, call),
    )


async def relevance(service: Service, exchange: Exchange) -> None:
    """Score documents by their relevance to a query, as DB-GPT does."""
    wire = await exchange.read(_RELEVANCE)
    documents = _texts(wire.documents)
    limits.check_pairs(wire.query, documents, "query")
    request = RerankRequest(
        query=wire.query,
        documents=documents,
        **request_fields(wire, exchange.settings, exchange.call),
    )
    best, finish = await exchange.unless_gone(result(service.backend.ask(request), events.Ranking))
    scores = {ranked.index: ranked.score for ranked in best.ranking}
    tokens = finish.usage.prompt_tokens
    answer = Relevance(
        model=service.model_name(wire.model),
        data=[scores[index] for index in sorted(scores)],
        usage=ReadUsage(tokens, tokens),
        metrics=finish.metrics,
    )
    await exchange.answer(answer, finish.metrics)


def _texts(documents: Sequence[str | DocumentText]) -> tuple[str, ...]:
    return tuple(item if isinstance(item, str) else item.text for item in documents)


def _ranked_text(ranked: events.Ranked, texts: tuple[str, ...] | None) -> RankedText:
    text = None if texts is None else texts[ranked.index]
    return RankedText(index=ranked.index, score=ranked.score, text=text)


def _ranked(ranked: events.Ranked, documents: tuple[str, ...] | None) -> RankedDocument:
    document = None if documents is None else DocumentText(documents[ranked.index])
    return RankedDocument(index=ranked.index, relevance_score=ranked.score, document=document)
