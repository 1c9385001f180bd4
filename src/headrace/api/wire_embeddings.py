"""/v1/embeddings on the wire."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from headrace.api.wire_common import Count, KeepAlive, ModelName, TokenId
from headrace.core.metrics import InferenceMetrics


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's request: a text, a list of texts, token ids, or a list of lists of them.

    Jina's `truncate` cuts what is longer than the context, which is refused without, and its
    `normalized` false leaves the vectors as long as the model makes them.
    """

    input: str | list[str | TokenId | list[TokenId]]
    model: ModelName | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None
    truncate: bool | None = None
    normalized: bool | None = None
    keep_alive: KeepAlive | None = None


class EmbeddingBody(msgspec.Struct, frozen=True, kw_only=True):
    """One vector; as base64 it is little-endian 32-bit floats."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class ReadUsage(msgspec.Struct, frozen=True):
    """Tokens that were read; nothing was generated."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """One vector for each input, in order."""

    object: Literal["list"] = "list"
    data: list[EmbeddingBody]
    model: str
    usage: ReadUsage
    metrics: InferenceMetrics
