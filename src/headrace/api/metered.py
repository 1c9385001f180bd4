"""A Backend that keeps to the limits and the allowed models of the keys of a database."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

from headrace.core.backend import Backend
from headrace.core.envelope import new_id
from headrace.core.errors import Forbidden, HeadraceError, RateLimited
from headrace.core.events import Event, TokenCount
from headrace.core.keys import Account, KeyStore
from headrace.core.media import text_of
from headrace.core.model import ModelInfo
from headrace.core.request import (
    AnyRequest,
    CountRequest,
    EmbedRequest,
    GenerateRequest,
    RerankRequest,
    ScoreRequest,
    Text,
)
from headrace.core.stream import result

_AROUND = 16
"""Tokens that a template or tokenizer may put around a text or a message."""

_UNKNOWN_TEMPLATE = 512
_UNKNOWN_ANSWER = 4096
"""Of a model whose context is not known: the longest answer to a request without max_tokens."""


class Metered:
    """The backend, for requests whose `client` is a key that is limited.

    Requests of other keys are passed on as they are.
    """

    def __init__(self, backend: Backend, keys: KeyStore) -> None:
        self.backend = backend
        self.keys = keys

    def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        """Return the stream of the backend; what the key does not allow is raised by it."""
        account = self.keys.account(request.client) if request.client else None
        if account is None or account.is_free:
            return self.backend.ask(request)
        return _Reserved(self, account, request)

    def models(self) -> Sequence[ModelInfo]:
        """Return the models of the backend."""
        return self.backend.models()

    async def aclose(self) -> None:
        """Close the backend."""
        await self.backend.aclose()


class _Reserved(AsyncGenerator[Event, None]):
    """A stream that reserves before it begins. Later events do not pass through it in a loop."""

    def __init__(self, metered: Metered, account: Account, request: AnyRequest) -> None:
        self._metered = metered
        self._account = account
        self._request = request
        self._stream: AsyncGenerator[Event, None] | None = None

    def __aiter__(self) -> AsyncGenerator[Event, None]:
        """Return the stream of the backend once it has begun, whose events cost nothing more."""
        return self if self._stream is None else self._stream

    def __anext__(self) -> Any:
        stream = self._stream
        return self._first() if stream is None else stream.__anext__()

    async def asend(self, value: None) -> Event:
        """Return the next event."""
        del value
        return await self.__anext__()

    async def athrow(self, *error: Any) -> Event:
        """Throw into the stream."""
        if self._stream is None:
            raise error[0]
        return await self._stream.athrow(*error)

    async def aclose(self) -> None:
        """Close the stream, if it has begun."""
        if self._stream is not None:
            await self._stream.aclose()

    async def _first(self) -> Event:
        backend = self._metered.backend
        self._check_model(backend)
        request = self._request
        if self._account.key.limits.any:
            request = await self._reserved(backend, self._metered.keys)
        self._stream = backend.ask(request)
        return await self._stream.__anext__()

    def _check_model(self, backend: Backend) -> None:
        key = self._account.key
        info = _info(backend, self._request.model)
        names = (info.id, *info.aliases) if info else (self._request.model,)
        if key.models and not self._account.allows(names):
            raise Forbidden(
                f"This API key may not use the model {self._request.model!r}.", param="model"
            )

    async def _reserved(self, backend: Backend, keys: KeyStore) -> AnyRequest:
        """Reserve the tokens of the request; return it with what its answer may have of them."""
        request, info = self._request, _info(backend, self._request.model)
        bound = Bound(0, 0, 0)
        if self._account.key.limits.of_tokens:
            bound = bound_of(request, info)
        try:
            tokens = await keys.reserve(request.client, request.id, bound.least, bound.most)
        except RateLimited as error:
            is_of_tokens = (error.detail or "").startswith("tokens")
            prompt = await _counted(backend, request) if is_of_tokens else None
            if prompt is None or prompt >= bound.prompt:
                raise
            bound = bound.with_prompt(prompt)
            tokens = await keys.reserve(request.client, request.id, bound.least, bound.most)
        if not bound.is_open or not isinstance(request, GenerateRequest):
            return request
        answer = max((tokens - bound.prompt) // request.n, 1)
        sampling = replace(request.sampling, max_tokens=answer)
        return replace(request, sampling=sampling, fit_max_tokens=True)


class Bound(NamedTuple):
    """The most tokens of a prompt, and of the answers: at least, and as they are wanted."""

    prompt: int
    least_answer: int
    most_answer: int

    @property
    def least(self) -> int:
        """The tokens without which the request is refused."""
        return self.prompt + self.least_answer

    @property
    def most(self) -> int:
        """The tokens that it takes at most."""
        return self.prompt + self.most_answer

    @property
    def is_open(self) -> bool:
        """Whether the request leaves open how long its answer is."""
        return self.least_answer < self.most_answer

    def with_prompt(self, tokens: int) -> Bound:
        """Return the bound with a prompt that was counted."""
        return self._replace(prompt=tokens)


def bound_of(request: AnyRequest, info: ModelInfo | None) -> Bound:
    """Return how many tokens a request takes at most. A text has no more tokens than bytes."""
    context = info.context_length if info else None
    match request:
        case GenerateRequest():
            return _generated(request, info, context)
        case EmbedRequest():
            tokens = [_bytes(text) + _AROUND for text in request.inputs]
        case RerankRequest():
            query = _bytes(request.query)
            tokens = [query + _bytes(text) + _AROUND for text in request.documents]
        case ScoreRequest():
            tokens = [_bytes(first) + _bytes(second) + _AROUND for first, second in request.pairs]
        case _:
            return Bound(0, 0, 0)
    return Bound(sum(min(number, context or number) for number in tokens), 0, 0)


def _generated(request: GenerateRequest, info: ModelInfo | None, context: int | None) -> Bound:
    prompt = _prompt_bytes(request, info)
    if context:
        prompt = min(prompt, context)
    preset = info.preset.get("defaults", {}).get("max_tokens") if info else None
    wanted = request.sampling.max_tokens
    if wanted is None:
        wanted = preset
    if isinstance(wanted, int):
        return Bound(prompt, wanted * request.n, wanted * request.n)
    longest = context - 1 if context else _UNKNOWN_ANSWER
    return Bound(prompt, request.n, max(longest, 1) * request.n)


def _prompt_bytes(request: GenerateRequest, info: ModelInfo | None) -> int:
    if request.messages is None:
        gap = msgspec.json.encode(request.gap) if request.gap else b""
        return _bytes(request.prompt or "") + _bytes(request.suffix or "") + len(gap) + _AROUND
    template = info.chat_template if info else None
    fixed = _UNKNOWN_TEMPLATE if template is None else len(template.encode())
    texts = [text_of(turn.content) + turn.reasoning for turn in request.messages]
    calls = [call for turn in request.messages for call in turn.tool_calls]
    preset = info.preset if info else {}
    written = msgspec.json.encode([request.tools, calls, request.template_options, preset])
    media = sum(part.tokens for part in request.media_parts)
    around = _AROUND * (len(texts) + len(request.tools) + len(calls))
    return fixed + sum(map(_bytes, texts)) + len(written) + media + around


async def _counted(backend: Backend, request: AnyRequest) -> int | None:
    """Return the exact number of a prompt's tokens; None if it cannot be counted."""
    if (
        not isinstance(request, GenerateRequest)
        or request.media_parts
        or request.suffix is not None
    ):
        return None
    if isinstance(request.prompt, tuple):
        return None
    count = CountRequest(
        model=request.model,
        messages=request.messages,
        text=request.prompt,
        add_special=request.prompt is not None,
        template_options=request.template_options,
        tools=request.tools,
        thinking=request.thinking,
        continue_final=request.continue_final,
        deadline_s=request.deadline_s,
        load_wait_s=request.load_wait_s,
        client=request.client,
        received=request.received,
        id=new_id(),
    )
    try:
        tokens, _ = await result(backend.ask(count), TokenCount)
    except HeadraceError:
        return None
    return None if tokens.estimated else tokens.count


def _info(backend: Backend, model: str) -> ModelInfo | None:
    infos = backend.models()
    if not model and len(infos) == 1:
        return infos[0]
    return next((info for info in infos if model == info.id or model in info.aliases), None)


def _bytes(text: Text) -> int:
    return len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else len(text)
