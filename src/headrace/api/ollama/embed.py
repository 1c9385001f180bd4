"""POST /api/embed and /api/embeddings."""

from __future__ import annotations

import asyncio
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from headrace.api import fields, limits
from headrace.api.exchange import Exchange, Service, server_timing
from headrace.api.fields import Peers
from headrace.api.ollama.wire import Addressed, Options, envelope, timings
from headrace.api.wire import Count
from headrace.core.events import Finish, Vectors, floats_of
from headrace.core.request import EmbedRequest
from headrace.core.stream import result

_Text = Annotated[str, Meta(min_length=1)]


class OllamaEmbedRequest(Addressed, frozen=True, kw_only=True):
    """One or several texts; they are cut to the context unless `truncate` is false."""

    input: _Text | Annotated[list[_Text], Meta(min_length=1, max_length=limits.MAX_INPUTS)]
    truncate: bool | None = None
    dimensions: Count | None = None
    options: Options | None = None

    peers: ClassVar[Peers] = fields.OLLAMA


class OllamaEmbeddings(msgspec.Struct, frozen=True, kw_only=True):
    """One vector of length 1 for each text, in order; durations are nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbeddingRequest(Addressed, frozen=True, kw_only=True):
    """One text, as older clients send it."""

    prompt: _Text
    options: Options | None = None

    peers: ClassVar[Peers] = fields.OLLAMA


class OllamaEmbedding(msgspec.Struct, frozen=True, kw_only=True):
    """The vector of a text."""

    embedding: list[float]


_MANY = msgspec.json.Decoder(OllamaEmbedRequest)
_ONE = msgspec.json.Decoder(OllamaEmbeddingRequest)


async def embed(service: Service, exchange: Exchange) -> None:
    """Return the vectors of texts, as Ollama does."""
    wire = await exchange.read(_MANY)
    texts = (wire.input,) if isinstance(wire.input, str) else tuple(wire.input)
    request = EmbedRequest(
        inputs=texts,
        truncate=wire.truncate is not False,
        dimensions=wire.dimensions,
        **envelope(service, exchange, wire),
    )
    vectors, finish = await exchange.unless_gone(result(service.backend.ask(request), Vectors))
    figures = timings(finish.metrics)
    # In a thread: the vectors of many texts are millions of numbers.
    body = await asyncio.to_thread(
        lambda: msgspec.json.encode(
            OllamaEmbeddings(
                model=wire.model or wire.name or "",
                embeddings=_numbers(vectors),
                total_duration=figures["total_duration"],
                load_duration=figures["load_duration"],
                prompt_eval_count=figures["prompt_eval_count"],
            )
        )
    )
    await _reply(exchange, body, finish)


async def embeddings(service: Service, exchange: Exchange) -> None:
    """Return the vector of one text, as older versions of Ollama do."""
    wire = await exchange.read(_ONE)
    request = EmbedRequest(
        inputs=(wire.prompt,), truncate=True, **envelope(service, exchange, wire)
    )
    vectors, finish = await exchange.unless_gone(result(service.backend.ask(request), Vectors))
    body = msgspec.json.encode(OllamaEmbedding(embedding=_numbers(vectors)[0]))
    await _reply(exchange, body, finish)


def _numbers(vectors: Vectors) -> list[list[float]]:
    return [floats_of(vector).tolist() for vector in vectors.vectors]


async def _reply(exchange: Exchange, body: bytes, finish: Finish) -> None:
    exchange.call.metrics = finish.metrics
    await exchange.reply(body, headers=server_timing(finish.metrics))
