"""Places for work that takes long, and an engine's slots, shared fairly between clients."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from headrace.core.request import Request

_Waiting = deque[asyncio.Future[None]]


class Places:
    """A number of places, of which a client with a key has one at a time."""

    def __init__(self, count: int) -> None:
        self._free = asyncio.Semaphore(count)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def take(self, client: str) -> Callable[[], None]:
        """Wait for a place, and return the function that gives it back."""
        turn = asyncio.Lock()
        if client:
            turn = self._turns.setdefault(client, turn)
        await turn.acquire()
        try:
            await self._free.acquire()
        except BaseException:
            turn.release()
            raise

        def give_back() -> None:
            self._free.release()
            turn.release()

        return give_back

    @asynccontextmanager
    async def place(self, client: str) -> AsyncGenerator[None]:
        """Take a place, which is given back at the end of the context."""
        give_back = await self.take(client)
        try:
            yield
        finally:
            give_back()


class Slots:
    """The slots of an engine, of which a request takes one for each of its choices.

    The next one is for the client that has the fewest, and of its requests for the one that has
    the fewest. A request of a batch that has one already gives way to all others, and leaves one
    free. Without a key each request counts as a client.
    """

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._waiting: dict[str, tuple[Request, _Waiting]] = {}
        self._held = Counter[str]()
        self._held_by_client = Counter[str]()

    @property
    def running(self) -> int:
        """How many slots are taken."""
        return self._count - self._free

    @property
    def waiting(self) -> int:
        """How many choices wait for one."""
        return sum(len(waiting) for _, waiting in self._waiting.values())

    async def take(self, request: Request) -> None:
        """Wait for a slot."""
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(request.id, (request, deque()))[1].append(slot)
        self._give()
        try:
            await slot
        except asyncio.CancelledError:
            if slot.cancelled():
                self._forget(request, slot)
            else:
                self.leave(request)
            raise

    def leave(self, request: Request) -> None:
        """Give a slot back."""
        for held, key in ((self._held, request.id), (self._held_by_client, _client(request))):
            held[key] -= 1
            if not held[key]:
                del held[key]
        self._free += 1
        self._give()

    def _give(self) -> None:
        while self._free and (request := self._next()) is not None:
            slot = self._waiting[request.id][1][0]
            self._forget(request, slot)
            if slot.cancelled():
                continue
            self._free -= 1
            self._held[request.id] += 1
            self._held_by_client[_client(request)] += 1
            self._move_back(request)
            slot.set_result(None)

    def _move_back(self, request: Request) -> None:
        """Let the other clients go first in the next round, then the client's other requests."""
        own = [each for each, _ in self._waiting.values() if _client(each) == _client(request)]
        for each in sorted(own, key=lambda each: each.id == request.id):
            self._waiting[each.id] = self._waiting.pop(each.id)

    def _next(self) -> Request | None:
        """Return the next request; of equals, the first in the order of turns."""
        ready = [request for request, _ in self._waiting.values() if not self._yields(request)]
        return min(ready, key=self._rank, default=None)

    def _rank(self, request: Request) -> tuple[bool, int, int]:
        held = self._held[request.id]
        return request.batch and held > 0, self._held_by_client[_client(request)], held

    def _yields(self, request: Request) -> bool:
        return request.batch and self._held[request.id] > 0 and self._free == 1

    def _forget(self, request: Request, slot: asyncio.Future[None]) -> None:
        _, waiting = self._waiting.get(request.id, (request, _Waiting()))
        if slot in waiting:
            waiting.remove(slot)
        if not waiting:
            self._waiting.pop(request.id, None)


def _client(request: Request) -> str:
    return request.client or request.id
