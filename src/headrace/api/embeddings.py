"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from headrace.api import fields, limits
from headrace.api.answers import ReadUsage
from headrace.api.exchange import Call, Exchange, Service, server_timing
from headrace.api.fields import Body, Peers
from headrace.api.limits import ApiSettings
from headrace.api.wire import (
    Count,
    KeepAlive,
    ModelName,
    TokenId,
    inputs_schema,
    request_fields,
    to_inputs,
    truncates,
)
from headrace.core.errors import InvalidRequest
from headrace.core.events import Finish, Vectors, floats_of
from headrace.core.metrics import InferenceMetrics
from headrace.core.model import InputType
from headrace.core.request import EmbedRequest
from headrace.core.stream import result

Purpose = Annotated[str, Meta(max_length=64)]

# What the texts are for, in the words of other APIs in lower case.
_PURPOSES: Mapping[str, InputType] = {
    **dict.fromkeys(("query", "search_query", "retrieval.query", "retrieval_query"), "query"),
    **dict.fromkeys(("document", "passage", "search_document"), "document"),
    **dict.fromkeys(("retrieval.passage", "retrieval_document"), "document"),
    "classification": "classification",
    **dict.fromkeys(("clustering", "separation"), "clustering"),
    **dict.fromkeys(("text-matching", "semantic_similarity", "similarity"), "similarity"),
}

# With more numbers than this, a response is encoded in a thread.
_MANY = 1 << 14


class EmbeddingRequest(Body, frozen=True, kw_only=True):
    """OpenAI's request: a text, a list of texts, token ids, or a list of lists of them.

    With Jina's `truncate`, or vLLM's `truncate_prompt_tokens` of -1, inputs longer than the context
    are cut instead of refused; with `normalized` false, the vectors keep the length that the model
    gives them. `prompt_name` is one of the model's prompts, as in sentence-transformers and TEI;
    `input_type` (Cohere, Voyage, NIM) or `task` (Jina) say what the texts are for.
    """

    input: Annotated[
        str | list[str | TokenId | list[TokenId]],
        Meta(extra={"schema": inputs_schema(limits.MAX_INPUTS, minLength=1)}),
    ]
    model: ModelName | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None
    truncate: bool | None = None
    truncate_prompt_tokens: int | None = None
    normalized: bool | None = None
    prompt_name: Annotated[str, Meta(max_length=256)] | None = None
    input_type: Purpose | None = None
    task: Purpose | None = None
    keep_alive: KeepAlive | None = None

    peers: ClassVar[Peers] = fields.EMBED


class EmbeddingBody(msgspec.Struct, frozen=True, kw_only=True):
    """One vector; as base64 it is little-endian 32-bit floats."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(msgspec.Struct, frozen=True, kw_only=True):
    """One vector for each input, in order."""

    object: Literal["list"] = "list"
    data: list[EmbeddingBody]
    model: str
    usage: ReadUsage
    metrics: InferenceMetrics


_DECODER = msgspec.json.Decoder(EmbeddingRequest)


async def embeddings(service: Service, exchange: Exchange) -> None:
    """Return the vectors of texts."""
    wire = await exchange.read(_DECODER)
    request = to_request(wire, exchange.settings, exchange.call)
    vectors, finish = await exchange.unless_gone(result(service.backend.ask(request), Vectors))
    model, as_text = service.model_name(wire.model), wire.encoding_format == "base64"
    if len(vectors.vectors) * vectors.dimensions > _MANY:
        body = await asyncio.to_thread(_body, vectors, finish, model, as_text=as_text)
    else:
        body = _body(vectors, finish, model, as_text=as_text)
    exchange.call.metrics = finish.metrics
    await exchange.reply(body, headers=server_timing(finish.metrics))


def to_request(wire: EmbeddingRequest, settings: ApiSettings, call: Call) -> EmbedRequest:
    """Build the core request.

    Raises:
        InvalidRequest: the list of inputs is mixed, too long, or has an empty one; what they are
            for is unknown, or said twice.
        Unsupported: inputs are to be cut to a number of tokens.
    """
    return EmbedRequest(
        inputs=tuple(to_inputs("input", wire.input, limits.MAX_INPUTS)),
        dimensions=wire.dimensions,
        truncate=bool(truncates(wire)),
        normalize=wire.normalized is not False,
        prompt_name=wire.prompt_name,
        input_type=_purpose(wire),
        **request_fields(wire, settings, call),
    )


def _purpose(wire: EmbeddingRequest) -> InputType | None:
    given = {
        name: value
        for name in ("prompt_name", "input_type", "task")
        if (value := getattr(wire, name)) is not None
    }
    if len(given) > 1:
        first, second = list(given)[:2]
        raise InvalidRequest(f"{first} and {second} are both given.", param=second)
    for name, value in given.items():
        if name != "prompt_name":
            if (purpose := _PURPOSES.get(value.lower())) is None:
                known = ", ".join(_PURPOSES)
                raise InvalidRequest(f"{name} is {value!r}; known are {known}.", param=name)
            return purpose
    return None


def _body(vectors: Vectors, finish: Finish, model: str, *, as_text: bool) -> bytes:
    tokens = finish.usage.prompt_tokens
    # Bytes are written as base64.
    written = vectors.vectors if as_text else [floats_of(item).tolist() for item in vectors.vectors]
    data: Any = [
        {"object": "embedding", "index": index, "embedding": item}
        for index, item in enumerate(written)
    ]
    return msgspec.json.encode(
        EmbeddingList(
            data=data, model=model, usage=ReadUsage(tokens, tokens), metrics=finish.metrics
        )
    )
