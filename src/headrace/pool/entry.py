"""One model in the pool: its queue, its replicas, and its failure history."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator

from headrace.core.errors import (
    Disabled,
    DoesNotFit,
    Draining,
    HeadraceError,
    LoadFailed,
    Loading,
    QueueFull,
)
from headrace.core.events import Progress
from headrace.core.model import ModelInfo, ModelSpec, State
from headrace.core.request import AnyRequest
from headrace.pool.policy import Rules, backoff_s, choose_replica
from headrace.pool.queue import Forecast, Queue, Ticket
from headrace.pool.replica import Lease, Replica, blocks_of

_UNKNOWN_LOAD_S = 5.0
_RETIRED = "retired"
_serials = itertools.count()


class ModelEntry:
    """A served model. Requests join the queue; `grant` gives slots to those whose turn it is."""

    def __init__(self, spec: ModelSpec, clock: Callable[[], float]) -> None:
        self.spec = spec
        self.queue = Queue(clock)
        self.forecast = Forecast()
        self.draining = False
        self.failure: HeadraceError | None = None
        self.last_error: str | None = None
        self.retry_at = 0.0
        self.keep_alive = spec.keep_alive
        self.last_used: float | None = None
        self.restarts = self.evictions = self.continuations = 0
        self.reference: str | None = None
        self.preload = spec.preload
        self._wanted_until = 0.0
        self._clock = clock
        self._failures = 0
        self._crashes: deque[float] = deque(maxlen=64)
        self._unready_since = clock()
        self._waiters: set[asyncio.Future[None]] = set()
        self.retired: set[Replica] = set()
        self.replicas = self._new_replicas(spec)

    def __repr__(self) -> str:
        """Describe the name, the state and the queue."""
        return f"<ModelEntry {self.spec.name} {self.state}, {len(self.queue)} waiting>"

    @property
    def state(self) -> State:
        """The state of the model as a whole: that of its best replica."""
        states = {replica.state for replica in self.replicas}
        for state in ("ready", "loading", "draining"):
            if state in states:
                return state
        if self.failure is not None:
            return "failed"
        return "stopped" if "stopped" in states else "created"

    @property
    def is_ready(self) -> bool:
        """Whether a replica is loaded, even if it takes no request now."""
        return any(replica.is_ready for replica in self.replicas)

    @property
    def stays(self) -> bool:
        """Whether a replica is loaded that is not about to be unloaded."""
        return any(replica.is_ready and replica.unloading is None for replica in self.replicas)

    @property
    def info(self) -> ModelInfo | None:
        """The metadata from a worker; None before the first load."""
        return next((replica.info for replica in self.replicas if replica.info is not None), None)

    @property
    def stage(self) -> tuple[str, int, int]:
        """What a load is doing, how much of it is done, and of how much."""
        return next((replica.stage for replica in self.replicas if replica.loading), ("", 0, 0))

    @property
    def slots(self) -> int:
        """How many requests run at once; what is expected, while nothing is loaded."""
        ready = [replica.max_running for replica in self.replicas if replica.is_ready]
        return (
            sum(ready)
            if ready
            else max((replica.max_running for replica in self.replicas), default=0)
        )

    @property
    def running(self) -> int:
        """How many slots are taken."""
        return sum(replica.running for replica in self.all_replicas())

    def wall(self, at: float) -> float:
        """Return a time of the pool's clock as Unix time."""
        return time.time() + at - self._clock()

    def all_replicas(self) -> Iterator[Replica]:
        """Yield all replicas, including those that only finish what they have begun."""
        yield from self.replicas
        yield from self.retired

    def join(self, request: AnyRequest, *, priority: bool = False) -> Ticket:
        """Queue a request. `priority` is for an answer that was cut off: first, and always taken.

        Raises:
            Draining, Disabled: nothing is served.
            LoadFailed: it has failed; with the time after which it is tried again, if it is.
            QueueFull: with the time after which there should be a place.
        """
        self.check()
        ticket = Ticket(request, self._clock(), priority=priority)
        if len(self.replicas) > 1:
            ticket.blocks = blocks_of(request)
        if not priority and len(self.queue) >= self._capacity():
            raise QueueFull(
                f"{len(self.queue)} requests wait for {self.spec.name} already.",
                retry_after_s=self.retry_after_s(),
            )
        self.queue.join(ticket)
        self.grant()
        return ticket

    def check(self) -> None:
        """Refuse a request while nothing is served.

        Raises:
            Draining, Disabled, LoadFailed: the reason.
        """
        if self.draining:
            raise Draining(f"{self.spec.name} is stopping.")
        if not self.spec.enabled:
            raise Disabled(f"{self.spec.name} is switched off.")
        wait_s = self.retry_at - self._clock()
        if self.failure is None or self.is_ready:
            return
        if wait_s > 0 or self.has_given_up:
            raise LoadFailed(
                f"{self.spec.name} has failed: {self.failure.message}",
                retry_after_s=None if self.has_given_up else wait_s,
            )

    def retry_after_s(self) -> float:
        """Return after how long a request that finds the queue full should come again."""
        if not self.is_ready:
            return self.remaining_load_s() or _UNKNOWN_LOAD_S
        started = [lease.since for replica in self.replicas for lease in replica.leases]
        return self.forecast.retry_after_s(self._clock(), started)

    def remaining_load_s(self) -> float | None:
        """Return how long the load will still take; None where that is unknown."""
        known = [
            replica
            for replica in self.replicas
            if replica.footprint and replica.footprint.load_s is not None
        ]
        if not known or known[0].footprint is None or known[0].footprint.load_s is None:
            return None
        began = known[0].began if known[0].loading else 0.0
        elapsed = self._clock() - began if began else 0.0
        return max(1.0, known[0].footprint.load_s - elapsed)

    def impatient(self, ticket: Ticket) -> Loading | None:
        """Return the error of a request that does not wait as long as the load will take."""
        most = ticket.request.load_wait_s
        if most is None or self.is_ready:
            return None
        remaining, waited = self.remaining_load_s() or 0.0, self._clock() - ticket.joined
        if waited + remaining <= most:
            return None
        # The client comes again: the load is for it.
        wait_s = remaining or _UNKNOWN_LOAD_S
        self._wanted_until = self._clock() + 2 * wait_s + 60.0
        return Loading(f"{self.spec.name} is loading.", retry_after_s=wait_s)

    def grant(self) -> None:
        """Give the free slots to those whose turn it is."""
        while (ticket := self.queue.next()) is not None:
            size = ticket.request.slots
            candidates = [replica.candidate(ticket.blocks) for replica in self.replicas]
            number = choose_replica(candidates, size)
            if number is None:
                return
            self.queue.leave(ticket)
            self.queue.granted(ticket)
            replica = self.replicas[number]
            lease = replica.take(ticket.cost, min(size, replica.max_running), ticket.blocks)
            if ticket.lease.done():
                replica.give_back(lease)
            else:
                ticket.lease.set_result(lease)

    def leave(self, ticket: Ticket, tokens: float | None = None) -> None:
        """Take a request out of the queue, or give its slots back. Idempotent.

        `tokens` is what the request really took.
        """
        self.queue.leave(ticket)
        if not ticket.lease.done():
            ticket.lease.cancel()
        elif not ticket.lease.cancelled() and ticket.lease.exception() is None:
            self._release(ticket, ticket.lease.result(), tokens)

    def _release(self, ticket: Ticket, lease: Lease, tokens: float | None) -> None:
        now, request = self._clock(), ticket.request
        if lease in lease.replica.leases:
            self.forecast.served(now - lease.since)
            self.queue.correct(ticket, ticket.cost if tokens is None else tokens)
        lease.replica.give_back(lease)
        self.last_used = now
        self.keep_alive = self.spec.keep_alive if request.keep_alive is None else request.keep_alive
        self.grant()

    def progress(self) -> Progress:
        """Return what a request in the queue waits for."""
        if self.is_ready:
            return Progress("queued", 0, len(self.queue))
        _, done, total = self.stage
        return Progress("loading", done, total)

    async def ready_replica(self) -> Replica:
        """Wait for a replica that is loaded and stays, whether it has a slot or not.

        Raises:
            HeadraceError: why there will be none.
        """
        while True:
            self.check()
            for replica in self.replicas:
                if replica.is_ready and replica.unloading is None:
                    return replica
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    @property
    def is_wanted(self) -> bool:
        """Whether a request or an operator waits for the model now."""
        return bool(len(self.queue) or self._waiters) or self._clock() < self._wanted_until

    def want(self) -> None:
        """Keep the model wanted until it is ready or has failed, whoever still waits for it."""
        self._wanted_until = float("inf")

    def unwant(self) -> None:
        """Drop what `want` has said."""
        self._wanted_until = 0.0

    def became_ready(self) -> None:
        """A replica is loaded: serve the queue."""
        now = self._clock()
        for ticket in self.queue:
            ticket.load_s += now - max(ticket.joined, self._unready_since)
        if not self.has_given_up:
            self.failure = None
        self.unwant()
        for waiter in self._waiters:
            _settle(waiter)
        self.grant()

    def became_unready(self) -> None:
        """No replica is loaded any more, unless one still is."""
        if not self.is_ready:
            self._unready_since = self._clock()

    def refuse(self, error: HeadraceError) -> None:
        """Fail all that wait."""
        for ticket in list(self.queue):
            self.queue.leave(ticket)
            if not ticket.lease.done():
                ticket.lease.set_exception(error)
        self.refuse_waiters(error)

    def refuse_waiters(self, error: HeadraceError) -> None:
        """Fail those that wait for the load alone: operators, and requests that never queue."""
        for waiter in self._waiters:
            _settle(waiter, error)

    @property
    def has_given_up(self) -> bool:
        """Whether only a reset brings the model back."""
        return self.retry_at == float("inf")

    def load_failed(self, error: HeadraceError, rules: Rules, *, counts: bool) -> None:
        """Record a failed load. One that only found no memory leaves the model sound."""
        self.unwant()
        if isinstance(error, DoesNotFit):
            self.last_error = error.message
        else:
            self.failed(error, rules, counts=counts)

    def failed(self, error: HeadraceError, rules: Rules, *, counts: bool = True) -> float:
        """Record a crash or a failed load; return after how many seconds to try again.

        Infinity means not before a reset: too many of them within the window.
        """
        now = self._clock()
        self.failure, self.last_error = error, error.message
        if counts:
            self._failures += 1
            self._crashes.append(now)
        recent = sum(1 for at in self._crashes if now - at <= rules.crash_window_s)
        if recent >= rules.crashes:
            self.retry_at = float("inf")
            return self.retry_at
        wait_s = backoff_s(max(1, self._failures))
        self.retry_at = now + wait_s
        return wait_s

    def crashed(self, error: HeadraceError, rules: Rules, *, up_s: float) -> None:
        """Record that a worker has died after `up_s` seconds."""
        if up_s > rules.crash_window_s:
            self._failures = 0
        self.restarts += 1
        self.failed(error, rules)

    def restarting(self) -> None:
        """Forget the failure itself, as a new worker is on its way; its count stays."""
        self.failure = None

    def reset(self) -> None:
        """Forget that it has failed."""
        self.failure = None
        self.retry_at = self._wanted_until = 0.0
        self._failures = 0
        self._crashes.clear()

    def apply(self, spec: ModelSpec) -> list[Replica]:
        """Serve another specification; return the replicas that only finish what they have begun."""
        old, self.spec = self.spec, spec
        self.keep_alive = spec.keep_alive
        if not needs_new_worker(old, spec):
            self._resize(spec)
            return [replica for replica in self.retired if replica.unloading is None]
        gone, self.replicas = self.replicas, self._new_replicas(spec)
        return self._retire(gone)

    def retire(self) -> None:
        """Serve the model no more: what runs may end."""
        self.draining = True
        gone, self.replicas = self.replicas, []
        self._retire(gone)

    def _resize(self, spec: ModelSpec) -> None:
        self._retire(self.replicas[spec.replicas :])
        self.replicas = self.replicas[: spec.replicas]
        for replica in self.replicas:
            replica.configure(spec)
        self.replicas += self._new_replicas(spec)[len(self.replicas) :]

    def _retire(self, gone: list[Replica]) -> list[Replica]:
        for replica in gone:
            replica.close(_RETIRED)
            self.retired.add(replica)
        self.became_unready()
        return gone

    def _new_replicas(self, spec: ModelSpec) -> list[Replica]:
        return [
            Replica(spec, number, next(_serials), self._clock) for number in range(spec.replicas)
        ]

    def _capacity(self) -> int:
        """Return how many requests may wait, the one that is about to join among them."""
        if self.is_ready:
            free = max((replica.candidate(()).free for replica in self.replicas), default=0)
            served_at_once = not len(self.queue) and free > 0
            return self.spec.max_queued + (1 if served_at_once else 0)
        return self.spec.max_queued + max(1, self.slots)


def _settle(waiter: asyncio.Future[None], error: HeadraceError | None = None) -> None:
    if waiter.done():
        return
    if error is None:
        waiter.set_result(None)
    else:
        waiter.set_exception(error)


_LIVE_FIELDS = frozenset(
    {
        "aliases",
        "enabled",
        "keep_alive",
        "max_queued",
        "pinned",
        "preload",
        "replicas",
        "weights",
    }
)


def needs_new_worker(old: ModelSpec, new: ModelSpec) -> bool:
    """Whether a change concerns what a worker was loaded with."""
    return any(
        getattr(old, name) != getattr(new, name)
        for name in ModelSpec.__struct_fields__
        if name not in _LIVE_FIELDS
    )
