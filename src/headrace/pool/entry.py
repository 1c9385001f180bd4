"""One model in the pool: its queue, its replicas, and its failure history."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

from headrace.core.errors import Disabled, Draining, HeadraceError, Loading, QueueFull, QueueTimeout
from headrace.core.events import Progress
from headrace.core.model import ModelInfo, ModelSpec, State, needs_new_worker
from headrace.core.request import AnyRequest
from headrace.pool.failures import Failures
from headrace.pool.policy import Candidate, Rules, blocks_of, choose_replica, left_for_batch
from headrace.pool.queue import Forecast, Queue, Ticket
from headrace.pool.replica import Lease, Replica

_UNKNOWN_LOAD_S, _BATCH_RETRY_S, _PROGRESS_S = 5.0, 2.0, 0.5
_RETIRED = "retired"
_serials = itertools.count()


class ModelEntry:
    """A served model. Requests join its queue; `grant` gives free slots to the next of them."""

    def __init__(self, spec: ModelSpec, clock: Callable[[], float], copies: int = 0) -> None:
        self.spec, self.copies = spec, copies
        self.queue = Queue(clock)
        self.forecast = Forecast()
        self.draining = False
        self.failures = Failures(clock)
        self.keep_alive = spec.keep_alive
        self.last_used: float | None = None
        self.restarts = self.evictions = self.continuations = 0
        self.reference: str | None = None
        self.header: tuple[ModelSpec, ModelInfo] | None = None
        self.preload = spec.preload
        self._wanted_until = 0.0
        self._clock = clock
        self._unready_since = clock()
        self._load_waits: set[asyncio.Future[None]] = set()
        self.retired, self.coming = set[Replica](), list[Replica]()
        self.changing = asyncio.Lock()
        self.replicas = self.new_replicas(spec)

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
        if self.failures.error is not None:
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
        return sum(ready) or max((replica.max_running for replica in self.replicas), default=0)

    @property
    def running(self) -> int:
        """How many slots are taken."""
        return sum(replica.running for replica in self.all_replicas())

    def wall(self, at: float) -> float:
        """Return a time of the pool's clock as Unix time."""
        return time.time() + at - self._clock()

    def all_replicas(self) -> Iterator[Replica]:
        """Yield all replicas, with those that only finish their requests, and those to come."""
        yield from (*self.replicas, *self.retired, *self.coming)

    def join(self, request: AnyRequest, *, priority: bool = False, alone: bool = False) -> Ticket:
        """Queue a request; see `Ticket`.

        Raises:
            Draining, Disabled: the model is not served.
            LoadFailed: it has failed; with the time until the next attempt.
            Quarantined, RateLimited: such requests, or this client's, have crashed workers.
            QueueFull: with the time after which there should be a place.
        """
        self.check()
        now = self._clock()
        alone = self.failures.suspects.admit(request, now) or alone
        priority = priority or request.continues
        ticket = Ticket(request, now, priority=priority, alone=alone)
        ticket.blocks = blocks_of(request) if len(self.replicas) > 1 else ()
        free = sum(candidate.open for candidate in self._candidates(ticket))
        if not priority and self.queue.is_full(ticket, self.room, free):
            raise QueueFull(
                f"{self.queue.count(batch=request.batch)} requests wait for {self.spec.name}.",
                retry_after_s=_BATCH_RETRY_S if request.batch else self.retry_after_s(),
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
        if self.failures.wait_s and not self.is_ready:
            raise self.failures.refusal(self.spec.name)

    def retry_after_s(self) -> float:
        """Return after how many seconds a request that was refused should be sent again."""
        if not self.is_ready:
            return self.remaining_load_s() or _UNKNOWN_LOAD_S
        started = [lease.since for replica in self.replicas for lease in replica.leases]
        return self.forecast.retry_after_s(self._clock(), started)

    def remaining_load_s(self) -> float | None:
        """Return how long the load will still take; None if unknown."""
        for replica in self.replicas:
            if replica.footprint and (load_s := replica.footprint.load_s) is not None:
                began = replica.began if replica.loading else 0.0
                return max(1.0, load_s - (self._clock() - began if began else 0.0))
        return None

    def crashed(
        self, error: HeadraceError, rules: Rules, *, up_s: float, victims: Sequence[Lease]
    ) -> None:
        """Record that a worker has died after `up_s` seconds, with these requests."""
        self.restarts += 1
        self.failures.crashed(error, rules, up_s=up_s, victims=victims)
        self.queue.review(lambda request: self.failures.suspects.admit(request, self._clock()))

    def wait_s(self, request: AnyRequest, joined: float) -> float:
        """Return for how many seconds a request may wait until this is called again.

        Raises:
            QueueTimeout: the request's deadline has passed.
            Loading: the load takes longer than the request's `load_wait_s`.
        """
        now, deadline = self._clock(), request.deadline
        if self.queue.next_alone() is not None:
            self.grant()  # Whose turn it is changes with the time.
        if not self.is_ready and request.load_wait_s is not None:
            remaining = self.remaining_load_s() or 0.0
            if now - joined + remaining > request.load_wait_s:
                # The client will retry: the load is for its next request.
                wait_s = remaining or _UNKNOWN_LOAD_S
                self._wanted_until = now + 2 * wait_s + 60.0
                raise Loading(f"{self.spec.name} is loading.", retry_after_s=wait_s)
        if deadline is None:
            return _PROGRESS_S
        if deadline <= now:
            where = "in the queue" if self.is_ready else "for the model to load"
            raise QueueTimeout(f"The deadline passed while the request waited {where}.")
        return min(_PROGRESS_S, deadline - now)

    def grant(self) -> None:
        """Give free slots to the next requests."""
        while (ticket := self._next()) is not None:
            replica = self._choose(ticket)
            if replica is None:
                return
            self.queue.leave(ticket)
            self.queue.granted(ticket)
            # All that is left, if it has to be alone.
            size = replica.free if ticket.alone else 1
            facts = (ticket.request, ticket.blocks, ticket.cost)
            lease = replica.take(*facts, size=size, alone=ticket.alone)
            if ticket.lease.done():
                replica.give_back(lease)
            else:
                ticket.lease.set_result(lease)

    def _next(self) -> Ticket | None:
        if self.queue.next_alone() is None or not self.is_ready:
            return self.queue.next(self._is_held)
        problem = f"{self.spec.name} is too busy for a request that has to run alone at first."
        return self.queue.turn(self._fits, problem, self._is_held)

    def _fits(self, ticket: Ticket) -> bool:
        return self._choose(ticket) is not None

    def _is_held(self, ticket: Ticket) -> bool:
        """Whether it waits for others of its client only, so that other clients may pass."""
        free = [candidate for candidate in self._candidates(ticket) if candidate.free > 0]
        return bool(free) and all(candidate.held for candidate in free)

    def _choose(self, ticket: Ticket) -> Replica | None:
        number = choose_replica(self._candidates(ticket))
        return None if number is None else self.replicas[number]

    def _candidates(self, ticket: Ticket) -> list[Candidate]:
        facts = (ticket.request, ticket.blocks)
        candidates = [each.candidate(*facts, paced=ticket.is_paced) for each in self.replicas]
        if ticket.alone:
            client = ticket.request.client
            return [c for c in candidates if not self.replicas[c.number].has_others(client)]
        if not ticket.request.batch or ticket.priority or self.queue.is_due(ticket):
            return candidates
        return [left_for_batch(each, quiet=self.queue.is_quiet) for each in candidates]

    def has_begun(self, ticket: Ticket) -> None:
        """Note the first token of a request; one that was alone makes place for others."""
        lease = ticket.lease.result()
        lease.replica.begun(lease)
        if ticket.alone and self.failures.suspects.has_begun(ticket.request):
            self.queue.release(ticket.request)
        # Another one of its client may start.
        self.grant()

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
        if tokens is not None:
            self.failures.answered(request)
        self.last_used = now
        self._set_keep_alive(request)
        self.grant()

    def _set_keep_alive(self, request: AnyRequest) -> None:
        wanted = self.spec.keep_alive if request.keep_alive is None else request.keep_alive
        if request.lengthens and (self.keep_alive < 0 or 0 <= wanted < self.keep_alive):
            return
        self.keep_alive = wanted

    def progress(self) -> Progress:
        """Return the progress event for a request in the queue."""
        if self.is_ready:
            return Progress("queued", 0, len(self.queue))
        return Progress("loading", *self.stage[1:])

    async def ready_replica(self, request: AnyRequest | None = None) -> Replica:
        """Wait for a loaded replica, free or not, no longer than the `request` may wait.

        One that runs something which has to be alone is not for the requests of others.

        Raises:
            Loading, QueueTimeout: the request may not wait longer.
            HeadraceError: the load failed or was refused.
        """
        began = self._clock()
        while True:
            self.check()
            for replica in self.replicas:
                alone = request is not None and replica.has_others(request.client, alone=True)
                if replica.is_ready and replica.unloading is None and not alone:
                    return replica
            wait_s = None if request is None else self.wait_s(request, began)
            ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._load_waits.add(ready)
            try:
                async with asyncio.timeout(wait_s):
                    await ready
            except TimeoutError:
                # The time has passed, or the forecast has changed: `wait_s` raises, or waits on.
                continue
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
        self.queue.pass_alone()
        self.failures.loaded()
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

    def reset(self) -> None:
        """Clear the failure and its history."""
        self.failures.reset()
        self.clear_wanted()

    def apply(self, spec: ModelSpec, *, in_place: bool = False) -> list[Replica]:
        """Serve another specification (workers do if `in_place`); return the retired replicas."""
        old, self.spec = self.spec, spec
        self.keep_alive = spec.keep_alive
        if in_place or not needs_new_worker(old, spec):
            self._resize(spec)
            return [replica for replica in self.retired if replica.unloading is None]
        retiring, self.replicas = self.replicas, self.new_replicas(spec)
        self.replicas[: len(self.coming)], self.coming = self.coming, []
        return self._retire(retiring)

    def retire(self) -> None:
        """Stop serving the model; running requests continue."""
        self.draining = True
        retiring, self.replicas = self.replicas, []
        self._retire(retiring)

    def _resize(self, spec: ModelSpec) -> None:
        count = self.copies or spec.replicas
        self._retire(self.replicas[count:])
        self.replicas = self.replicas[:count]
        for replica in self.replicas:
            replica.configure(spec)
        self.replicas += self.new_replicas(spec)[len(self.replicas) :]

    def _retire(self, retiring: list[Replica]) -> list[Replica]:
        for replica in retiring:
            replica.close(_RETIRED)
            self.retired.add(replica)
        self.became_unready()
        return retiring

    def new_replicas(self, spec: ModelSpec) -> list[Replica]:
        """Return empty replicas for a specification."""
        count = self.copies or spec.replicas
        return [Replica(spec, number, next(_serials), self._clock) for number in range(count)]

    @property
    def room(self) -> int:
        """How many requests of a class may wait; while nothing is loaded, also for the slots."""
        return self.spec.max_queued + (0 if self.is_ready else max(1, self.slots))


def _settle(ready: asyncio.Future[None], error: HeadraceError | None = None) -> None:
    if ready.done():
        return
    if error is None:
        ready.set_result(None)
    else:
        ready.set_exception(error)
