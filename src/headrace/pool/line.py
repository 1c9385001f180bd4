"""The bounded queue in front of one model: fair between clients, and honest about the wait."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from headrace.core.request import EmbedRequest, GenerateRequest, RerankRequest

if TYPE_CHECKING:
    from headrace.pool.replica import Lease

Request = GenerateRequest | EmbedRequest | RerankRequest

_SMOOTHING = 0.2
_UNKNOWN_TOKENS = 256
_CHARACTERS_PER_TOKEN = 4
_LONGEST_FORECAST = 512
_MARGIN = 1.05
# Clients do not believe more, and many of those who were refused never come again.
_FARTHEST_S = 55.0
_MANY_CLIENTS = 1024
_GUESSED_SERVICE_S = 2.0


def size_of(request: Request) -> int:
    """Return how many slots a request takes."""
    return request.n if isinstance(request, GenerateRequest) else 1


def cost_of(request: Request) -> float:
    """Guess the tokens of a request, before it has run."""
    if isinstance(request, EmbedRequest):
        return sum(_tokens(given) for given in request.inputs)
    if isinstance(request, RerankRequest):
        query, documents = _tokens(request.query), request.documents
        return query * len(documents) + sum(map(_tokens, documents))
    return _prompt(request) + (request.sampling.max_tokens or _UNKNOWN_TOKENS) * request.n


def _prompt(request: GenerateRequest) -> float:
    if request.messages is not None:
        return sum(_tokens(message.content) for message in request.messages)
    return _tokens(request.prompt or ())


def _tokens(given: str | tuple[int, ...]) -> float:
    return len(given) / _CHARACTERS_PER_TOKEN if isinstance(given, str) else len(given)


class Waiter:
    """One request in a line. `turn` becomes its lease, or the reason why there is none."""

    def __init__(self, request: Request, now: float, *, first: bool = False) -> None:
        self.request = request
        self.cost = cost_of(request)
        self.first = first
        self.joined = now
        self.blocks: tuple[int, ...] = ()
        self.load_s = 0.0
        self.turn: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()


class Line:
    """Waiters by client. Whoever has had the fewest tokens comes next, first come within."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first: deque[Waiter] = deque()
        self._waiting: dict[str, deque[Waiter]] = {}
        self._served: dict[str, float] = {}
        self._floor = 0.0
        self._count = 0

    def __len__(self) -> int:
        """How many wait."""
        return self._count

    def __iter__(self) -> Iterator[Waiter]:
        """Go through all who wait, in no order."""
        yield from self._first
        for line in self._waiting.values():
            yield from line

    def join(self, waiter: Waiter) -> None:
        """Go to the end of the client's line; one whose answer was cut off goes to the front."""
        self._count += 1
        if waiter.first:
            self._first.append(waiter)
            return
        client = waiter.request.client
        if len(self._served) > _MANY_CLIENTS:
            self._forget()
        # Nobody saves up turns while he asks for nothing.
        self._served[client] = max(self._served.get(client, 0.0), self._floor)
        self._waiting.setdefault(client, deque()).append(waiter)

    def next(self) -> Waiter | None:
        """Return whose turn it is; he stays in the line until he leaves."""
        if self._first:
            return self._first[0]
        if not self._waiting:
            return None
        return self._waiting[min(self._waiting, key=lambda client: self._served[client])][0]

    def leave(self, waiter: Waiter) -> bool:
        """Take somebody out of the line; tell whether he was in it."""
        if waiter.first:
            line: deque[Waiter] | None = self._first
        else:
            line = self._waiting.get(waiter.request.client)
        if line is None or waiter not in line:
            return False
        line.remove(waiter)
        self._count -= 1
        if not line and not waiter.first:
            del self._waiting[waiter.request.client]
        return True

    def granted(self, waiter: Waiter) -> None:
        """Count the tokens of one whose turn has come against his client."""
        client = waiter.request.client
        served = self._served.get(client, self._floor)
        self._floor = max(self._floor, served)
        self._served[client] = served + waiter.cost

    def correct(self, waiter: Waiter, tokens: float) -> None:
        """Count what it came to in place of what was guessed."""
        client = waiter.request.client
        if client in self._served:
            self._served[client] += tokens - waiter.cost

    def _forget(self) -> None:
        # Of so many, those who ask for nothing now begin anew when they come again.
        self._served = {name: had for name, had in self._served.items() if name in self._waiting}


class Forecast:
    """When places in a line become free, from how long requests have held their slots."""

    def __init__(self) -> None:
        self._service_s = 0.0
        self._promised: deque[float] = deque()

    def served(self, held_s: float) -> None:
        """Note how long a request has held its slot."""
        self._service_s += (held_s - self._service_s) * (_SMOOTHING if self._service_s else 1)

    def retry_after_s(self, now: float, started: Iterable[float]) -> float:
        """Return after how many seconds one who was refused now finds a place.

        `started` are the times at which the running requests began. Those who were refused a
        moment ago come before him: each gets a time of his own.
        """
        while self._promised and self._promised[0] <= now:
            self._promised.popleft()
        service_s, ends = self._service_s or _GUESSED_SERVICE_S, list(started)
        ahead = min(len(self._promised), _LONGEST_FORECAST)
        first = _nth_end(ends, 1, service_s, now)
        at = min(_nth_end(ends, ahead + 1, service_s, now), max(first, now + _FARTHEST_S))
        if ahead < _LONGEST_FORECAST:
            self._promised.append(max(at, self._promised[-1] if self._promised else at))
        # A little later, so that the place is free and not about to be.
        return max(0.05, (at - now) * _MARGIN)


def _nth_end(started: list[float], count: int, service_s: float, now: float) -> float:
    """Return when the `count`-th slot becomes free, if each request takes `service_s`."""
    # One that is overdue can end at any moment.
    ends = [max(start + service_s, now + service_s / 8) for start in started] or [now + service_s]
    heapq.heapify(ends)
    end = ends[0]
    for _ in range(count):
        end = ends[0]
        heapq.heapreplace(ends, end + service_s)
    return end
