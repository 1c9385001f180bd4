"""POST /v1/completions: one or several prompts, continued."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from headrace.api import fields, limits
from headrace.api.answers import AnswerHead, ChunkHead, PromptPlace, prompt_places
from headrace.api.exchange import Call, Exchange, Service
from headrace.api.fields import Peers
from headrace.api.limits import ApiSettings
from headrace.api.stream import ChunkFormat, Reply, answer
from headrace.api.wire import (
    GenerateFields,
    TokenId,
    generate_fields,
    inputs_schema,
    to_inputs,
    to_sampling,
)
from headrace.core import errors
from headrace.core.backend import Backend
from headrace.core.errors import GenerationFailed, InvalidRequest
from headrace.core.events import (
    Choice,
    Delta,
    Event,
    Finish,
    FinishReason,
    PromptToken,
    PromptTokens,
    TokenLogprob,
)
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.request import MAX_PROMPT_CANDIDATES, GenerateRequest
from headrace.core.sampling import Logprobs

_OPENAI_MAX_TOKENS = 16
_BUFFER = 64

_Item = tuple[int, Event | Exception]


class CompletionRequest(GenerateFields, frozen=True, kw_only=True):
    """OpenAI's completion request, with common extensions. `best_of` is `n` or absent.

    `max_tokens` is 16 when it is absent, as in OpenAI's API, or what the context has left. With
    a `suffix` the answer is what comes between the prompt and it.
    """

    prompt: Annotated[
        str | list[str | TokenId | list[TokenId]],
        Meta(extra={"schema": inputs_schema(limits.MAX_PROMPTS)}),
    ]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Logprobs | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None

    peers: ClassVar[Peers] = fields.COMPLETIONS


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of an answer's tokens; `text_offset` counts characters.

    The first token of an echoed prompt has none.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One complete answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: list[PromptPlace] | msgspec.UnsetType = msgspec.UNSET


class Completion(AnswerHead, frozen=True, kw_only=True):
    """A whole answer."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class CompletionChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The addition of a chunk to a choice."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class CompletionChunk(ChunkHead, frozen=True, kw_only=True):
    """One `data:` line of a stream; `data: [DONE]` is the last line of one that ended well."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChunkChoice]


_DECODER = msgspec.json.Decoder(CompletionRequest)


async def completions(service: Service, exchange: Exchange) -> None:
    """Continue one or several prompts, streamed or whole."""
    wire = await exchange.read(_DECODER)
    exchange.call.names = wire.names()
    requests = to_requests(wire, exchange.settings, exchange.call)
    if len(requests) == 1:
        stream = service.backend.ask(requests[0])
    else:
        stream = fan_out(service.backend, requests, limits.PARALLEL_PROMPTS)
    reply = Reply("cmpl-", _format(wire), len(requests) * requests[0].n, partial(_whole, wire))
    await answer(service, exchange, wire, stream, reply)


def to_requests(
    wire: CompletionRequest, settings: ApiSettings, call: Call
) -> list[GenerateRequest]:
    """Build one core request for each prompt.

    Raises:
        InvalidRequest: fields contradict each other, a value is out of its range, or the list of
            prompts is too long or mixed.
        Unsupported: best_of differs from n.
    """
    prompts = to_inputs("prompt", wire.prompt, limits.MAX_PROMPTS)
    common = generate_fields(wire, settings, call, prompts=len(prompts))
    if wire.best_of not in {None, wire.n or 1}:
        raise errors.Unsupported("best_of is supported only where it equals n.", param="best_of")
    max_tokens = wire.max_tokens
    if max_tokens is None:
        max_tokens = max(_OPENAI_MAX_TOKENS, wire.min_tokens or 0)
    first = GenerateRequest(
        prompt=prompts[0],
        echo=bool(wire.echo),
        # Empty is absent: in OpenAI's API it has no effect.
        suffix=wire.suffix or None,
        sampling=to_sampling(wire, max_tokens=max_tokens, logprobs=wire.logprobs),
        fit_max_tokens=wire.max_tokens is None,
        **common,
    )
    _check_candidates(first, prompts)
    rest = enumerate(prompts[1:], 1)
    return [first, *(replace(first, prompt=prompt, id=f"{call.id}.{i}") for i, prompt in rest)]


def _check_candidates(request: GenerateRequest, prompts: Sequence[str | tuple[int, ...]]) -> None:
    each = request.prompt_candidates
    if each is None:
        return
    size = sum(map(len, prompts)) * (1 + each) * request.n
    if size > MAX_PROMPT_CANDIDATES:
        raise InvalidRequest(
            f"All prompts, with {each} candidates for each token, are more than "
            f"{MAX_PROMPT_CANDIDATES} log probabilities.",
            param="prompt",
        )


async def fan_out(
    backend: Backend, requests: Sequence[GenerateRequest], parallel: int
) -> AsyncGenerator[Event, None]:
    """Yield the events of all requests, at most `parallel` running at a time.

    Choice `c` of request `r` has index `r * n + c`. The Finish has the reasons of all choices in
    that order, and the sum of their usage. The first failure ends all requests.
    """
    queue: asyncio.Queue[_Item] = asyncio.Queue(_BUFFER)
    waiting = iter(enumerate(requests))
    tasks = {
        asyncio.create_task(_work(backend, waiting, queue))
        for _ in range(min(parallel, len(requests)))
    }
    finishes: dict[int, Finish] = {}
    try:
        while len(finishes) < len(requests):
            index, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Finish):
                finishes[index] = event
            elif isinstance(event, Delta | PromptTokens):
                yield replace(event, index=index * requests[index].n + event.index)
            else:
                yield event
        yield _merge([finishes[index] for index in range(len(requests))])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _work(
    backend: Backend, waiting: Iterator[tuple[int, GenerateRequest]], queue: asyncio.Queue[_Item]
) -> None:
    for index, request in waiting:
        stream = backend.ask(request)
        try:
            event: Event | None = None
            async for event in stream:
                await queue.put((index, event))
            if not isinstance(event, Finish):
                raise GenerationFailed("The stream ended without a Finish.")
        except Exception as error:  # noqa: BLE001 - raised again by the reader of the queue
            await queue.put((index, error))
            return
        finally:
            await stream.aclose()


def _merge(finishes: Sequence[Finish]) -> Finish:
    reasons: list[FinishReason] = []
    for finish in finishes:
        reasons += finish.finish_reasons
    usage = Usage.merged([finish.usage for finish in finishes])
    metrics = InferenceMetrics.merged([finish.metrics for finish in finishes])
    return Finish(tuple(reasons), usage, replace(metrics, usage=usage))


def _format(wire: CompletionRequest) -> ChunkFormat:
    writers: dict[int, LogprobWriter] = {}

    def logprobs(delta: Delta) -> CompletionLogprobs:
        return writers.setdefault(delta.index, LogprobWriter()).write(delta.logprobs)

    def prompt(event: PromptTokens) -> CompletionLogprobs:
        writer = writers.setdefault(event.index, LogprobWriter())
        return writer.write(event.tokens, wire.logprobs)

    return ChunkFormat(
        object="text_completion",
        role=b"",
        text=b'"text":',
        # This route has no field of its own for thinking: it is part of the text.
        reasoning=b'"text":',
        after=b"",
        empty=b'"text":""',
        logprobs=logprobs,
        prompt=prompt,
    )


def _whole(
    wire: CompletionRequest, head: dict[str, Any], choices: tuple[Choice, ...]
) -> Completion:
    return Completion(**head, choices=[_choice(wire, choice) for choice in choices])


def _choice(wire: CompletionRequest, choice: Choice) -> CompletionChoice:
    echoed = choice.prompt_tokens if wire.echo and wire.logprobs is not None else ()
    scored = choice.prompt_tokens if wire.prompt_logprobs is not None else ()
    tokens = (*echoed, *choice.logprobs)
    return CompletionChoice(
        index=choice.index,
        text=choice.reasoning + choice.text,
        logprobs=LogprobWriter().write(tokens, wire.logprobs) if tokens else None,
        finish_reason=choice.finish_reason,
        prompt_logprobs=prompt_places(scored) if scored else msgspec.UNSET,
    )


class LogprobWriter:
    """Writes the log probabilities of one choice, and counts its characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(
        self, tokens: Sequence[TokenLogprob | PromptToken], count: int | None = None
    ) -> CompletionLogprobs:
        """Return the tokens in OpenAI's format; calls follow the order of the text.

        Those of a prompt have at most `count` candidates.
        """
        return CompletionLogprobs(
            [_name(token.data) for token in tokens],
            [token.logprob for token in tokens],
            [_candidates(token, count) for token in tokens],
            [self._advance(token.data) for token in tokens],
        )

    def _advance(self, data: bytes) -> int:
        start = self._offset
        self._offset += len(self._decoder.decode(data))
        return start


def _candidates(token: TokenLogprob | PromptToken, count: int | None) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    # Of two candidates with one text, such as control tokens, the likelier is kept.
    kept = token.top[:count] if isinstance(token, PromptToken) else token.top
    best = {_name(top.data): top.logprob for top in reversed(kept)}
    return dict(reversed(best.items()))


def _name(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        # OpenAI's way to name a part of a character, so that two parts differ.
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
