"""Requests of every kind at an upstream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial

import msgspec

from headrace.core.errors import GenerationFailed, InvalidRequest, Unsupported, UpstreamError
from headrace.core.events import (
    Delta,
    Event,
    FinishReason,
    Ranked,
    Ranking,
    Scores,
    Text,
    ToolCallDelta,
    Vectors,
)
from headrace.core.metrics import Usage
from headrace.core.request import (
    CountRequest,
    DetokenizeRequest,
    EmbedRequest,
    GenerateRequest,
    RerankRequest,
    ScoreRequest,
)
from headrace.engines.base import RemoteEngine, RemoteEvent, RemoteFinish
from headrace.engines.remote import estimate, estimated_count
from headrace.text.pipeline import StopMatcher
from headrace.worker.encode import normalized
from headrace.worker.prompt import check_supported
from headrace.worker.turn import Answers, R, Served, T, Turn, unmeasured


class Connected(Served, frozen=True, kw_only=True):
    """A model of an upstream; `stops` are the configured stop strings."""

    engine: RemoteEngine
    stops: tuple[str, ...] = ()


async def generate(connected: Connected, request: GenerateRequest) -> AsyncGenerator[Event, None]:
    """Yield the whole stream of an answer.

    Raises:
        HeadraceError: with the figures up to then in its `metrics`.
    """
    with Turn(connected, request) as turn:
        turn.require_task()
        _check(connected, request)
        answer = _Answer(turn)
        await turn.take_slot()
        stream: AsyncGenerator[RemoteEvent, None] | None = None
        try:
            turn.meter.admitted(estimated_count(request).count, 0)
            for index in range(request.n if request.echo else 0):
                yield Delta(str(request.prompt), index=index)
            sampling = msgspec.structs.replace(request.sampling, stop=answer.stops)
            sent = msgspec.structs.replace(request, sampling=sampling)
            stream = turn.steps(connected.engine.answer(sent))
            async for event in stream:
                if (shown := answer.shown(event)) is not None:
                    yield shown
                if answer.is_stopped:
                    break
            for delta in answer.rest():
                yield delta
            await answer.check()
        finally:
            if stream is not None:
                await stream.aclose()
            turn.leave_slot()
        yield turn.finish(answer.reasons)


async def embed(connected: Connected, request: EmbedRequest) -> AsyncGenerator[Event, None]:
    """Yield a vector for each input, and the Finish.

    Raises:
        HeadraceError: with the figures up to then in its `metrics`.
    """
    guess = sum(estimate(text) if isinstance(text, str) else len(text) for text in request.inputs)
    with Turn(connected, request) as turn:
        turn.require_task()
        raw, usage = await _in_slot(turn, lambda: connected.engine.embed(request))
        vectors: Sequence[bytes] = raw
        size = len(vectors[0]) // 4
        if any(len(vector) != 4 * size for vector in vectors):
            raise UpstreamError("The upstream gave vectors of different lengths.")
        if request.dimensions not in (None, size):
            raise UpstreamError(f"The upstream gave {size} dimensions.")
        if request.normalize:
            vectors = await asyncio.to_thread(lambda: [_unit(vector) for vector in raw])
        _settle(turn, usage, guess)
        yield Vectors(tuple(vectors))
        yield turn.finish()


async def rerank(connected: Connected, request: RerankRequest) -> AsyncGenerator[Event, None]:
    """Yield the documents in order, and the Finish.

    Raises:
        HeadraceError: with the figures up to then in its `metrics`.
    """
    guess = sum(map(estimate, (request.query, *request.documents)))
    with Turn(connected, request) as turn:
        turn.require_task()
        ranked, usage = await _in_slot(turn, lambda: connected.engine.rerank(request))
        _settle(turn, usage, guess)
        yield Ranking(tuple(Ranked(index, score) for index, score in ranked))
        yield turn.finish()


async def score(connected: Connected, request: ScoreRequest) -> AsyncGenerator[Event, None]:
    """Yield the score of each pair, and the Finish; the upstream ranks once for each first text.

    Raises:
        HeadraceError: with the figures up to then in its `metrics`.
    """
    places: dict[str, list[int]] = {}
    for place, (query, _) in enumerate(request.pairs):
        places.setdefault(query, []).append(place)
    with Turn(connected, request) as turn:
        turn.require_task()
        scores, total = [0.0] * len(request.pairs), Usage()
        for query, mine in places.items():
            documents = tuple(request.pairs[place][1] for place in mine)
            ranking = RerankRequest(
                query=query,
                documents=documents,
                truncate=request.truncate,
                traceparent=request.traceparent,
                tracestate=request.tracestate,
            )
            ranked, usage = await _in_slot(turn, partial(connected.engine.rerank, ranking))
            if {index for index, _ in ranked} != {*range(len(mine))}:
                raise UpstreamError("The upstream did not score every text.")
            total = Usage.merged([total, usage])
            for index, value in ranked:
                scores[mine[index]] = value
        _settle(turn, total, sum(estimate(text) for pair in request.pairs for text in pair))
        yield Scores(tuple(scores))
        yield turn.finish()


class _Answer:
    """The choices of one answer: stop strings, counts and finish reasons."""

    def __init__(self, turn: Turn[Connected, GenerateRequest]) -> None:
        request = turn.request
        self.stops = (*request.sampling.stop, *turn.served.stops)
        self.reasons: list[FinishReason] = ["stop"] * request.n
        self._turn = turn
        self._matchers = [StopMatcher(self.stops) for _ in range(request.n)]
        self._counted = 0
        self._whole: list[list[str]] = [[] for _ in range(request.n)]

    async def check(self) -> None:
        """Check each choice that has ended by itself against the constraint of the request.

        Raises:
            ConstraintViolated: one does not keep to it.
        """
        turn = self._turn
        if (constraint := turn.request.constraint) is None:
            return
        for reason, matcher, parts in zip(self.reasons, self._matchers, self._whole, strict=True):
            if reason == "stop" and matcher.matched is None:
                checking = turn.served.compiler.check(constraint, "".join(parts), cut=False)
                await turn.within(checking)

    def _note(self, index: int, text: str) -> None:
        self._turn.answered(text)
        if self._turn.request.constraint is not None:
            self._whole[index].append(text)

    @property
    def is_stopped(self) -> bool:
        """Whether every choice has reached a stop string."""
        return all(matcher.matched is not None for matcher in self._matchers)

    def shown(self, event: RemoteEvent) -> Event | None:
        """Return the event for the client, or None."""
        if isinstance(event, Delta):
            return self._delta(event)
        if isinstance(event, ToolCallDelta):
            self._counted += 1
            self._turn.meter.delta(1, visible=True)
            return event
        if isinstance(event, RemoteFinish):
            self.reasons = list(event.finish_reasons)
            if event.usage is not None:
                usage = self._turn.usage = event.usage
                missing = usage.completion_tokens - self._counted
                self._turn.meter.correct(usage.prompt_tokens, missing, usage.cached_tokens)
            return None
        return event

    def rest(self) -> list[Delta]:
        """Return the text that was held back as the possible beginning of a stop string."""
        deltas: list[Delta] = []
        for index, matcher in enumerate(self._matchers):
            text = matcher.flush()
            self._note(index, text)
            if matcher.matched is not None:
                self.reasons[index] = "stop"
            if text:
                deltas.append(Delta(text, index=index))
        return deltas

    def _delta(self, delta: Delta) -> Delta | None:
        matcher = self._matchers[delta.index]
        if matcher.matched is not None:
            return None
        # One token for each of its log probabilities, otherwise one for the delta.
        tokens = len(delta.logprobs) or 1
        self._counted += tokens
        self._turn.meter.delta(tokens, visible=bool(delta.text or delta.reasoning))
        text = matcher.feed(delta.text)
        self._note(delta.index, text)
        shown = Delta(text, delta.token_ids, delta.index, delta.reasoning, delta.logprobs)
        return shown if text or shown.reasoning or shown.logprobs else None


def _check(connected: Connected, request: GenerateRequest) -> None:
    check_supported(request, connected.facts.capabilities, connected.name)
    if request.n > connected.max_choices:
        raise InvalidRequest("n is too large for this model.", param="n")
    if request.echo and (request.sampling.logprobs is not None or request.messages):
        raise Unsupported("Only a plain prompt can be echoed here.", param="echo")
    if request.echo and not isinstance(request.prompt, str):
        raise Unsupported("Token ids cannot be echoed here.", param="echo")


async def _in_slot(turn: Turn[Connected, R], ask: Callable[[], Awaitable[T]]) -> T:
    await turn.take_slot()
    turn.meter.admitted(0, 0)
    try:
        return await turn.within(ask())
    finally:
        turn.leave_slot()


def _settle(turn: Turn[Connected, R], usage: Usage, guess: int) -> None:
    used = turn.usage = usage if usage.prompt_tokens else Usage(prompt_tokens=guess)
    turn.meter.correct(used.prompt_tokens, used.completion_tokens, used.cached_tokens)


def _unit(vector: bytes) -> bytes:
    try:
        return normalized(vector)
    except GenerationFailed:
        raise UpstreamError("The upstream gave a vector that is not made of numbers.") from None


async def _text(connected: Connected, request: DetokenizeRequest) -> Text:
    raise Unsupported("The tokens of a remote model cannot be read here.", param="tokens")


ANSWERS: Answers = {
    GenerateRequest: generate,
    EmbedRequest: embed,
    RerankRequest: rerank,
    ScoreRequest: score,
    CountRequest: lambda connected, request: unmeasured(
        request, connected.engine.count_tokens(request)
    ),
    DetokenizeRequest: lambda connected, request: unmeasured(request, _text(connected, request)),
}
