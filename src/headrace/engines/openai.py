"""Models of any upstream that speaks OpenAI's protocol, over pooled HTTP connections."""

from __future__ import annotations

import base64
import binascii
import sys
from array import array
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from pydantic import Field

from headrace.core.errors import UpstreamError
from headrace.core.events import TokenCount
from headrace.core.metrics import Usage
from headrace.core.model import Capabilities
from headrace.core.request import CountRequest, EmbedRequest, GenerateRequest, RerankRequest
from headrace.engines import openai_body, remote
from headrace.engines.base import About, OpenRequest, RemoteEvent
from headrace.engines.openai_chunks import Reading, UsageSaid
from headrace.engines.remote import Patience, RemoteOptions, Shared
from headrace.models.providers import PROVIDERS, Provider

if TYPE_CHECKING:
    from headrace.engines.openai_upstream import Upstream

ABOUT = About(
    formats=("remote",),
    devices=("remote",),
    tasks=("generate", "embed", "rerank"),
    remote=True,
)
T = TypeVar("T")

_FIELD = r"^[a-z_]{1,32}$"
_UPSTREAMS: Shared[Upstream] = Shared(lambda upstream: upstream.aclose())


class Options(RemoteOptions):
    """What is said to an upstream, and where the table of providers is overruled."""

    api_version: str | None = Field(
        None, pattern=r"^[\w.-]{1,64}$", description="`api-version` of Azure's older addresses."
    )
    sampling: tuple[Annotated[str, Field(pattern=_FIELD)], ...] | None = Field(
        None,
        max_length=32,
        description="Sampling fields (and `n`) that the upstream honours, not those of the table.",
    )


footprint = remote.footprint


class _Vector(msgspec.Struct, frozen=True):
    embedding: str | list[float]
    index: int | None = None


class _Vectors(msgspec.Struct, frozen=True):
    data: list[_Vector]
    usage: UsageSaid | None = None


class _Score(msgspec.Struct, frozen=True):
    index: int
    relevance_score: float


class _Billed(msgspec.Struct, frozen=True):
    input_tokens: int | None = None
    total_tokens: int | None = None


class _Meta(msgspec.Struct, frozen=True):
    tokens: _Billed | None = None
    billed_units: _Billed | None = None


class _Scores(msgspec.Struct, frozen=True):
    results: list[_Score]
    usage: UsageSaid | None = None
    meta: _Meta | None = None


class _Tokens(msgspec.Struct, frozen=True):
    count: int
    tokens: list[int] | None = None
    estimated: bool = False


class Engine:
    """One model of an upstream."""

    def __init__(self, request: OpenRequest) -> None:
        self._options = options = Options(**request.options)
        self._provider = provider = _dialect(remote.provider_of(request, "openai"), options)
        self._way = remote.access(provider, options)
        self._model = request.model.path
        self._upstream: Upstream | None = None
        # Here, on a thread: the loop is not to wait for the library and the certificates.
        from headrace.engines.openai_upstream import Upstream, certificates

        certificates()
        self._connect = lambda: Upstream(self._way, options, options.api_version)
        self._place = (
            self._way.base_url,
            self._way.key,
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
                token_prompts=provider.token_prompts,
            ),
        )

    def __repr__(self) -> str:
        """Tell the model and where it is."""
        return f"<openai.Engine {self._model} at {self._way.base_url}>"

    async def answer(self, request: GenerateRequest) -> AsyncGenerator[RemoteEvent, None]:
        """Yield what the upstream says, and its account."""
        remote.check_plain(request, self._provider, self._provider.sampling)
        path, body = openai_body.generate(request, self._model, self._provider)
        reading, patience = Reading(self._way, request.n), Patience(self._options)
        events = self._connected().events(path, body, remote.trace_headers(request), patience)
        try:
            async for data in events:
                deltas = list(reading.deltas(data))
                patience.sign(token=bool(deltas))
                for delta in deltas:
                    yield delta
        finally:
            await events.aclose()
        yield reading.finish()

    async def embed(self, request: EmbedRequest) -> tuple[Sequence[bytes], Usage]:
        """Return the vectors as the upstream gives them."""
        body = openai_body.embed(request, self._model, self._provider)
        said = await self._ask("/embeddings", body, _Vectors, request)
        places = [place if one.index is None else one.index for place, one in enumerate(said.data)]
        if sorted(places) != list(range(len(request.inputs))):
            raise UpstreamError("The upstream gave vectors for other inputs than it was given.")
        made = dict(zip(places, map(_packed, said.data), strict=True))
        return [made[place] for place in range(len(made))], _usage(said.usage)

    async def rerank(self, request: RerankRequest) -> tuple[Sequence[tuple[int, float]], Usage]:
        """Return the documents' places and scores, best first."""
        body = openai_body.rerank(request, self._model)
        said = await self._ask("/rerank", body, _Scores, request)
        if not {one.index for one in said.results} <= set(range(len(request.documents))):
            raise UpstreamError("The upstream ranked documents that it was not given.")
        best = sorted(said.results, key=lambda one: -one.relevance_score)[: request.top_n]
        return [(one.index, one.relevance_score) for one in best], _billed(said)

    async def count_tokens(self, request: CountRequest) -> TokenCount:
        """Count at the upstream if it can; guess elsewhere."""
        if not self._provider.tokenize:
            return remote.estimated_count(request)
        url = f"{self._way.base_url.removesuffix('/v1')}/tokenize"
        said = await self._ask("", openai_body.count(request, self._model), _Tokens, url=url)
        ids = None if said.tokens is None else tuple(said.tokens)
        return TokenCount(count=said.count, token_ids=ids, estimated=said.estimated)

    async def aclose(self) -> None:
        """Leave the upstream."""
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            await _UPSTREAMS.give_back(self._place)

    def _connected(self) -> Upstream:
        if self._upstream is None:
            self._upstream = _UPSTREAMS.take(self._place, self._connect)
        return self._upstream

    async def _ask(
        self,
        path: str,
        body: bytes,
        kind: type[T],
        request: EmbedRequest | RerankRequest | None = None,
        url: str | None = None,
    ) -> T:
        headers = remote.trace_headers(request) if request else {}
        said: Any = await self._connected().ask(path, body, headers, url)
        try:
            return msgspec.convert(said, kind, strict=False)
        except msgspec.ValidationError as error:
            raise UpstreamError(
                "The upstream's answer is not as it should be.", detail=self._way.scrub(str(error))
            ) from None


def _dialect(provider: Provider, options: Options) -> Provider:
    """Return the provider as the options have it."""
    if options.base_url is not None and provider is PROVIDERS["openai"]:
        # Those that are compatible know the older names; few of them the newer.
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
        values = array("f", vector.embedding)
        if sys.byteorder == "big":
            values.byteswap()
        data = values.tobytes()
    if not data or len(data) % 4:
        raise UpstreamError("The upstream gave a vector that is none.")
    return data


def _usage(said: UsageSaid | None) -> Usage:
    return said.usage() if said else Usage()


def _billed(said: _Scores) -> Usage:
    if said.usage is not None:
        return said.usage.usage()
    meta = said.meta or _Meta()
    billed = meta.tokens or meta.billed_units or _Billed()
    return Usage(prompt_tokens=billed.input_tokens or billed.total_tokens or 0)
