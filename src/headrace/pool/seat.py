"""One model in the pool: its line, its replicas, and how it has fared."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator

from headrace.core.errors import (
    Disabled,
    Draining,
    HeadraceError,
    LoadFailed,
    Loading,
    QueueFull,
)
from headrace.core.events import Progress
from headrace.core.model import LIVE_SETTINGS, ModelInfo, ModelSpec, State
from headrace.pool.line import Forecast, Line, Request, Waiter, size_of
from headrace.pool.policy import Rules, backoff_s, choose_replica
from headrace.pool.replica import Lease, Replica, blocks_of

_UNKNOWN_LOAD_S = 5.0
_serials = itertools.count()


class Seat:
    """A model's place. Requests join the line; `grant` gives slots to those whose turn it is."""

    def __init__(self, spec: ModelSpec, clock: Callable[[], float]) -> None:
        self.spec = spec
        self.line = Line(clock)
        self.forecast = Forecast()
        self.draining = False
        self.failure: HeadraceError | None = None
        self.last_error: str | None = None
        self.retry_at = 0.0
        self.keep_alive = spec.keep_alive
        self.last_used: float | None = None
        self.restarts = self.evictions = self.continuations = 0
        self.wanted_until = 0.0
        self.reference: str | None = None
        self.preload = spec.preload
        self._clock = clock
        self._failures = 0
        self._crashes: deque[float] = deque(maxlen=64)
        self._unready_since = clock()
        self._watchers: set[asyncio.Future[None]] = set()
        self.retired: set[Replica] = set()
        self.replicas = self._places(spec)

    def __repr__(self) -> str:
        """Tell the name, the state and the line."""
        return f"<Seat {self.spec.name} {self.state}, {len(self.line)} waiting>"

    @property
    def state(self) -> State:
        """How the model stands as a whole: as well as its best replica."""
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
        """Whether a replica is loaded that is not about to go."""
        return any(one.is_ready and one.unloading is None for one in self.replicas)

    @property
    def info(self) -> ModelInfo | None:
        """What a worker has told of the model; None before the first load."""
        return next((one.info for one in self.replicas if one.info is not None), None)

    @property
    def slots(self) -> int:
        """How many requests run at once; what is expected, while nothing is loaded."""
        up = [replica.max_running for replica in self.replicas if replica.is_ready]
        return sum(up) if up else max((one.max_running for one in self.replicas), default=0)

    @property
    def running(self) -> int:
        """How many slots are taken."""
        return sum(replica.running for replica in self.everybody())

    def wall(self, at: float) -> float:
        """Return a time of the pool's clock as Unix time."""
        return time.time() + at - self._clock()

    def everybody(self) -> Iterator[Replica]:
        """All replicas, those too that only end what they have begun."""
        yield from self.replicas
        yield from self.retired

    def join(self, request: Request, *, first: bool = False) -> Waiter:
        """Stand in line. `first` is for an answer that was cut off: in front, and always taken.

        Raises:
            Draining, Disabled: nothing is served.
            LoadFailed: it has failed; with the time after which it is tried again, if it is.
            QueueFull: with the time after which there should be a place.
        """
        self.check(request)
        now = self._clock()
        waiter = Waiter(request, now, first=first)
        if len(self.replicas) > 1:
            waiter.blocks = blocks_of(request)
        if not first and len(self.line) >= self._places_for(request):
            raise QueueFull(
                f"{len(self.line)} requests wait for {self.spec.name} already.",
                retry_after_s=self.retry_after_s(),
            )
        self.line.join(waiter)
        self.grant()
        return waiter

    def check(self, request: Request | None = None) -> None:
        """Refuse what comes while nothing is served.

        Raises:
            Draining, Disabled, LoadFailed: by what the matter is.
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
        """Return after how long one who finds the line full should come again."""
        if not self.is_ready:
            return self.remaining_load_s() or _UNKNOWN_LOAD_S
        started = [lease.since for one in self.replicas for lease in one.leases]
        return self.forecast.retry_after_s(self._clock(), started)

    def remaining_load_s(self) -> float | None:
        """Return how long the load will still take; None where nobody knows."""
        known = [one for one in self.replicas if one.footprint and one.footprint.load_s is not None]
        if not known or known[0].footprint is None or known[0].footprint.load_s is None:
            return None
        began = known[0].began if known[0].loading else 0.0
        gone = self._clock() - began if began else 0.0
        return max(1.0, known[0].footprint.load_s - gone)

    def impatient(self, waiter: Waiter) -> Loading | None:
        """Return what one gets who does not wait as long as the load will take."""
        most = waiter.request.load_wait_s
        if most is None or self.is_ready:
            return None
        remaining, waited = self.remaining_load_s() or 0.0, self._clock() - waiter.joined
        if waited + remaining <= most:
            return None
        # He comes again: the load is for him.
        wait_s = remaining or _UNKNOWN_LOAD_S
        self.wanted_until = self._clock() + 2 * wait_s + 60.0
        return Loading(f"{self.spec.name} is loading.", retry_after_s=wait_s)

    def grant(self) -> None:
        """Give the free slots to those whose turn it is."""
        while (waiter := self.line.next()) is not None:
            size = size_of(waiter.request)
            candidates = [replica.candidate(waiter.blocks) for replica in self.replicas]
            number = choose_replica(candidates, size)
            if number is None:
                return
            self.line.leave(waiter)
            self.line.granted(waiter)
            replica = self.replicas[number]
            lease = replica.take(waiter, min(size, replica.max_running))
            if waiter.turn.done():
                replica.give_back(lease)
            else:
                waiter.turn.set_result(lease)

    def abandon(self, waiter: Waiter, tokens: float | None = None) -> None:
        """Let somebody go, out of the line or out of his slot. Idempotent.

        `tokens` is what the request came to.
        """
        self.line.leave(waiter)
        if not waiter.turn.done():
            waiter.turn.cancel()
        elif not waiter.turn.cancelled() and waiter.turn.exception() is None:
            self._release(waiter, waiter.turn.result(), tokens)

    def _release(self, waiter: Waiter, lease: Lease, tokens: float | None) -> None:
        now, request = self._clock(), waiter.request
        if lease in lease.replica.leases:
            self.forecast.served(now - lease.since)
            self.line.correct(waiter, waiter.cost if tokens is None else tokens)
        lease.replica.give_back(lease)
        self.last_used = now
        self.keep_alive = self.spec.keep_alive if request.keep_alive is None else request.keep_alive
        self.grant()

    def progress(self) -> Progress:
        """Tell one who waits what he waits for."""
        if self.is_ready:
            return Progress("queued", 0, len(self.line))
        stage = next((one.stage for one in self.replicas if one.loading), ("", 0, 0))
        return Progress("loading", stage[1], stage[2])

    async def up(self) -> Replica:
        """Wait for a replica that is loaded and stays, whether it has a slot or not.

        Raises:
            HeadraceError: why there will be none.
        """
        while True:
            self.check()
            for replica in self.replicas:
                if replica.is_ready and replica.unloading is None:
                    return replica
            watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._watchers.add(watcher)
            try:
                await watcher
            finally:
                self._watchers.discard(watcher)

    @property
    def is_waited_for(self) -> bool:
        """Whether somebody would miss the model now."""
        return bool(len(self.line) or self._watchers) or self._clock() < self.wanted_until

    def now_ready(self) -> None:
        """A replica is loaded: serve those who wait."""
        now = self._clock()
        for waiter in self.line:
            waiter.load_s += now - max(waiter.joined, self._unready_since)
        if not self.has_given_up:
            self.failure = None
        self.wanted_until = 0.0
        for watcher in self._watchers:
            _settle(watcher)
        self.grant()

    def not_ready(self) -> None:
        """No replica is loaded any more."""
        self._unready_since = self._clock()

    def refuse(self, error: HeadraceError) -> None:
        """Send away all who wait."""
        for waiter in list(self.line):
            self.line.leave(waiter)
            if not waiter.turn.done():
                waiter.turn.set_exception(error)
        self.refuse_watchers(error)

    def refuse_watchers(self, error: HeadraceError) -> None:
        """Send away those who wait for the load alone: an operator, somebody who counts."""
        for watcher in self._watchers:
            _settle(watcher, error)

    @property
    def has_given_up(self) -> bool:
        """Whether only a reset brings the model back."""
        return self.retry_at == float("inf")

    def failed(self, error: HeadraceError, rules: Rules, *, counts: bool = True) -> float:
        """Note a crash or a failed load; return after how many seconds to try again.

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

    def steady(self) -> None:
        """It has run for long enough: what was is forgotten."""
        self._failures = 0

    def reset(self) -> None:
        """Forget that it has failed."""
        self.failure = None
        self.retry_at = self.wanted_until = 0.0
        self._failures = 0
        self._crashes.clear()

    def apply(self, spec: ModelSpec) -> list[Replica]:
        """Serve another specification; return the replicas that only end what they have begun."""
        old, self.spec = self.spec, spec
        self.keep_alive = spec.keep_alive
        if not needs_new_worker(old, spec):
            self._resize(spec)
            return [one for one in self.retired if one.unloading is None]
        gone, self.replicas = self.replicas, self._places(spec)
        return self._retire(gone)

    def _resize(self, spec: ModelSpec) -> None:
        self._retire(self.replicas[spec.replicas :])
        self.replicas = self.replicas[: spec.replicas]
        for replica in self.replicas:
            replica.spec = spec
            number = replica.number
            replica.weight = spec.weights[number] if number < len(spec.weights) else 1.0
        self.replicas += self._places(spec)[len(self.replicas) :]

    def _retire(self, gone: list[Replica]) -> list[Replica]:
        for replica in gone:
            replica.closed = True
            self.retired.add(replica)
        if not self.is_ready:
            self.not_ready()
        return gone

    def _places(self, spec: ModelSpec) -> list[Replica]:
        return [
            Replica(spec, number, next(_serials), self._clock) for number in range(spec.replicas)
        ]

    def _places_for(self, request: Request) -> int:
        if self.is_ready:
            free = max((one.candidate(()).free for one in self.replicas), default=0)
            served_at_once = not len(self.line) and free > 0
            return self.spec.max_queued + (1 if served_at_once else 0)
        return self.spec.max_queued + max(1, self.slots)


def _settle(watcher: asyncio.Future[None], error: HeadraceError | None = None) -> None:
    if watcher.done():
        return
    if error is None:
        watcher.set_result(None)
    else:
        watcher.set_exception(error)


def needs_new_worker(old: ModelSpec, new: ModelSpec) -> bool:
    """Tell whether a change concerns what a worker was loaded with."""
    return any(
        getattr(old, name) != getattr(new, name)
        for name in ModelSpec.__struct_fields__
        if name not in LIVE_SETTINGS
    )
