"""A model of an upstream, and the responses that are no streams."""

from __future__ import annotations

import base64
import binascii
from collections.abc import AsyncGenerator, Sequence
from typing import Any, TypeVar

import msgspec

from headrace.certificates import certificates
from headrace.core.constraint import FORMS
from headrace.core.errors import UpstreamError
from headrace.core.events import TokenCount, bytes_of
from headrace.core.metrics import Usage
from headrace.core.model import Capabilities
from headrace.core.request import (
    CountRequest,
    EmbedRequest,
    GenerateRequest,
    Request,
    RerankRequest,
)
from headrace.engines import remote
from headrace.engines.base import OpenRequest, RemoteEvent
from headrace.engines.openai import Options
from headrace.engines.openai.protocol import (
    AnswerReader,
    count_body,
    embed_body,
    generate_body,
    rerank_body,
)
from headrace.engines.openai.upstream import Upstream
from headrace.engines.remote import Shared, SilenceTimer
from headrace.models.providers import PROVIDERS, Provider
from headrace.text import chunks

T = TypeVar("T")

# How long a stream may stay open that has nothing more to say.
_END_S = 0.5
_UPSTREAMS: Shared[Upstream] = Shared(lambda upstream: upstream.aclose())


class _Vector(msgspec.Struct, frozen=True):
    embedding: str | list[float]
    index: float | None = None


class _Vectors(msgspec.Struct, frozen=True):
    data: list[_Vector]
    usage: Any = None


class _Score(msgspec.Struct, frozen=True):
    index: float
    relevance_score: float


class _Billed(msgspec.Struct, frozen=True):
    input_tokens: float | None = None
    total_tokens: float | None = None


class _Meta(msgspec.Struct, frozen=True):
    tokens: _Billed | None = None
    billed_units: _Billed | None = None


class _Scores(msgspec.Struct, frozen=True):
    results: list[_Score]
    usage: Any = None
    meta: _Meta | None = None


class _Tokens(msgspec.Struct, frozen=True):
    count: float
    tokens: list[int] | None = None
    estimated: bool = False


class Engine:
    """A model of an upstream."""

    def __init__(self, request: OpenRequest) -> None:
        self._options = options = Options(**request.options)
        self._provider = provider = _dialect(remote.provider_of(request, "openai"), options)
        self._access = remote.access(provider, options)
        self._model = request.model.path
        self._upstream: Upstream | None = None
        # Read here, on a thread, to not block the event loop.
        certificates()
        self._connect = lambda: Upstream(self._access, options, options.api_version)
        self._shared_key = (
            self._access.base_url,
            self._access.key,
            options.connect_s,
            options.max_retries,
            options.first_token_s,
            options.api_version,
        )
        self.facts = remote.facts(
            request,
            provider,
            Capabilities(
                sampling=provider.sampling - {"n"},
                json_schema=provider.json != "none",
                forms=frozenset(FORMS if provider.structured_outputs else ()),
                token_prompts=provider.token_prompts,
                vision=provider.images,
                audio=provider.audio,
            ),
        )

    def __repr__(self) -> str:
        """Name the model and where it is."""
        return f"<openai.Engine {self._model} at {self._access.base_url}>"

    async def answer(self, request: GenerateRequest) -> AsyncGenerator[RemoteEvent, None]:
        """Yield the upstream's deltas, then its finish."""
        remote.check_supported(request, self._provider, self._provider.sampling)
        path, body = generate_body(request, self._model, self._provider)
        reader, timer = AnswerReader(self._access, request.n), SilenceTimer(self._options)
        headers = remote.trace_headers(request)
        events = self._connected().events(path, body, headers, timer)
        try:
            while (data := await _next(events, reader)) is not None:
                deltas = list(reader.deltas(data))
                timer.reset(token=bool(deltas))
                if reader.is_whole:
                    timer.end_within(_END_S)
                for delta in deltas:
                    yield delta
        finally:
            await events.aclose()
        yield reader.finish()

    async def embed(self, request: EmbedRequest) -> tuple[Sequence[bytes], Usage]:
        """Return the upstream's vectors, in the order of the inputs."""
        body = embed_body(request, self._model, self._provider)
        answer = await self._post("/embeddings", body, _Vectors, request)
        rows = enumerate(answer.data)
        indexes = [index if row.index is None else row.index for index, row in rows]
        if sorted(indexes) != list(range(len(request.inputs))):
            raise UpstreamError("The upstream gave vectors for other inputs than it was given.")
        vectors = dict(zip(map(int, indexes), map(_packed, answer.data), strict=True))
        usage = chunks.usage_of(answer.usage) or Usage()
        return [vectors[index] for index in range(len(vectors))], usage

    async def rerank(self, request: RerankRequest) -> tuple[Sequence[tuple[int, float]], Usage]:
        """Return the documents' indexes and scores, best first."""
        body = rerank_body(request, self._model)
        answer = await self._post("/rerank", body, _Scores, request)
        if not {score.index for score in answer.results} <= set(range(len(request.documents))):
            raise UpstreamError("The upstream ranked documents that it was not given.")
        best = sorted(answer.results, key=lambda score: -score.relevance_score)[: request.top_n]
        return [(int(score.index), score.relevance_score) for score in best], _billed(answer)

    async def count_tokens(self, request: CountRequest) -> TokenCount:
        """Return the upstream's count if it has one, or an estimate."""
        turns = request.messages or ()
        if not self._provider.tokenize or any(not isinstance(m.content, str) for m in turns):
            return remote.estimated_count(request)
        url = f"{self._access.base_url.removesuffix('/v1')}/tokenize"
        count = await self._post("", count_body(request, self._model), _Tokens, url=url)
        ids = None if count.tokens is None else tuple(count.tokens)
        return TokenCount(count=int(count.count), token_ids=ids, estimated=count.estimated)

    async def aclose(self) -> None:
        """Release the connections."""
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            await _UPSTREAMS.release(self._shared_key)

    def _connected(self) -> Upstream:
        if self._upstream is None:
            self._upstream = _UPSTREAMS.acquire(self._shared_key, self._connect)
        return self._upstream

    async def _post(
        self,
        path: str,
        body: bytes,
        kind: type[T],
        request: Request | None = None,
        url: str | None = None,
    ) -> T:
        headers = remote.trace_headers(request) if request else {}
        answer: Any = await self._connected().post(path, body, headers, url)
        try:
            return msgspec.convert(answer, kind, strict=False)
        except msgspec.ValidationError as error:
            raise UpstreamError(
                "The upstream's answer has an unexpected form.",
                detail=self._access.scrub(str(error)),
            ) from None


async def _next(events: AsyncGenerator[bytes, None], reader: AnswerReader) -> bytes | None:
    try:
        return await anext(events, None)
    except UpstreamError:
        # All that can be missing is the usage and the mark of the end.
        if not reader.is_complete:
            raise
        return None


def _dialect(provider: Provider, options: Options) -> Provider:
    """Return the provider with the options applied."""
    if options.base_url is not None and provider is PROVIDERS["openai"]:
        # Compatible upstreams know the older names; few know the newer.
        provider = msgspec.structs.replace(provider, renamed={})
    if options.sampling is None:
        return provider
    return msgspec.structs.replace(provider, sampling=frozenset(options.sampling))


def _packed(vector: _Vector) -> bytes:
    if isinstance(vector.embedding, str):
        try:
            data = base64.b64decode(vector.embedding, validate=True)
        except binascii.Error:
            raise UpstreamError("The upstream gave a vector that is no base64.") from None
    else:
        data = bytes_of(vector.embedding)
    if not data or len(data) % 4:
        raise UpstreamError("The upstream gave a vector that is empty or incomplete.")
    return data


def _billed(answer: _Scores) -> Usage:
    if (usage := chunks.usage_of(answer.usage)) is not None:
        return usage
    meta = answer.meta or _Meta()
    billed = meta.tokens or meta.billed_units or _Billed()
    return Usage(prompt_tokens=int(billed.input_tokens or billed.total_tokens or 0))
