"""Generation, counts and texts of tokens at a local engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from typing import cast

from headrace.core.errors import InvalidRequest
from headrace.core.events import Delta, Event, FinishReason, Progress, Text, TokenCount
from headrace.core.request import CountRequest, DetokenizeRequest, GenerateRequest
from headrace.core.stream import merge
from headrace.engines.base import (
    Admitted,
    Engine,
    Generator,
    Pair,
    RawDelta,
    RawEvent,
)
from headrace.text.pipeline import TextPipeline
from headrace.worker.batching import Batcher
from headrace.worker.prompt import Job, Prompter, check_supported
from headrace.worker.turn import Answers, Served, Turn, unmeasured


class Loaded(Served, frozen=True, kw_only=True):
    """A model loaded by an engine in this process; `thread` runs its batches."""

    engine: Engine
    prompter: Prompter
    embeddings: Batcher[tuple[int, ...], bytes]
    scores: Batcher[Pair, float]
    thread: Executor


async def generate(loaded: Loaded, request: GenerateRequest) -> AsyncGenerator[Event, None]:
    """Yield the whole stream of an answer.

    Raises:
        HeadraceError: with the figures up to then in its `metrics`.
    """
    with Turn(loaded, request) as turn:
        turn.require_task()
        if request.n > loaded.max_choices:
            raise InvalidRequest(f"n is at most {loaded.max_choices} for this model.", param="n")
        await _compile(turn)
        job = await asyncio.to_thread(loaded.prompter.job, request)
        for index in range(request.n if job.echo else 0):
            yield Delta(text=job.echo, index=index)
        choices = [_Choice(turn, index, job) for index in range(request.n)]
        streams = [choice.events() for choice in choices]
        stream = streams[0] if len(streams) == 1 else merge(streams)
        try:
            async for event in stream:
                yield event
        finally:
            await stream.aclose()
        yield turn.finish([choice.reason for choice in choices])


class _Choice:
    """One of a request's choices."""

    def __init__(self, turn: Turn[Loaded, GenerateRequest], index: int, job: Job) -> None:
        self.reason: FinishReason = "stop"
        self._turn = turn
        self._index = index
        self._job = job
        self._request = job.choices[index]
        self._text = TextPipeline(job.stops)
        self._tokens = 0
        self._whole: list[str] | None = None if turn.request.constraint is None else []
        self._least = self._request.sampling.min_tokens or 0

    async def events(self) -> AsyncGenerator[Event, None]:
        """Yield the events of the choice: the text of a continued answer, then new text."""
        opening = self._opening() if self._turn.request.answered else None
        if self._job.over is not None or self._text.stopped:
            self.reason = self._job.over or "stop"
            if opening is not None:
                yield opening
        else:
            await self._turn.take_slot()
            raw: AsyncGenerator[RawEvent, None] | None = None
            try:
                if opening is not None:
                    yield opening
                raw = self._engine_events()
                async for event in raw:
                    self._turn.check()
                    if (shown := self._shown(event)) is not None:
                        yield shown
                    if self._text.stopped:
                        break
            finally:
                if raw is not None:
                    await raw.aclose()
                self._turn.leave_slot()
        if rest := self._text.flush():
            self._note(rest)
            yield Delta(rest, index=self._index)
        if self._text.stopped:
            self.reason = "stop"
        await self._check()

    def _note(self, text: str) -> None:
        self._turn.answered(text)
        if self._whole is not None:
            self._whole.append(text)

    async def _check(self) -> None:
        """Check the text against the constraint of the request.

        Raises:
            ConstraintViolated: it does not keep to it.
        """
        constraint, turn = self._turn.request.constraint, self._turn
        if constraint is None or self._whole is None:
            return
        # The client's own stops can end a text anywhere.
        cut = self.reason == "length" or self._text.stopped
        cut = cut or bool(self._request.sampling.stop_token_ids)
        text = "".join(self._whole)
        await turn.within(turn.served.compiler.check(constraint, text, cut=cut))

    def _opening(self) -> Delta:
        request = self._request
        self._turn.meter.resumed(len(request.token_ids), len(request.answered))
        shown = self._text.feed(self._job.answered_text.encode())
        self._turn.answered(shown)
        return Delta(shown, request.answered)

    def _engine_events(self) -> AsyncGenerator[RawEvent, None]:
        raw = cast("Generator", self._turn.served.engine).generate(self._request)
        # Only a deadline needs a timer around each step.
        return raw if self._turn.request.deadline is None else self._turn.steps(raw)

    def _shown(self, event: RawEvent) -> Event | None:
        meter, prompt_tokens = self._turn.meter, len(self._request.token_ids)
        if isinstance(event, RawDelta):
            tokens = len(event.token_ids)
            self._tokens += tokens
            may_stop = self._tokens >= self._least
            text = (self._text.feed if may_stop else self._text.feed_unstopped)(event.data)
            meter.delta(tokens, visible=bool(text))
            self._note(text)
            return Delta(text, event.token_ids, self._index, "", event.logprobs)
        if isinstance(event, Admitted):
            meter.admitted(prompt_tokens, event.cached)
            return Progress("prefill", event.done, event.total)
        self.reason = event.reason
        missing = event.completion_tokens - self._tokens
        meter.correct(prompt_tokens, missing, event.cached_tokens)
        return None


async def _compile(turn: Turn[Loaded, GenerateRequest]) -> None:
    """Compile the constraint of a request before the engine does, which cannot be stopped.

    Raises:
        Unsupported, InvalidRequest: the engine cannot enforce it.
    """
    request, loaded = turn.request, turn.served
    if request.constraint is None:
        return
    check_supported(request, loaded.facts.capabilities)
    with turn.meter.compiling():
        await turn.within(loaded.compiler.compile(request.constraint, request.client))


async def _count(loaded: Loaded, request: CountRequest) -> TokenCount:
    # Off the event loop, and beside any generation.
    token_ids = await asyncio.to_thread(loaded.prompter.count, request)
    return TokenCount(count=len(token_ids), token_ids=token_ids)


async def _text(loaded: Loaded, request: DetokenizeRequest) -> Text:
    return Text(await asyncio.to_thread(loaded.engine.detokenize, request.token_ids))


ANSWERS: Answers = {
    GenerateRequest: generate,
    CountRequest: lambda loaded, request: unmeasured(request, _count(loaded, request)),
    DetokenizeRequest: lambda loaded, request: unmeasured(request, _text(loaded, request)),
}
