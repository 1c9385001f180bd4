"""Requests of different adapters take turns: a batch of llama.cpp has one adapter.

Its server computes the batch of its first busy slot and of those with the same adapter, and all
others wait until no such slot is busy, for as long as requests come. So requests of one adapter run
while no other waits, and those that run for long are paused: their streams are closed, and go on
after the tokens that they have once their adapter has its turn again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager

import msgspec

from headrace.engines.base import Admitted, EngineRequest, RawDelta, RawEvent, RawFinish

SLICE_S = 10.0
"""Seconds for which a request writes before it is paused for requests of another adapter."""
_PREFILLS = 3
"""It writes for as many times as long as its prompt has taken: to go on it is computed again."""

Start = Callable[[EngineRequest], AsyncGenerator[RawEvent, None]]


class Turn:
    """The turn of one running request."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._begun = groups.clock()
        self._ends: float | None = None

    def is_over(self) -> bool:
        """Whether it has written for long enough, and others wait; called with each delta."""
        now = self._groups.clock()
        if self._ends is None:
            self._ends = now + max(self._groups.slice_s, _PREFILLS * (now - self._begun))
        return self._groups.others_wait and now >= self._ends


class Groups:
    """Runs requests of one adapter at a time, in the order in which their groups came.

    Requests of the group that runs begin at once, until one of another group waits; from then on
    those that run end or pause, and the first that waits begins with all others of its group.
    """

    def __init__(
        self, slice_s: float = SLICE_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.slice_s, self.clock = slice_s, clock
        self._current = ""
        self._running = 0
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()

    @property
    def others_wait(self) -> bool:
        """Whether requests of another group wait; there is always one of those if any waits."""
        return bool(self._waiting)

    @asynccontextmanager
    async def turn(self, adapter: str) -> AsyncGenerator[Turn]:
        """Wait until requests of an adapter may run, and hold the place of one."""
        if self._running and (self._waiting or adapter != self._current):
            await self._wait(adapter)
        else:
            self._current = adapter
            self._running += 1
        try:
            yield Turn(self)
        finally:
            self._running -= 1
            self._next()

    async def _wait(self, adapter: str) -> None:
        entry = (adapter, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        try:
            await entry[1]
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:
                self._running -= 1
            self._next()
            raise

    def _next(self) -> None:
        """Begin a group if none runs, or if none of another group waits any more."""
        if not self._waiting:
            return
        if not self._running:
            self._current = self._waiting[0][0]
        elif any(adapter != self._current for adapter, _ in self._waiting):
            return
        begun = [entry for entry in self._waiting if entry[0] == self._current]
        self._waiting = deque(entry for entry in self._waiting if entry[0] != self._current)
        for _, future in begun:
            self._running += 1
            future.set_result(None)


async def in_turns(
    groups: Groups, request: EngineRequest, start: Start
) -> AsyncGenerator[RawEvent, None]:
    """Yield the events of a request, which is paused for those of other adapters.

    `start` begins it, or a request for the rest of its answer.
    """
    answer = _Answer(request)
    while True:
        async with groups.turn(request.adapter) as turn, aclosing(start(answer.rest())) as events:
            async for event in events:
                if type(event) is RawDelta and answer.may_pause and turn.is_over():
                    # It is computed again. One that was sent could be the last.
                    break
                if (new := answer.new(event)) is not None:
                    yield new
            else:
                return


class _Answer:
    """An answer that goes on after pauses: what of it exists, and its first counts."""

    def __init__(self, request: EngineRequest) -> None:
        self._request = request
        self._made: list[int] = []
        self._before, self._pauses = 0, -1
        self._cached = 0
        # Neither a grammar nor pictures can be taken up in the middle.
        self._simple = request.constraint is None and not request.media

    @property
    def may_pause(self) -> bool:
        """Whether it has new tokens, after which it can go on."""
        return self._simple and len(self._made) > self._before

    def rest(self) -> EngineRequest:
        """Return the request for what follows the tokens that exist."""
        self._pauses += 1
        self._before = len(self._made)
        return msgspec.structs.replace(
            self._request,
            answered=(*self._request.answered, *self._made),
            max_tokens=self._request.max_tokens - len(self._made),
        )

    def new(self, event: RawEvent) -> RawEvent | None:
        """Return an event as one of the whole answer; None for what the client has seen."""
        if type(event) is RawDelta:
            self._made += event.token_ids
        elif isinstance(event, Admitted):
            if self._pauses:
                return None
            self._cached = event.cached
        elif isinstance(event, RawFinish) and self._pauses:
            return msgspec.structs.replace(
                event,
                prompt_tokens=event.prompt_tokens - self._before,
                completion_tokens=event.completion_tokens + self._before,
                cached_tokens=self._cached,
            )
        return event
