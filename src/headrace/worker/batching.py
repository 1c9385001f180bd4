"""Dynamic batches: the items of all requests that wait go through the engine together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import Generic, NamedTuple, TypeVar

from headrace.core.errors import HeadraceError, OutOfMemory
from headrace.engines.base import Engine

Item = TypeVar("Item")
Result = TypeVar("Result")

OnStep = Callable[[int, int], None]
"""Called with how many of a request's items are done, and of how many."""


class BatchLimits(NamedTuple):
    """How much goes through an engine at once; tokens count with the padding.

    A batch is padded to its longest. `padding` is the tokens that take as long as beginning a
    batch does: what would bring more padding than that is better off in a batch of its own.
    """

    items: int = 32
    tokens: int = 16384
    padding: int = 256


def limits_of(engine: Engine) -> BatchLimits:
    """Return what the engine says in `batch_items`, `_tokens` and `_padding`, where it does."""
    usual = BatchLimits()
    return BatchLimits(
        getattr(engine, "batch_items", None) or usual.items,
        getattr(engine, "batch_tokens", None) or usual.tokens,
        getattr(engine, "batch_padding", None) or usual.padding,
    )


class _Ticket(Generic[Item, Result]):
    """One request: its items, of which the longest comes next, and their results."""

    def __init__(self, items: Sequence[Item], order: list[int], on_step: OnStep) -> None:
        self.items = items
        self.order = order
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


class Batcher(Generic[Item, Result]):
    """Runs batches one after another on a thread, each as soon as the one before is over.

    Nobody waits for company: what has come meanwhile goes next. Requests take turns, item by
    item, and each gives its longest items first. A batch that fails is halved, as long as it holds
    several requests or is too large for the memory: a bad item fails its own request alone.
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
        self._waiting: deque[_Ticket[Item, Result]] = deque()
        self._batches: deque[list[tuple[_Ticket[Item, Result], int]]] = deque()
        self._open: set[_Ticket[Item, Result]] = set()
        self._busy = False

    async def submit(self, items: Sequence[Item], on_step: OnStep) -> list[Result]:
        """Return the results, in order. A caller that is cancelled leaves the queue at once.

        Raises:
            Exception: what the engine raises for one of the items.
        """
        order = sorted(range(len(items)), key=lambda index: self._length(items[index]))
        ticket = _Ticket[Item, Result](items, order, on_step)
        self._waiting.append(ticket)
        self._open.add(ticket)
        self._go()
        try:
            await ticket.over
        finally:
            ticket.over.cancel()
            self._open.discard(ticket)
        return [ticket.results[index] for index in range(len(items))]

    def abort(self, error: HeadraceError) -> None:
        """End all that wait or run."""
        for ticket in self._open:
            ticket.fail(error)

    def _go(self) -> None:
        if self._busy or not (batch := self._next()):
            return
        self._busy = True
        _tell(batch)
        items = [ticket.items[index] for ticket, index in batch]
        running = asyncio.get_running_loop().run_in_executor(self._thread, self._run, items)
        running.add_done_callback(lambda done: self._ended(batch, done))

    def _next(self) -> list[tuple[_Ticket[Item, Result], int]]:
        while self._batches or self._waiting:
            if not self._batches:
                self._collect()
            while self._batches:
                batch = self._batches.popleft()
                if alive := [one for one in batch if not one[0].over.done()]:
                    return alive
        return []

    def _collect(self) -> None:
        window: list[tuple[_Ticket[Item, Result], int]] = []
        while self._waiting and len(window) < self._limits.items:
            ticket = self._waiting.popleft()
            if ticket.over.done():
                continue
            window.append((ticket, ticket.order.pop()))
            if ticket.order:
                self._waiting.append(ticket)
        longest = padding = 0
        for one in sorted(window, key=self._tokens, reverse=True):
            size = self._tokens(one)
            room = self._batches and (len(self._batches[-1]) + 1) * longest <= self._limits.tokens
            padding += longest - size
            if room and padding <= self._limits.padding:
                self._batches[-1].append(one)
            else:
                longest, padding = size, 0
                self._batches.append([one])

    def _tokens(self, one: tuple[_Ticket[Item, Result], int]) -> int:
        return self._length(one[0].items[one[1]])

    def _ended(
        self,
        batch: list[tuple[_Ticket[Item, Result], int]],
        done: asyncio.Future[Sequence[Result]],
    ) -> None:
        self._busy = False
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        if error is None:
            for (ticket, index), result in zip(batch, done.result(), strict=True):
                ticket.put(index, result)
            _tell(batch)
        elif len(batch) > 1 and _may_halve(error, (ticket for ticket, _ in batch)):
            half = len(batch) // 2
            self._batches.extendleft((batch[half:], batch[:half]))
        else:
            for ticket, _ in batch:
                ticket.fail(error)
        self._go()


def _may_halve(error: BaseException, tickets: Iterable[object]) -> bool:
    return len(set(tickets)) > 1 or isinstance(error, OutOfMemory | MemoryError)


def _tell(batch: Sequence[tuple[_Ticket[Item, Result], int]]) -> None:
    for ticket in {ticket for ticket, _ in batch}:
        ticket.on_step(len(ticket.results), len(ticket.items))
