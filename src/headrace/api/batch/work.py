"""Sends the requests of a batch, several at a time, until each has an answer that stands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec

from headrace.api.batch.lines import Answer, Item, Response, plain

T = TypeVar("T")

MAX_AT_A_TIME = 256
"""Requests of a batch that are sent at a time."""

MAX_BYTES = 32 << 20
"""Bytes of their bodies; a longer one is sent alone."""

_COMMIT_EVERY_S = 0.2
_TRIES = 5
_LONGEST_WAIT_S = 30.0
# How long requests are sent again while none has an answer that stands.
_PATIENCE_S = 300.0
_LATER = frozenset({"draining", "model_loading", "overloaded", "too_many_bodies"})


class Reply(NamedTuple):
    """What came back for a request."""

    status: int
    request_id: str
    body: bytes
    retry_after_s: float | None = None

    def answer(self, item: Item) -> Answer:
        """Return the line of answers for a request."""
        response = Response(self.status, self.request_id, plain(self.body))
        return Answer(custom_id=item.custom_id, response=response)


Send = Callable[[Item], Awaitable[Reply]]
Commit = Callable[[Sequence[Answer]], Coroutine[Any, Any, None]]
"""Writes answers, and counts them; it is not cancelled."""


async def finished(work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, and wait for its end also when this is cancelled.

    Raises:
        Exception: raised by `work`, whether this is cancelled or not.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if (error := task.exception()) is not None:
            raise error from None
        raise


class _Detail(msgspec.Struct, frozen=True):
    code: Any = None


class _Body(msgspec.Struct, frozen=True):
    error: _Detail | None = None


class Work:
    """Sends requests, as many at a time as `limit` returns, and commits their answers.

    It begins with one at a time, and sends one more with each answer: many that begin at one moment
    delay whatever else is being answered.
    A request that is refused for lack of capacity is sent again after the time that the refusal
    names, and one that failed some times more; other answers stand, also errors.
    """

    def __init__(self, send: Send, commit: Commit, limit: Callable[[], int]) -> None:
        self._send = send
        self._commit = commit
        self._limit = limit
        self._answers: list[Answer] = []
        self._running: dict[asyncio.Task[None], int] = {}
        self._most = 1
        self._bytes = 0
        self._changed = asyncio.Event()
        self._failures: list[BaseException] = []
        self._good_at = time.monotonic()

    async def run(self, items: AsyncIterable[Item]) -> None:
        """Send all requests. However it ends, the answers until then have been committed.

        Raises:
            Exception: raised by `send` or `commit`.
        """
        committing = asyncio.create_task(self._keep_committing())
        committing.add_done_callback(self._ended)
        try:
            async for item in items:
                await self._until(partial(self._has_room, item))
                self._begin(item)
                # One in each turn of the event loop.
                await asyncio.sleep(0)
            await self._until(lambda: not self._running)
        finally:
            ending = [committing, *self._running]
            for task in ending:
                task.cancel()
            await asyncio.wait(ending)
            if not self._failures:
                await self._flush()
        if self._failures:
            raise self._failures[0]

    async def _until(self, reached: Callable[[], bool]) -> None:
        while not (self._failures or reached()):
            self._changed.clear()
            await self._changed.wait()
        if self._failures:
            # Taken out of the list: its traceback leads here, which would be a cycle.
            raise self._failures[0]

    def _has_room(self, item: Item) -> bool:
        self._most = min(self._most, max(1, min(self._limit(), MAX_AT_A_TIME)))
        fits = not self._running or self._bytes + len(item.body) <= MAX_BYTES
        return len(self._running) < self._most and fits

    def _begin(self, item: Item) -> None:
        task = asyncio.create_task(self._answer(item))
        self._running[task] = len(item.body)
        self._bytes += len(item.body)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._bytes -= self._running.pop(task, 0)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failures.append(error)
        self._changed.set()

    async def _answer(self, item: Item) -> None:
        refusals = failures = 0
        while True:
            reply = await self._send(item)
            if reply.status < 500 and reply.status != 429:
                self._good_at = time.monotonic()
                break
            if reply.status == 429 or (reply.status == 503 and _code(reply.body) in _LATER):
                wait_s = reply.retry_after_s or _backoff_s(refusals)
                refusals += 1
            elif failures < self._tries - 1:
                wait_s = _backoff_s(failures)
                failures += 1
            else:
                break
            await asyncio.sleep(min(wait_s, 2 * _LONGEST_WAIT_S))
        self._answers.append(reply.answer(item))
        self._most += 1

    @property
    def _tries(self) -> int:
        """How often a request is sent that fails: once, if all have failed for some time."""
        return _TRIES if time.monotonic() - self._good_at < _PATIENCE_S else 1

    async def _keep_committing(self) -> None:
        while True:
            await asyncio.sleep(_COMMIT_EVERY_S)
            await self._flush()

    async def _flush(self) -> None:
        answers, self._answers = self._answers, []
        if answers:
            await finished(self._commit(answers))


def _backoff_s(tries: int) -> float:
    return min(2.0 ** min(tries - 1, 8), _LONGEST_WAIT_S)


def _code(body: bytes) -> Any:
    try:
        error = msgspec.json.decode(body, type=_Body).error
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return error.code if error else None
