"""/v1/rerank on the wire, as Jina and Cohere have it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from headrace.api.wire_common import Count, KeepAlive, ModelName
from headrace.api.wire_embeddings import ReadUsage
from headrace.core.metrics import InferenceMetrics


class DocumentText(msgspec.Struct, frozen=True):
    """A document as a table; its other fields are ignored."""

    text: str


class RankRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A query, and the documents to be put in order; `top_n` keeps that many.

    What does not fit into the context is cut; `truncate` false has it refused.
    """

    REFUSED: ClassVar[frozenset[str]] = frozenset(
        {"max_chunks_per_doc", "max_tokens_per_doc", "rank_fields"}
    )

    query: Annotated[str, Meta(min_length=1)]
    documents: list[str | DocumentText]
    model: ModelName | None = None
    top_n: Count | None = None
    return_documents: bool | None = None
    truncate: bool | None = None
    keep_alive: KeepAlive | None = None

    max_chunks_per_doc: None = None
    max_tokens_per_doc: None = None
    rank_fields: None = None


class RankedDocument(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One of the best: `index` is its place in the request."""

    index: int
    relevance_score: float
    document: DocumentText | None = None


class ApiVersion(msgspec.Struct, frozen=True):
    """The version of Cohere's form."""

    version: Literal["2"] = "2"


class TokensRead(msgspec.Struct, frozen=True):
    """Tokens as Cohere counts them."""

    input_tokens: int


class RankMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What Cohere tells beside the results."""

    api_version: ApiVersion = ApiVersion()
    tokens: TokensRead


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """The best documents, best first; `usage` is Jina's account, `meta` Cohere's."""

    id: str
    object: Literal["list"] = "list"
    model: str
    results: list[RankedDocument]
    usage: ReadUsage
    meta: RankMeta
    metrics: InferenceMetrics
