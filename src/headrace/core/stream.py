"""Functions on streams of events: prime, collect, merge."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from typing import Generic, TypeVar

import msgspec

from headrace.core.errors import GenerationFailed, HeadraceError
from headrace.core.events import (
    Choice,
    Delta,
    EmbedResult,
    Event,
    Finish,
    FinishReason,
    GenerateResult,
    Progress,
    PromptTokens,
    Ranking,
    RerankResult,
    Text,
    TokenCount,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Vectors,
)

Stream = AsyncGenerator[Event, None]
_Part = PromptTokens | Delta | ToolCallDelta
T = TypeVar("T")
E = TypeVar("E", bound=Event)


class Mailbox(Generic[T]):
    """A queue for one reader on the same event loop, cheaper than asyncio.Queue."""

    __slots__ = ("_items", "_loop", "_reader")

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        # Not asked for at each wait: in Python 3.11 that is a system call.
        self._loop = asyncio.get_running_loop()
        self._reader: asyncio.Future[None] | None = None

    def put(self, item: T) -> None:
        """Add an item, on the thread of the event loop."""
        self._items.append(item)
        reader = self._reader
        if reader is not None and not reader.done():
            reader.set_result(None)

    async def get(self) -> T:
        """Return the next item in order."""
        while not self._items:
            await self.filled()
        return self._items.popleft()

    def filled(self) -> asyncio.Future[None]:
        """Return what is done at the next `put`. Awaited while there are no items.

        With `take` it spares a reader of every token the coroutine of `get`.
        """
        self._reader = self._loop.create_future()
        return self._reader

    def take(self) -> T:
        """Return the next item in order, of those that there are."""
        return self._items.popleft()

    def __len__(self) -> int:
        """Return the number of unread items."""
        return len(self._items)


class Primed:
    """A stream whose first event is being read; `first` is the future of that event.

    `progress` is the latest progress before it. Read `first`, then the rest of `stream`; call
    `aclose` at the end in any case.
    """

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.progress: Progress | None = None
        self.first: asyncio.Future[Event] = asyncio.ensure_future(self._first())

    async def settled(self, wait_s: float | None = None) -> bool:
        """Wait for the first event or an error; return whether there is either."""
        await asyncio.wait({self.first}, timeout=wait_s)
        return self.first.done()

    async def aclose(self) -> None:
        """Cancel the read, and close the stream."""
        self.first.cancel()
        await asyncio.wait({self.first})
        if not self.first.cancelled():
            self.first.exception()
        await self.stream.aclose()

    async def _first(self) -> Event:
        try:
            async for event in self.stream:
                if not isinstance(event, Progress):
                    return event
                self.progress = event
            raise GenerationFailed("The stream ended without an event.")
        finally:
            # An exception refers to this frame: without this it would be a reference cycle.
            del self


async def prime(stream: Stream, wait_s: float | None = None) -> Primed:
    """Read the first event of a stream, before a response is started.

    An error of the load or the queue is raised here, while the status can still be chosen. After
    `wait_s` seconds without an event the stream is returned as it is.
    """
    primed = Primed(stream)
    try:
        if await primed.settled(wait_s):
            primed.first.result()
    except BaseException:
        await primed.aclose()
        del primed
        raise
    return primed


async def within(timeout_s: float, work: Awaitable[object]) -> bool:
    """Wait for the end of some work, and return whether it came in time; else it is cancelled.

    For what is cleaned up in a cancelled task: before Python 3.11.4, `asyncio.timeout` raises
    CancelledError there, and not TimeoutError.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
    finally:
        task.cancel()
        await asyncio.wait({task})
    if done:
        task.result()
    return bool(done)


async def collect(stream: Stream) -> GenerateResult:
    """Collect a stream into one result, and close it.

    Raises:
        GenerationFailed: the stream ended without a Finish.
        HeadraceError: raised by the stream; its `choices` are what came before.
    """
    parts: dict[int, list[_Part]] = {}
    try:
        async for event in stream:
            if isinstance(event, _Part):
                parts.setdefault(event.index, []).append(event)
            elif isinstance(event, Finish):
                return _result(parts, event)
        raise GenerationFailed("The stream ended without a Finish.")
    except HeadraceError as error:
        # An error without an answer may be shared by the requests that waited.
        if parts:
            error.choices = tuple(_choice(index, parts[index], "error") for index in sorted(parts))
        raise
    finally:
        await stream.aclose()


async def result(stream: Stream, kind: type[E]) -> tuple[E, Finish]:
    """Return the one event of `kind` and the Finish of a stream, and close it.

    Raises:
        GenerationFailed: the stream ended without them.
        HeadraceError: raised by the stream.
    """
    answer: E | None = None
    try:
        async for event in stream:
            if isinstance(event, kind):
                answer = event
            elif isinstance(event, Finish) and answer is not None:
                return answer, event
    finally:
        await stream.aclose()
    raise GenerationFailed(f"The stream ended without {kind.__name__} and a Finish.")


async def collect_vectors(stream: Stream) -> EmbedResult:
    """Collect the stream of an EmbedRequest into one result, and close it; raises as `result`."""
    made, finish = await result(stream, Vectors)
    return EmbedResult(
        vectors=made.vectors,
        dimensions=made.dimensions,
        usage=finish.usage,
        metrics=finish.metrics,
    )


async def collect_ranking(stream: Stream) -> RerankResult:
    """Collect the stream of a RerankRequest into one result, and close it; raises as `result`."""
    ranked, finish = await result(stream, Ranking)
    return RerankResult(ranking=ranked.ranking, usage=finish.usage, metrics=finish.metrics)


async def collect_count(stream: Stream) -> TokenCount:
    """Return the one event of a CountRequest's stream, and close it; raises as `result`."""
    return (await result(stream, TokenCount))[0]


async def collect_text(stream: Stream) -> str:
    """Return the text of a DetokenizeRequest's stream, and close it; raises as `result`."""
    return (await result(stream, Text))[0].text


async def without_thinking(stream: Stream) -> Stream:
    """Yield the events of a stream without the text of its thinking, and close it.

    The tokens of thinking stay counted; their log probabilities, which spell it, are left out.
    """
    async with aclosing(stream):
        async for event in stream:
            if isinstance(event, Delta) and event.reasoning:
                scored = event.logprobs if event.text else ()
                yield Delta(event.text, event.token_ids, event.index, logprobs=scored)
            else:
                yield event


def _result(parts: dict[int, list[_Part]], finish: Finish) -> GenerateResult:
    stops = finish.stops or (None,) * len(finish.finish_reasons)
    choices = tuple(
        _choice(index, parts.get(index, ()), reason, stop)
        for index, (reason, stop) in enumerate(zip(finish.finish_reasons, stops, strict=True))
    )
    return GenerateResult(choices=choices, usage=finish.usage, metrics=finish.metrics)


def _choice(
    index: int, parts: Sequence[_Part], reason: FinishReason, stop: str | None = None
) -> Choice:
    deltas = [part for part in parts if isinstance(part, Delta)]
    prompts = [part for part in parts if isinstance(part, PromptTokens)]
    logprobs: list[TokenLogprob] = []
    token_ids: list[int] = []
    for delta in deltas:
        logprobs += delta.logprobs
        token_ids += delta.token_ids
    return Choice(
        index=index,
        text="".join(part.cut if isinstance(part, ToolCallDelta) else part.text for part in parts),
        reasoning="".join(delta.reasoning for delta in deltas),
        tool_calls=_calls([part for part in parts if isinstance(part, ToolCallDelta)], reason),
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        prompt_tokens=tuple(token for part in prompts for token in part.tokens),
        finish_reason=reason,
        stop=stop,
    )


def _calls(parts: Sequence[ToolCallDelta], reason: FinishReason) -> tuple[ToolCall, ...]:
    calls: dict[int, ToolCall] = {}
    arguments: dict[int, list[str]] = {}
    for part in parts:
        if part.name:
            calls[part.call] = ToolCall(part.id, part.name, "")
        if part.cut:
            del calls[part.call]
        arguments.setdefault(part.call, []).append(part.arguments)
    whole = [
        msgspec.structs.replace(call, arguments="".join(arguments[number]))
        for number, call in sorted(calls.items())
    ]
    # The last one may have been cut.
    if whole and reason == "length" and not _is_json(whole[-1].arguments):
        whole.pop()
    return tuple(whole)


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


async def merge(streams: Sequence[Stream]) -> Stream:
    """Yield the events of several streams as they arrive; the first error ends them all."""
    pending = {asyncio.ensure_future(anext(stream, None)): stream for stream in streams}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                stream, event = pending.pop(task), task.result()
                if event is not None:
                    yield event
                    pending[asyncio.ensure_future(anext(stream, None))] = stream
    finally:
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)
        for task in pending:
            # Retrieved, or asyncio would log an exception that was never retrieved.
            _ = task.cancelled() or task.exception()
        for stream in streams:
            await stream.aclose()
