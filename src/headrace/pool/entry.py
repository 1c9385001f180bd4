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
from headrace.core.model import ModelInfo, ModelSpec, State, needs_new_worker
from headrace.core.request import AnyRequest
from headrace.pool.policy import Rules, backoff_s, choose_replica
from headrace.pool.queue import Forecast, Queue, Ticket
from headrace.pool.replica import Lease, Replica, blocks_of

_UNKNOWN_LOAD_S = 5.0
_RETIRED = "retired"
_serials = itertools.count()


class ModelEntry:
    """A served model. Requests join its queue; `grant` gives free slots to the next of them."""

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
        self._load_waits: set[asyncio.Future[None]] = set()
        self.retired: set[Replica] = set()
        self.replicas = self._new_replicas(spec)

    def __repr__(self) -> str:
        """Describe the name, the state and the queue."""
        return f"<ModelEntry {self.spec.name} {self.state}, {len(self.queue)} waiting>"

    @property
    def state(self) -> State:
        """The state of the model: that of its best replica."""
        states = {replica.state for replica in self.replicas}
        for state in ("ready", "loading", "draining"):
            if state in states:
                return state
        if self.failure is not None:
            return "failed"
        return "stopped" if "stopped" in states else "created"

    @property
    def is_ready(self) -> bool:
        """Whether a replica is loaded, even if it takes no requests now."""
        return any(replica.is_ready for replica in self.replicas)

    @property
    def has_lasting_replica(self) -> bool:
        """Whether a replica is loaded and is not being unloaded."""
        return any(replica.is_ready and replica.unloading is None for replica in self.replicas)

    @property
    def info(self) -> ModelInfo | None:
        """The metadata from a worker; None before the first load."""
        return next((replica.info for replica in self.replicas if replica.info is not None), None)

    @property
    def stage(self) -> tuple[str, int, int]:
        """The stage of a load, and how much of how much is done."""
        return next((replica.stage for replica in self.replicas if replica.loading), ("", 0, 0))

    @property
    def slots(self) -> int:
        """How many requests run at once; the expected number while nothing is loaded."""
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
        """Yield all replicas, including retired ones that only finish their requests."""
        yield from self.replicas
        yield from self.retired

    def join(self, request: AnyRequest, *, priority: bool = False) -> Ticket:
        """Queue a request. `priority` is for a second attempt: it goes first, and always fits.

        Raises:
            Draining, Disabled: the model is not served.
            LoadFailed: it has failed; with the time until the next attempt, if there is one.
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
        """Check that the model is served.

        Raises:
            Draining, Disabled, LoadFailed: it is not.
        """
        if self.draining:
            raise Draining(f"{self.spec.name} is stopping.")
        if not self.spec.enabled:
            raise Disabled(f"{self.spec.name} is switched off.")
        wait_s = self.retry_at - self._clock()
        if self.failure is None or self.is_ready:
            return
        if wait_s > 0 or self.has_failed_for_good:
            raise LoadFailed(
                f"{self.spec.name} has failed: {self.failure.message}",
                retry_after_s=None if self.has_failed_for_good else wait_s,
            )

    def retry_after_s(self) -> float:
        """Return after how many seconds a request that was refused should be sent again."""
        if not self.is_ready:
            return self.remaining_load_s() or _UNKNOWN_LOAD_S
        started = [lease.since for replica in self.replicas for lease in replica.leases]
        return self.forecast.retry_after_s(self._clock(), started)

    def remaining_load_s(self) -> float | None:
        """Return how long the load will still take; None if unknown."""
        sized = [
            replica
            for replica in self.replicas
            if replica.footprint and replica.footprint.load_s is not None
        ]
        if not sized or sized[0].footprint is None or sized[0].footprint.load_s is None:
            return None
        began = sized[0].began if sized[0].loading else 0.0
        elapsed = self._clock() - began if began else 0.0
        return max(1.0, sized[0].footprint.load_s - elapsed)

    def load_wait_error(self, ticket: Ticket) -> Loading | None:
        """Return the error for a request whose `load_wait_s` is less than the load will take."""
        longest_s = ticket.request.load_wait_s
        if longest_s is None or self.is_ready:
            return None
        remaining, waited = self.remaining_load_s() or 0.0, self._clock() - ticket.joined
        if waited + remaining <= longest_s:
            return None
        # The client will retry: the load is for its next request.
        wait_s = remaining or _UNKNOWN_LOAD_S
        self._wanted_until = self._clock() + 2 * wait_s + 60.0
        return Loading(f"{self.spec.name} is loading.", retry_after_s=wait_s)

    def grant(self) -> None:
        """Give free slots to the next requests."""
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

        `tokens` is the real cost of the request.
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
        """Return the progress event for a request in the queue."""
        if self.is_ready:
            return Progress("queued", 0, len(self.queue))
        _, done, total = self.stage
        return Progress("loading", done, total)

    async def ready_replica(self) -> Replica:
        """Wait for a replica that is loaded and not being unloaded, with or without a free slot.

        Raises:
            HeadraceError: the load failed or was refused.
        """
        while True:
            self.check()
            for replica in self.replicas:
                if replica.is_ready and replica.unloading is None:
                    return replica
            ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._load_waits.add(ready)
            try:
                await ready
            finally:
                self._load_waits.discard(ready)

    @property
    def is_wanted(self) -> bool:
        """Whether a request or an operator waits for the model."""
        return bool(len(self.queue) or self._load_waits) or self._clock() < self._wanted_until

    def mark_wanted(self) -> None:
        """Keep the model wanted until it is ready or has failed, even without waiting callers."""
        self._wanted_until = float("inf")

    def clear_wanted(self) -> None:
        """Undo `mark_wanted`."""
        self._wanted_until = 0.0

    def became_ready(self) -> None:
        """Serve the queue, as a replica is loaded."""
        now = self._clock()
        for ticket in self.queue:
            ticket.load_s += now - max(ticket.joined, self._unready_since)
        if not self.has_failed_for_good:
            self.failure = None
        self.clear_wanted()
        for ready in self._load_waits:
            _settle(ready)
        self.grant()

    def became_unready(self) -> None:
        """Note the time if no replica is loaded any more."""
        if not self.is_ready:
            self._unready_since = self._clock()

    def refuse(self, error: HeadraceError) -> None:
        """Fail all waiting requests."""
        for ticket in list(self.queue):
            self.queue.leave(ticket)
            if not ticket.lease.done():
                ticket.lease.set_exception(error)
        self.fail_load_waits(error)

    def fail_load_waits(self, error: HeadraceError) -> None:
        """Fail callers of `ready_replica`: operators, and requests that do not queue."""
        for ready in self._load_waits:
            _settle(ready, error)

    @property
    def has_failed_for_good(self) -> bool:
        """Whether the model is loaded again only after a reset."""
        return self.retry_at == float("inf")

    def load_failed(self, error: HeadraceError, rules: Rules, *, counts: bool) -> None:
        """Record a failed load. A lack of memory is not a failure of the model."""
        self.clear_wanted()
        if isinstance(error, DoesNotFit):
            self.last_error = error.message
        else:
            self.failed(error, rules, counts=counts)

    def failed(self, error: HeadraceError, rules: Rules, *, counts: bool = True) -> float:
        """Record a crash or a failed load; return after how many seconds to try again.

        Infinity means not before a reset: there were too many within the window.
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
        """Clear the failure, as a new worker is started; the count of failures is kept."""
        self.failure = None

    def reset(self) -> None:
        """Clear the failure and its history."""
        self.failure = None
        self.retry_at = self._wanted_until = 0.0
        self._failures = 0
        self._crashes.clear()

    def apply(self, spec: ModelSpec) -> list[Replica]:
        """Serve another specification; return the replicas that only finish their requests."""
        old, self.spec = self.spec, spec
        self.keep_alive = spec.keep_alive
        if not needs_new_worker(old, spec):
            self._resize(spec)
            return [replica for replica in self.retired if replica.unloading is None]
        retiring, self.replicas = self.replicas, self._new_replicas(spec)
        return self._retire(retiring)

    def retire(self) -> None:
        """Stop serving the model; running requests continue."""
        self.draining = True
        retiring, self.replicas = self.replicas, []
        self._retire(retiring)

    def _resize(self, spec: ModelSpec) -> None:
        self._retire(self.replicas[spec.replicas :])
        self.replicas = self.replicas[: spec.replicas]
        for replica in self.replicas:
            replica.configure(spec)
        self.replicas += self._new_replicas(spec)[len(self.replicas) :]

    def _retire(self, retiring: list[Replica]) -> list[Replica]:
        for replica in retiring:
            replica.close(_RETIRED)
            self.retired.add(replica)
        self.became_unready()
        return retiring

    def _new_replicas(self, spec: ModelSpec) -> list[Replica]:
        return [
            Replica(spec, number, next(_serials), self._clock) for number in range(spec.replicas)
        ]

    def _capacity(self) -> int:
        """Return how many requests may wait, including the one that is about to join."""
        if self.is_ready:
            free = max((replica.candidate(()).free for replica in self.replicas), default=0)
            served_at_once = not len(self.queue) and free > 0
            return self.spec.max_queued + (1 if served_at_once else 0)
        return self.spec.max_queued + max(1, self.slots)


def _settle(ready: asyncio.Future[None], error: HeadraceError | None = None) -> None:
    if ready.done():
        return
    if error is None:
        ready.set_result(None)
    else:
        ready.set_exception(error)
