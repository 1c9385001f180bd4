"""Dynamic batches: the items of all requests that wait go through the engine together."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from heapq import merge
from typing import Generic, TypeVar

from headrace.core.errors import HeadraceError, OutOfMemory
from headrace.engines.base import BatchLimits

Item = TypeVar("Item")
Result = TypeVar("Result")

OnStep = Callable[[int, int], None]
"""Called with the number of finished items of a request, and of all its items."""


class _Ticket(Generic[Item, Result]):
    """A request: its items and results; `left` has (length, index) of the rest, shortest first."""

    def __init__(self, items: Sequence[Item], left: list[tuple[int, int]], on_step: OnStep) -> None:
        self.items = items
        self.left = left
        self.results: dict[int, Result] = {}
        self.on_step = on_step
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def put(self, index: int, result: Result) -> None:
        self.results[index] = result
        if len(self.results) == len(self.items) and not self.over.done():
            self.over.set_result(None)

    def fail(self, error: BaseException) -> None:
        if not self.over.done():
            self.over.set_exception(error)


_Batch = list[tuple[_Ticket[Item, Result], int]]


class Batcher(Generic[Item, Result]):
    """Runs batches on a thread, one after another.

    A batch starts as soon as the previous one has ended, with the items that are there. Requests
    take turns: the next request contributes its longest item, and the items of all requests that
    are nearest to it in length are added. A batch that fails is split in half while it holds
    several requests or is too large for the memory, so that a bad item fails its own request alone.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        length: Callable[[Item], int],
        limits: BatchLimits,
        thread: Executor,
    ) -> None:
        self._run = run
        self._length = length
        self._limits = limits
        self._thread = thread
        self._waiting: dict[_Ticket[Item, Result], None] = {}  # in the order of their turns
        self._halves: deque[_Batch[Item, Result]] = deque()
        self._open: set[_Ticket[Item, Result]] = set()
        self._busy = False

    async def submit(self, items: Sequence[Item], on_step: OnStep) -> list[Result]:
        """Return the results, in order. Cancelling the caller removes its items from the queue.

        Raises:
            Exception: the engine failed for one of the items.
        """
        left = sorted((self._length(item), index) for index, item in enumerate(items))
        ticket = _Ticket[Item, Result](items, left, on_step)
        self._waiting[ticket] = None
        self._open.add(ticket)
        self._start_next()
        try:
            await ticket.over
        finally:
            ticket.over.cancel()
            self._open.discard(ticket)
            self._waiting.pop(ticket, None)
        return [ticket.results[index] for index in range(len(items))]

    def abort(self, error: HeadraceError) -> None:
        """Fail all requests, waiting and running."""
        for ticket in self._open:
            ticket.fail(error)

    def _start_next(self) -> None:
        if self._busy or not (batch := self._next()):
            return
        self._busy = True
        _report(batch)
        items = [ticket.items[index] for ticket, index in batch]
        running = asyncio.get_running_loop().run_in_executor(self._thread, self._run, items)
        running.add_done_callback(lambda done: self._ended(batch, done))

    def _next(self) -> _Batch[Item, Result]:
        while self._halves:
            if alive := [item for item in self._halves.popleft() if not item[0].over.done()]:
                return alive
        waiting = [ticket for ticket in self._waiting if not ticket.over.done()]
        batch = self._collect(waiting) if waiting else []
        taken: dict[_Ticket[Item, Result], set[int]] = {}
        for ticket, index in batch:
            taken.setdefault(ticket, set()).add(index)
        for ticket, indices in taken.items():
            ticket.left = [item for item in ticket.left if item[1] not in indices]
            # Requests that arrive while this batch runs come before its next turn.
            del self._waiting[ticket]
        return batch

    def _collect(self, waiting: Sequence[_Ticket[Item, Result]]) -> _Batch[Item, Result]:
        """Return the items of the next batch, longest first."""
        items, tokens, most = self._limits
        middle = longest = waiting[0].left[-1][0]
        batch: list[tuple[int, int, int]] = []
        padding = 0
        for _, _, turn, length, index in _nearest(waiting, middle, items):
            size = max(longest, length)
            more = (size - longest) * len(batch) + size - length
            if not batch or (padding + more <= most and (len(batch) + 1) * size <= tokens):
                longest, padding = size, padding + more
                batch.append((-length, turn, index))
            elif length <= longest:
                break
            if len(batch) == items:
                break
        return [(waiting[turn], index) for _, turn, index in sorted(batch)]

    def _ended(self, batch: _Batch[Item, Result], done: asyncio.Future[Sequence[Result]]) -> None:
        self._busy = False
        for ticket, _ in batch:
            if ticket.left and not ticket.over.done():
                self._waiting[ticket] = None
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if error is None:
            for (ticket, index), result in zip(batch, done.result(), strict=True):
                ticket.put(index, result)
            _report(batch)
        elif len(batch) > 1 and _may_halve(error, (ticket for ticket, _ in batch)):
            half = len(batch) // 2
            self._halves.extendleft((batch[half:], batch[:half]))
        else:
            for ticket, _ in batch:
                ticket.fail(error)
        self._start_next()


def _nearest(
    waiting: Sequence[_Ticket[Item, Result]], middle: int, most: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (distance, position, turn, length, index) of items, nearest in length first.

    Items at an equal distance alternate between the tickets. At most `most` items of a ticket are
    taken on either side.
    """
    sides: list[Iterable[tuple[int, int, int, int, int]]] = []
    for turn, ticket in enumerate(waiting):
        at = bisect_right(ticket.left, (middle, len(ticket.items)))
        for side in (ticket.left[max(0, at - most) : at][::-1], ticket.left[at : at + most]):
            if side:
                sides.append(_walk(side, middle, turn))
    return merge(*sides)


def _walk(
    side: Sequence[tuple[int, int]], middle: int, turn: int
) -> Iterator[tuple[int, int, int, int, int]]:
    for count, (length, index) in enumerate(side):
        yield abs(length - middle), count, turn, length, index


def _may_halve(error: BaseException, tickets: Iterable[object]) -> bool:
    return len(set(tickets)) > 1 or isinstance(error, OutOfMemory | MemoryError)


def _report(batch: Sequence[tuple[_Ticket[Item, Result], int]]) -> None:
    for ticket in {ticket for ticket, _ in batch}:
        ticket.on_step(len(ticket.results), len(ticket.items))
