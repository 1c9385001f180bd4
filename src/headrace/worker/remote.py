"""Requests of every kind at an upstream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from functools import partial

import msgspec

from headrace.core.constraint import Constraint
from headrace.core.errors import (
    ConstraintViolated,
    GenerationFailed,
    InvalidRequest,
    Unsupported,
    UpstreamError,
)
from headrace.core.events import (
    Delta,
    Event,
    FinishReason,
    Progress,
    Ranked,
    Ranking,
    Scores,
    Text,
    TokenCount,
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
from headrace.worker.inputs import check_call
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
        able = connected.facts.capabilities.sampling
        sampling = request.sampling.without_neutral(able)
        request = msgspec.structs.replace(request, sampling=sampling)
        _check(connected, request)
        answer = _Answer(turn)
        await turn.take_slot()
        stream: AsyncGenerator[RemoteEvent, None] | None = None
        try:
            prompt = estimated_count(request).count
            turn.meter.admitted(prompt, 0)
            yield Progress("prefill", 0, prompt)
            for index in range(request.n if request.echo else 0):
                yield Delta(str(request.prompt), index=index)
            sampling = msgspec.structs.replace(request.sampling, stop=answer.stops)
            sent = msgspec.structs.replace(request, sampling=sampling)
            stream = turn.steps(connected.engine.answer(sent))
            async for event in stream:
                for shown in answer.shown(event):
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
        yield turn.finish(answer.reasons, answer.matched)


async def embed(connected: Connected, request: EmbedRequest) -> AsyncGenerator[Event, None]:
    """Yield a vector for each input, and the Finish.

    Raises:
        HeadraceError: with the figures up to then in its `metrics`.
    """
    guess = sum(estimate(text) if isinstance(text, str) else len(text) for text in request.inputs)
    with Turn(connected, request) as turn:
        turn.require_task()
        prompted = connected.prompts.applied(request)
        raw, usage = await _in_slot(turn, lambda: connected.engine.embed(prompted))
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
    """The choices of one answer: stop strings, calls, counts and finish reasons."""

    def __init__(self, turn: Turn[Connected, GenerateRequest]) -> None:
        request = turn.request
        self.stops = (*request.sampling.stop, *turn.served.stops)
        self.reasons: list[FinishReason] = ["stop"] * request.n
        self._turn = turn
        self._matchers = [StopMatcher(self.stops) for _ in range(request.n)]
        self._counted = 0
        self._whole: list[list[str]] = [[] for _ in range(request.n)]
        self._calls: list[dict[int, tuple[str, list[str]]]] = [{} for _ in range(request.n)]

    async def check(self) -> None:
        """Check each choice that has ended by itself against what the request enforces.

        Raises:
            ConstraintViolated: one does not keep to it.
        """
        request = self._turn.request
        enforces = request.enforces_calls or request.tool_choice.names
        if request.constraint is None and not enforces:
            return
        for index, (reason, matcher) in enumerate(zip(self.reasons, self._matchers, strict=True)):
            if reason == "tool_calls" or (reason == "stop" and matcher.matched is None):
                await self._check_choice(index)

    async def _check_choice(self, index: int) -> None:
        request, calls = self._turn.request, self._calls[index]
        if request.constraint is not None and not calls:
            await self._check_text(request.constraint, "".join(self._whole[index]))
        if request.tool_choice.mode == "required" and not calls:
            raise ConstraintViolated("The upstream calls no tool.", param="tool_choice")
        allowed = {tool.name for tool in request.tool_choice.allowed(request.tools)}
        enforces = request.enforces_calls or request.tool_choice.names
        for name, arguments in calls.values() if enforces else ():
            if name not in allowed:
                raise ConstraintViolated("The upstream calls another tool.", param="tool_choice")
            check = check_call(self._turn.served.compiler, request, name, "".join(arguments))
            await self._turn.within(check)

    async def _check_text(self, constraint: Constraint, text: str) -> None:
        turn = self._turn
        await turn.within(turn.served.compiler.check(constraint, text, cut=False))

    def _note(self, index: int, text: str) -> None:
        self._turn.answered(text)
        if self._turn.request.constraint is not None:
            self._whole[index].append(text)

    @property
    def matched(self) -> list[str | None]:
        """The stop string that was found in each choice."""
        return [matcher.matched for matcher in self._matchers]

    @property
    def is_stopped(self) -> bool:
        """Whether every choice has reached a stop string."""
        return all(matcher.matched is not None for matcher in self._matchers)

    def shown(self, event: RemoteEvent) -> Sequence[Event]:
        """Return the events for the client."""
        if isinstance(event, Delta):
            return self._delta(event)
        if isinstance(event, ToolCallDelta):
            return self._call(event)
        if isinstance(event, RemoteFinish):
            self._finish(event)
            return ()
        return (event,)

    def rest(self) -> list[Event]:
        """Return the text that was held back as the possible beginning of a stop string.

        A call that the limit of tokens has ended within its arguments is none.
        """
        choices = range(len(self._matchers))
        deltas: list[Event] = [delta for index in choices for delta in self._released(index)]
        deltas += [delta for index in choices for delta in self._cut(index)]
        self._turn.meter.called(sum(map(len, self._calls)))
        for index, matcher in enumerate(self._matchers):
            if matcher.matched is not None:
                self.reasons[index] = "stop"
            if self.reasons[index] == "stop" and self._calls[index]:
                # Of a call that a request names, some say that the answer has ended.
                self.reasons[index] = "tool_calls"
        return deltas

    def _cut(self, index: int) -> Iterator[ToolCallDelta]:
        calls = self._calls[index]
        if self.reasons[index] != "length" or not calls:
            return
        last = max(calls)
        text = "".join(calls[last][1])
        try:
            msgspec.json.decode(text)
        except msgspec.DecodeError:
            name, _ = calls.pop(last)
            yield ToolCallDelta(last, index=index, cut=text or name)

    def _finish(self, event: RemoteFinish) -> None:
        self.reasons = list(event.finish_reasons)
        if event.usage is not None:
            usage = self._turn.usage = event.usage
            missing = usage.completion_tokens - self._counted
            self._turn.meter.correct(usage.prompt_tokens, missing, usage.cached_tokens)

    def _released(self, index: int) -> list[Delta]:
        text = self._matchers[index].flush()
        self._note(index, text)
        return [Delta(text, index=index)] if text else []

    def _call(self, delta: ToolCallDelta) -> Sequence[Event]:
        calls, index = self._calls[delta.index], delta.index
        self._counted += 1
        self._turn.meter.delta(1, visible=True)
        released = self._released(index) if delta.name else []
        if self._matchers[index].matched is not None:
            return released
        if delta.call and not self._turn.request.tool_choice.parallel:
            return released
        if delta.name:
            calls[delta.call] = (delta.name, [])
        calls[delta.call][1].append(delta.arguments)
        return (*released, delta)

    def _delta(self, delta: Delta) -> Sequence[Event]:
        matcher, meter = self._matchers[delta.index], self._turn.meter
        if matcher.matched is not None:
            return ()
        # One token for each of its log probabilities, otherwise one for the delta.
        tokens = len(delta.logprobs) or 1
        self._counted += tokens
        meter.delta(tokens, visible=bool(delta.text or delta.reasoning), thinking=not delta.text)
        if delta.reasoning and not delta.text:
            meter.thought(tokens)
        text = matcher.feed(delta.text)
        self._note(delta.index, text)
        shown = Delta(text, delta.token_ids, delta.index, delta.reasoning, delta.logprobs)
        return (shown,) if text or shown.reasoning or shown.logprobs else ()


def _check(connected: Connected, request: GenerateRequest) -> None:
    check_supported(request, connected.facts.capabilities, connected.name)
    if request.n > connected.max_choices:
        raise InvalidRequest("n is too large for this model.", param="n")
    if request.suffix is not None:
        raise Unsupported("A remote model fills no gaps here.", param="suffix")
    if request.line_limits is not None:
        raise Unsupported("A remote model has no limits of lines.", param="line_limits")
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


async def _count(connected: Connected, request: CountRequest) -> TokenCount:
    if request.as_text:
        raise Unsupported("The template of a remote model is not known here.", param="messages")
    return await connected.engine.count_tokens(request)


async def _text(connected: Connected, request: DetokenizeRequest) -> Text:
    raise Unsupported("The tokens of a remote model cannot be read here.", param="tokens")


ANSWERS: Answers = {
    GenerateRequest: generate,
    EmbedRequest: embed,
    RerankRequest: rerank,
    ScoreRequest: score,
    CountRequest: lambda connected, request: unmeasured(request, _count(connected, request)),
    DetokenizeRequest: lambda connected, request: unmeasured(request, _text(connected, request)),
}
