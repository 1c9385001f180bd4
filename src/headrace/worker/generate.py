"""Generation at a local engine."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from typing import cast

import msgspec

from headrace.core.constraint import Constraint
from headrace.core.errors import ConstraintViolated, InvalidRequest
from headrace.core.events import Delta, Event, FinishReason, Progress
from headrace.core.request import GenerateRequest
from headrace.core.stream import merge
from headrace.engines.abilities import PromptScorer
from headrace.engines.base import Admitted, Engine, Generator, Pair, RawDelta, RawDraft, RawEvent
from headrace.text.pipeline import TextPipeline
from headrace.worker.adapters import Adapters
from headrace.worker.batching import Batcher
from headrace.worker.compiler import Compiler
from headrace.worker.inputs import check_call, has_inputs, is_tokenized, with_inputs
from headrace.worker.lines import LineLimiter
from headrace.worker.parts import Output, PartsPipeline
from headrace.worker.prompt import Job, Prompter, max_new_tokens
from headrace.worker.scored import prompt_events
from headrace.worker.turn import Answers, Served, Turn, until_left


class Loaded(Served, frozen=True, kw_only=True):
    """A model loaded by an engine in this process; `thread` runs its batches.

    A request that is answered has the engine's name for its adapter.
    """

    engine: Engine
    adapters: Adapters
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
        if has_inputs(request):
            with turn.meter.compiling():
                request = await turn.within(with_inputs(request, loaded.prompter, loaded.compiler))
        if is_tokenized(request):
            job = loaded.prompter.job(request)
        else:
            with until_left() as gone:
                job = await turn.within(asyncio.to_thread(loaded.prompter.job, request, gone))
        if job.constraint is not None:
            # Before the engine compiles it, which cannot be stopped.
            with turn.meter.compiling():
                job = await turn.within(_enforced(loaded.compiler, job, request))
        if request.prompt_candidates is not None:
            scorer, token_ids = cast("PromptScorer", loaded.engine), job.choices[0].token_ids
            async with aclosing(prompt_events(turn, scorer, token_ids)) as prompt:
                async for event in prompt:
                    yield event
        elif job.over is not None and not request.answered:
            turn.meter.resumed(len(job.choices[0].token_ids), 0)
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
        yield turn.finish([c.reason for c in choices], [c.stop for c in choices])


async def _enforced(compiler: Compiler, job: Job, request: GenerateRequest) -> Job:
    """Return the job of a request with the constraint that the engine enforces.

    Raises:
        InvalidRequest: as `Compiler.compile_for`.
    """
    assert job.constraint is not None
    compiled = await compiler.compile_for(request, job.constraint)
    enforcing = job.enforcing(compiled)
    enforced = enforcing.choices[0].constraint
    if job.before[0] and enforced is not None and enforced is not compiled:
        await compiler.compile(enforced, request.client)
    return enforcing


class _Choice:
    """One of a request's choices."""

    def __init__(self, turn: Turn[Loaded, GenerateRequest], index: int, job: Job) -> None:
        self.reason: FinishReason = "stop"
        self._turn = turn
        self._index = index
        self._job = job
        self._request = job.choices[index]
        self._text = TextPipeline(job.stops)
        limits = turn.request.line_limits
        self._lines = LineLimiter(limits) if limits else None
        self._parts: PartsPipeline | None = None
        if job.splitter is not None:
            request = turn.request
            self._parts = PartsPipeline(
                job.splitter(),
                job.stops,
                request.id,
                index,
                single=not request.tool_choice.parallel,
            )
        self._stops: TextPipeline | PartsPipeline = self._parts or self._text
        self._tokens = self._thought = 0
        self._made: list[int] = []
        self._is_spent = self._has_closed = False
        self._whole: list[str] | None = None if job.constraint is None else []
        self._content: list[str] = []
        # A character can be split over tokens.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._least = self._request.sampling.min_tokens or 0
        self._prompt_tokens = len(self._request.token_ids)
        self._most: int | None = None
        self._think(0)

    @property
    def stop(self) -> str | None:
        """The stop string that ended the choice."""
        return self._stops.matched

    def events(self) -> AsyncGenerator[Event, None]:
        """Return the events of the choice: the text of a continued answer, then new text."""
        opening = self._opening() if self._turn.request.answered else ()
        if self._job.over is None and not self._stops.stopped:
            return self._generated(opening)
        self.reason = self._job.over or "stop"
        return self._ended(opening)

    async def _generated(self, opening: Sequence[Output]) -> AsyncGenerator[Event, None]:
        await self._turn.take_slot()
        raw: AsyncGenerator[RawEvent, None] | None = None
        try:
            events: Sequence[Output] | None = (*opening, *(self._close_thinking() or ()))
            while events is not None:
                for event in events:
                    yield event
                raw = self._engine_events()
                async for event in raw:
                    self._turn.check()
                    for shown in self._shown(event):
                        yield shown
                    if self._stops.stopped or self._is_spent or self._is_full():
                        break
                await raw.aclose()
                events = self._close_thinking()
        finally:
            if raw is not None:
                await raw.aclose()
            self._turn.leave_slot()
        for event in (*self._turn.choice_ended(), *self._rest()):
            yield event
        await self._end()

    async def _ended(self, opening: Sequence[Output]) -> AsyncGenerator[Event, None]:
        """Yield the events of an answer that was complete already."""
        for event in (*opening, *self._rest()):
            yield event
        await self._end()

    def _seen(self, prompt_tokens: int) -> None:
        """Take the tokens of a prompt with images, which only the engine can count.

        Raises:
            ContextOverflow: it is too long.
        """
        self._prompt_tokens = prompt_tokens
        left = max_new_tokens(self._turn.request, prompt_tokens, self._job.context_length)
        # The engine was given what the text alone leaves.
        self._most = left if left < self._request.max_tokens else None

    def _is_full(self) -> bool:
        is_full = self._most is not None and self._tokens >= self._most
        if is_full or (self._lines is not None and self._lines.is_over):
            self.reason, is_full = "length", True
        return is_full

    async def _end(self) -> None:
        if self._stops.stopped:
            self.reason = "stop"
        await self._check()
        if self._parts is not None and self._parts.calls:
            self._turn.meter.called(len(self._parts.calls))
            self.reason = "tool_calls" if self.reason == "stop" else self.reason

    def _rest(self) -> Sequence[Output]:
        """Return the events of what was held back."""
        if self._parts is not None:
            if events := self._parts.flush():
                self._turn.meter.delta(0, visible=True, thinking=_is_thinking(events))
            self._note_parts(self._decoder.decode(b"", final=True), events)
            return events
        rest = self._text.flush()
        if self._lines is not None:
            rest = self._lines.feed(rest) + self._lines.flush()
        self._note(rest)
        return (Delta(rest, index=self._index),) if rest else ()

    def _note(self, text: str) -> None:
        self._turn.answered(text)
        if self._whole is not None:
            self._whole.append(text)

    def _note_parts(self, raw: str, events: Sequence[Output]) -> None:
        """Record the text of tokens: with calls it is checked as it is, else without thinking."""
        self._turn.answered(raw)
        if self._whole is not None and self._job.constraint is not None:
            content = "".join(event.text for event in events if isinstance(event, Delta))
            self._content.append(content)
            self._whole.append(raw if self._job.constraint.lark else content)

    async def _check(self) -> None:
        """Check the text against the constraint of the request.

        Raises:
            ConstraintViolated: it does not keep to it.
        """
        constraint, turn = self._job.constraint, self._turn
        if constraint is None or self._whole is None:
            return
        # The client's own stops can end a text anywhere.
        cut = self.reason == "length" or self._stops.stopped
        cut = cut or bool(self._request.sampling.stop_token_ids)
        text, check, request = "".join(self._whole), turn.served.compiler.check, turn.request
        if turn.served.prompter.enforces_grammars or not request.enforces_calls:
            # A text with calls ends at a token that has none.
            await turn.within(check(constraint, text, cut=cut or request.enforces_calls))
        if self._parts is None:
            return
        if not self._parts.calls:
            await self._check_without_calls(cut=cut)
        for name, arguments in self._parts.calls:
            await turn.within(check_call(turn.served.compiler, request, name, arguments))

    async def _check_without_calls(self, *, cut: bool) -> None:
        turn = self._turn
        request, form = turn.request, turn.request.constraint
        if request.tool_choice.mode == "required":
            if not cut:
                raise ConstraintViolated("The answer calls no tool.", param="tool_choice")
        elif form is not None and request.enforces_calls and not cut:
            content = "".join(self._content)
            await turn.within(turn.served.compiler.check(form, content, cut=False))

    def _opening(self) -> Sequence[Output]:
        request, text = self._request, self._job.answered_text
        self._turn.meter.resumed(len(request.token_ids), len(request.answered))
        if self._parts is not None:
            events = self._parts.feed(text.encode())
            self._think(self._job.answered_thought)
            return [Delta("", request.answered, self._index), *events]
        shown = self._text.feed(text.encode())
        if self._lines is not None:
            shown = self._lines.feed(shown)
        self._turn.answered(shown)
        return (Delta(shown, request.answered),)

    def _split(self, parts: PartsPipeline, raw: RawDelta, *, may_stop: bool) -> Sequence[Output]:
        """Return the events of new tokens; the first has their ids."""
        meter, was_thinking = self._turn.meter, parts.is_thinking
        events = parts.feed(raw.data, may_stop=may_stop)
        self._note_parts(self._decoder.decode(raw.data), events)
        if was_thinking or parts.is_thinking:
            thinking = _is_thinking(events)
            meter.delta(len(raw.token_ids), visible=bool(events), thinking=thinking)
            self._think(len(raw.token_ids))
        else:
            meter.delta(len(raw.token_ids), visible=bool(events))
        if self._job.budget is not None:
            self._made += raw.token_ids
        if events and isinstance(first := events[0], Delta):
            events[0] = Delta(first.text, raw.token_ids, self._index, first.reasoning, raw.logprobs)
            return events
        return (Delta("", raw.token_ids, self._index, "", raw.logprobs), *events)

    def _think(self, tokens: int) -> None:
        """Count tokens of thinking, and note whether its budget is spent."""
        self._turn.meter.thought(tokens)
        self._thought += tokens
        if (budget := self._job.budget) is not None and self._parts is not None:
            self._is_spent = self._parts.is_thinking and self._thought >= budget.tokens

    def _close_thinking(self) -> Sequence[Output] | None:
        """Return the events of the text that closes the thinking, once its budget is spent.

        The engine's next request goes on after it. None if the answer is over.
        """
        budget, request, parts = self._job.budget, self._request, self._parts
        if not self._is_spent or budget is None or parts is None or parts.stopped:
            return None
        left = request.max_tokens - self._tokens - len(budget.token_ids)
        if left < 1:
            self.reason = "length"
            return None
        self._least = max(0, self._least - self._tokens)
        self._request = msgspec.structs.replace(
            request,
            answered=(*request.answered, *self._made, *budget.token_ids),
            max_tokens=left,
            constraint=budget.enforced if self._turn.request.enforces_calls else self._enforced,
            sampling=msgspec.structs.replace(request.sampling, min_tokens=self._least or None),
        )
        self._tokens, self._made, self._is_spent, self._has_closed = 0, [], False, True
        self._turn.meter.delta(len(budget.token_ids), visible=False)
        events = parts.feed(budget.text.encode())
        self._note_parts(budget.text, events)
        return (Delta("", budget.token_ids, self._index), *events)

    @property
    def _enforced(self) -> Constraint | None:
        """What the engine enforces of the content, without thinking before it."""
        able = self._turn.served.facts.capabilities.json_schema
        return self._job.compiled if able else None

    def _within_budget(self, raw: RawDelta) -> RawDelta:
        """Return the tokens that the budget of the thinking has left, of a delta with several."""
        budget, parts = self._job.budget, self._parts
        if budget is None or parts is None or not parts.is_thinking:
            return raw
        left = budget.tokens - self._thought
        if len(raw.token_ids) <= left or budget.text.strip() in raw.data.decode(errors="replace"):
            return raw
        engine = cast("Generator", self._turn.served.engine)
        kept = raw.token_ids[:left]
        while (text := engine.shown(kept, self._request.visible)).endswith("\ufffd"):
            kept = kept[:-1]
        return RawDelta(text.encode(), kept, raw.logprobs[: len(kept)])

    def _engine_events(self) -> AsyncGenerator[RawEvent, None]:
        raw = cast("Generator", self._turn.served.engine).generate(self._request)
        # Only a deadline needs a timer around each step.
        return raw if self._turn.request.deadline is None else self._turn.steps(raw)

    def _shown(self, event: RawEvent) -> Sequence[Event]:
        meter = self._turn.meter
        if isinstance(event, RawDelta):
            tokens = len(event.token_ids)
            if tokens > 1:
                event = self._within_budget(event)
                tokens = len(event.token_ids)
            self._tokens += tokens
            may_stop = self._tokens >= self._least
            if self._parts is not None:
                return self._split(self._parts, event, may_stop=may_stop)
            text = (self._text.feed if may_stop else self._text.feed_unstopped)(event.data)
            if self._lines is not None:
                text = self._lines.feed(text)
            meter.delta(tokens, visible=bool(text))
            self._note(text)
            return (Delta(text, event.token_ids, self._index, "", event.logprobs),)
        if isinstance(event, Admitted):
            if self._request.media and event.total:
                self._seen(event.total)
            if not self._has_closed:
                meter.admitted(self._prompt_tokens, event.cached)
            return (Progress("prefill", event.done, event.total),)
        if isinstance(event, RawDraft):
            meter.drafted(event.drafted, event.accepted)
            return ()
        self.reason = event.reason
        missing = event.completion_tokens - self._tokens
        if self._request.media:
            self._prompt_tokens = event.prompt_tokens
        cached = 0 if self._has_closed else event.cached_tokens
        meter.correct(self._prompt_tokens, missing, cached)
        return ()


def _is_thinking(events: Sequence[Output]) -> bool:
    """Whether there is neither text nor a call."""
    return all(isinstance(event, Delta) and not event.text for event in events)


ANSWERS: Answers = {GenerateRequest: generate}
