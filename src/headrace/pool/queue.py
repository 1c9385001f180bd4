"""The bounded queue in front of one model, fair between clients, and the Retry-After forecast.

Requests of batches are a second class: they go when no other request waits, or when others have
had many times their tokens.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from headrace.core.errors import HeadraceError, QueueFull
from headrace.core.request import AnyRequest
from headrace.pool.failures import fingerprint

if TYPE_CHECKING:
    from headrace.pool.replica import Lease

_SMOOTHING = 0.2
_LONGEST_FORECAST = 512
_MARGIN = 1.05
# Clients ignore longer times, and many of the refused requests are never sent again.
_FARTHEST_S = 55.0
_MANY_CLIENTS = 1024
_GUESSED_SERVICE_S = 2.0
_BATCH_PRICE = 0.5
# A request of a batch waits while others get so many times its tokens, and no longer.
_BATCH_TURN = 10
_QUIET_S = 60.0
# How long others pass a request that has to be alone, and how long they wait for it then.
_PASSED_S, _HELD_S = 20.0, 10.0


class Ticket:
    """One request's place in a queue. `lease` becomes its lease, or an error.

    `priority` is for a second attempt: it goes first, and always fits. `alone` is for a request
    that may crash its worker: it begins on a replica that serves nothing else.
    """

    def __init__(
        self, request: AnyRequest, now: float, *, priority: bool = False, alone: bool = False
    ) -> None:
        self.request = request
        self.cost = request.cost()
        self.priority = priority
        self.alone = alone
        self.joined = now
        self.blocks: tuple[int, ...] = ()
        self.load_s = 0.0
        self.lease: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()

    @property
    def is_paced(self) -> bool:
        """Whether it waits for earlier requests of its client."""
        return not (self.alone or self.priority)


Waiting = dict[str, deque[Ticket]]
"""Tickets by client, in the order in which they have joined."""
IsHeld = Callable[[Ticket], bool]


def _never(_ticket: Ticket) -> bool:
    return False


class Queue:
    """Tickets by client. The client with the fewest tokens so far is next; FIFO within a client.

    Those of batches are next when there are no others, or when one `is_due`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._priority: deque[Ticket] = deque()
        self._alone: deque[Ticket] = deque()
        self._waiting: Waiting = {}
        self._batch: Waiting = {}
        self._served: dict[str, float] = {}
        self._floor = 0.0
        self._passed = self._passing_since = 0.0
        self._latest = float("-inf")
        self._counts = {False: 0, True: 0}

    def __len__(self) -> int:
        """Return the number of tickets."""
        return sum(self._counts.values())

    def __iter__(self) -> Iterator[Ticket]:
        """Iterate over all tickets, in no order."""
        yield from self._priority
        yield from self._alone
        for waiting in (self._waiting, self._batch):
            for tickets in waiting.values():
                yield from tickets

    def count(self, *, batch: bool) -> int:
        """Return the number of tickets of batches, or of the others."""
        return self._counts[batch]

    def is_full(self, ticket: Ticket, room: int, free: int) -> bool:
        """Whether there is no place for a ticket, given how many may wait and the `free` slots.

        A client with a key of which nothing waits gets a place beyond `room`, up to twice as many,
        so that another cannot take all of them.
        """
        client = ticket.request.client
        if client and client not in self._class_of(ticket):
            room *= 2
        return self.count(batch=ticket.request.batch) - free >= room

    @property
    def is_quiet(self) -> bool:
        """Whether there have been requests of batches only, for some time."""
        return not self._counts[False] and self._clock() - self._latest > _QUIET_S

    def join(self, ticket: Ticket) -> None:
        """Add a ticket to the end of its client's; one with priority goes before all others."""
        self._counts[ticket.request.batch] += 1
        if not ticket.request.batch:
            self._latest = self._clock()
        if ticket.alone or ticket.priority:
            (self._alone if ticket.alone else self._priority).append(ticket)
            return
        client = ticket.request.client
        if len(self._served) > _MANY_CLIENTS:
            self._forget()
        # An idle client does not accumulate credit.
        self._served[client] = max(self._served.get(client, 0.0), self._floor)
        self._class_of(ticket).setdefault(client, deque()).append(ticket)

    def next(self, is_held: IsHeld = _never) -> Ticket | None:
        """Return the next ticket that need not be alone; it stays in the queue until `leave`.

        Clients are passed over of which the next ticket `is_held`.
        """
        if self._priority:
            return self._priority[0]
        ticket = self._first(self._batch, is_held) if self._batch else None
        if ticket is not None and (not self._waiting or self.is_due(ticket)):
            return ticket
        return self._first(self._waiting, is_held)

    def is_due(self, ticket: Ticket) -> bool:
        """Whether a ticket of a batch has let enough others pass."""
        return self._passed >= _BATCH_TURN * ticket.cost

    def _class_of(self, ticket: Ticket) -> Waiting:
        return self._batch if ticket.request.batch else self._waiting

    def _first(self, waiting: Waiting, is_held: IsHeld) -> Ticket | None:
        for client in sorted(waiting, key=self._served.__getitem__):
            if not is_held(ticket := waiting[client][0]):
                return ticket
        return None

    def next_alone(self) -> Ticket | None:
        """Return the next ticket that has to be alone, which stays in the queue until `leave`."""
        return self._alone[0] if self._alone else None

    def turn(
        self, fits: Callable[[Ticket], bool], problem: str, is_held: IsHeld = _never
    ) -> Ticket | None:
        """Return the next ticket, or None if one that has to be alone is waited for.

        The others pass such a ticket until it `fits`, and then wait for a while. After that it is
        refused with `problem`, as what runs can be without an end, and others may pass again.
        """
        for ticket in self._alone:
            if fits(ticket):
                return ticket
        if not self._alone:
            return self.next(is_held)
        waited_s = self._clock() - max(self._alone[0].joined, self._passing_since)
        if waited_s <= _PASSED_S:
            return self.next(is_held)
        if waited_s <= _PASSED_S + _HELD_S:
            return None
        latest = self._clock() - _PASSED_S - _HELD_S
        for ticket in [ticket for ticket in self._alone if ticket.joined <= latest]:
            self._refuse(ticket, QueueFull(problem, retry_after_s=_PASSED_S))
        self.pass_alone()
        return self.turn(fits, problem, is_held)

    def pass_alone(self) -> None:
        """Let the others pass what has to be alone from now on, for the whole time."""
        self._passing_since = self._clock()

    def release(self, request: AnyRequest) -> None:
        """Let requests for the same as this one run beside others."""
        same = fingerprint(request)
        for ticket in [ticket for ticket in self._alone if fingerprint(ticket.request) == same]:
            self.leave(ticket)
            ticket.alone = False
            self.join(ticket)

    def leave(self, ticket: Ticket) -> bool:
        """Remove a ticket; return whether it was in the queue."""
        client = ticket.request.client
        own = self._alone if ticket.alone else self._priority if ticket.priority else None
        waiting = self._class_of(ticket)
        tickets = waiting.get(client) if own is None else own
        if tickets is None or ticket not in tickets:
            return False
        tickets.remove(ticket)
        self._counts[ticket.request.batch] -= 1
        if not tickets and own is None:
            del waiting[client]
        return True

    def review(self, admit: Callable[[AnyRequest], bool]) -> None:
        """Fail what `admit` refuses with an error; isolate what it returns True for."""
        for ticket in list(self):
            try:
                alone = admit(ticket.request)
            except HeadraceError as error:
                self._refuse(ticket, error)
            else:
                if alone and not ticket.alone:
                    self.leave(ticket)
                    ticket.alone = True
                    self.join(ticket)

    def _refuse(self, ticket: Ticket, error: HeadraceError) -> None:
        self.leave(ticket)
        if not ticket.lease.done():
            ticket.lease.set_exception(error)

    def granted(self, ticket: Ticket) -> None:
        """Charge the estimated tokens of a granted request to its client."""
        client, is_batch = ticket.request.client, ticket.request.batch
        served = self._served.get(client, self._floor)
        if not is_batch:
            self._floor = max(self._floor, served)
        self._served[client] = served + ticket.cost * _price(ticket)
        self._passed = self._passed + ticket.cost if self._batch and not is_batch else 0.0

    def correct(self, ticket: Ticket, tokens: float) -> None:
        """Replace the charged estimate by the real tokens."""
        client = ticket.request.client
        if client in self._served:
            self._served[client] += (tokens - ticket.cost) * _price(ticket)

    def _forget(self) -> None:
        # Of too many clients, those without waiting requests are forgotten.
        waiting = {*self._waiting, *self._batch}
        self._served = {name: used for name, used in self._served.items() if name in waiting}


def _price(ticket: Ticket) -> float:
    return _BATCH_PRICE if ticket.request.batch else 1.0


class Forecast:
    """Forecasts when slots become free, from how long requests have held theirs."""

    def __init__(self) -> None:
        self._service_s = 0.0
        self._promised: deque[float] = deque()

    def served(self, held_s: float) -> None:
        """Note how long a request has held its slot."""
        self._service_s += (held_s - self._service_s) * (_SMOOTHING if self._service_s else 1)

    def retry_after_s(self, now: float, started: Iterable[float]) -> float:
        """Return after how many seconds there is a place for a request that is refused now.

        `started` are the start times of the running requests. Requests that were refused recently
        come first: each gets a different time.
        """
        while self._promised and self._promised[0] <= now:
            self._promised.popleft()
        service_s, ends = self._service_s or _GUESSED_SERVICE_S, list(started)
        ahead = min(len(self._promised), _LONGEST_FORECAST)
        first = _nth_end(ends, 1, service_s, now)
        at = min(_nth_end(ends, ahead + 1, service_s, now), max(first, now + _FARTHEST_S))
        if ahead < _LONGEST_FORECAST:
            self._promised.append(max(at, self._promised[-1] if self._promised else at))
        # A little later, so that the place is free by then.
        return max(0.05, (at - now) * _MARGIN)


def _nth_end(started: list[float], count: int, service_s: float, now: float) -> float:
    """Return when the `count`-th slot becomes free, if each request takes `service_s`."""
    # An overdue request can end at any moment.
    ends = [max(start + service_s, now + service_s / 8) for start in started] or [now + service_s]
    heapq.heapify(ends)
    end = ends[0]
    for _ in range(count):
        end = ends[0]
        heapq.heapreplace(ends, end + service_s)
    return end
