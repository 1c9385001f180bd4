"""Turns the text of one choice into events: content, thinking and calls of tools."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from headrace.core.events import Delta, ToolCallDelta
from headrace.text.calls.parts import (
    CallArguments,
    CallStart,
    Content,
    Cut,
    Part,
    Thought,
)
from headrace.text.calls.splitter import Splitter
from headrace.text.pipeline import StopMatcher, Utf8Decoder

Output = Delta | ToolCallDelta


def call_id(request: str, index: int, number: int) -> str:
    """Return the id of a call: the same when an answer is computed again."""
    digest = hashlib.blake2b(f"{request} {index} {number}".encode(), digest_size=12)
    return f"call_{digest.hexdigest()}"


def thought_tokens(splitter: Callable[[], Splitter], size: int, shown: Callable[[int], str]) -> int:
    """Return how many of the `size` tokens of an answer are thinking, which comes first.

    `shown` gives the text of the first tokens.
    """

    def thinking(count: int) -> tuple[bool, bool]:
        """Whether there has been any in so many tokens, and whether they end within it."""
        parser = splitter()
        parts = parser.feed("") + parser.feed(shown(count))
        return any(isinstance(part, Thought) for part in parts), parser.is_thinking

    has_thought, is_open = thinking(size)
    if not (has_thought or is_open):
        return 0
    counts = range(size + 1)
    first = bisect_left(counts, True, key=lambda count: any(thinking(count)))
    last = size
    if not is_open:
        last = bisect_left(counts, True, key=lambda count: thinking(count) == (True, False))
    return last - max(0, first - 1)


class PartsPipeline:
    """Bytes of one choice become events. Stop strings are searched in the content only.

    `request` and `index` make the ids of calls that the model gives none. With `single` the answer
    ends with its first call. `calls` are those that are complete: name and arguments.
    `is_thinking` is whether the bytes so far end within thinking.
    """

    def __init__(
        self, splitter: Splitter, stops: Sequence[str], request: str, index: int, *, single: bool
    ) -> None:
        self.calls: list[tuple[str, str]] = []
        splitter.feed("")
        self.is_thinking = splitter.is_thinking
        self._is_calling = False
        self._splitter = splitter
        self._decoder = Utf8Decoder()
        self._matcher = StopMatcher(stops)
        self._request = request
        self._index = index
        self._single = single
        self._name = ""
        self._arguments: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether the answer has ended before its model ended it; read it after `flush` too."""
        return self._matcher.matched is not None or (self._single and bool(self.calls))

    @property
    def matched(self) -> str | None:
        """The stop string that was found."""
        return self._matcher.matched

    def feed(self, data: bytes, *, may_stop: bool = True) -> list[Output]:
        """Return the events of new bytes."""
        parts = self._splitter.feed(self._decoder.feed(data))
        events = self._events(parts, may_stop=may_stop)
        self.is_thinking = self._splitter.is_thinking and not self._is_calling
        return events

    def flush(self) -> list[Output]:
        """End the answer and return the events of what was held back."""
        parts = self._splitter.feed(self._decoder.flush()) + self._splitter.flush()
        events = self._events(parts, may_stop=True)
        if rest := self._matcher.flush():
            events.append(Delta(rest, index=self._index))
        return events

    def _events(self, parts: Sequence[Part], *, may_stop: bool) -> list[Output]:
        return [event for part in parts for event in self._event(part, may_stop=may_stop)]

    def _event(self, part: Part, *, may_stop: bool) -> Iterator[Output]:
        if self.stopped:
            return
        if isinstance(part, Content):
            if text := self._matcher.feed(part.text) if may_stop else part.text:
                yield Delta(text, index=self._index)
        elif isinstance(part, Thought):
            yield Delta(reasoning=part.text, index=self._index)
        elif isinstance(part, CallStart):
            if rest := self._matcher.flush():
                yield Delta(rest, index=self._index)
            if self.stopped:
                return
            self._name, self._arguments, self._is_calling = part.name, [], True
            identity = part.id or call_id(self._request, self._index, part.index)
            yield ToolCallDelta(part.index, identity, part.name, index=self._index)
        elif isinstance(part, CallArguments):
            self._arguments.append(part.text)
            yield ToolCallDelta(part.index, arguments=part.text, index=self._index)
        elif isinstance(part, Cut):
            yield ToolCallDelta(part.index, index=self._index, cut=part.text)
        else:
            self.calls.append((self._name, "".join(self._arguments)))
            self._is_calling = False
