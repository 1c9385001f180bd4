"""Brings models into memory and takes them out again: in order, within the budgets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Protocol

from headrace.core.errors import (
    DoesNotFit,
    Draining,
    HeadraceError,
    LoadFailed,
    OutOfMemory,
    WorkerDied,
)
from headrace.core.model import ModelSpec
from headrace.core.status import EventKind, Footprint
from headrace.pool.feed import Feed
from headrace.pool.ledger import Ledger
from headrace.pool.policy import Rules
from headrace.pool.replica import OnProgress, OpenWorker, PooledWorker, Replica
from headrace.pool.room import Room, Unwanted
from headrace.pool.seat import Seat
from headrace.pool.watch import Nobody, Watch

log = logging.getLogger("headrace.pool")

_HOUSEKEEPING_S = 0.5


class Sizing(Protocol):
    """Knows what models take. Blocking; called on threads."""

    def footprint(self, spec: ModelSpec, on_progress: OnProgress) -> Footprint:
        """Return what a load needs; finds the model, and fetches it if it has to.

        Raises:
            HeadraceError: there is no such model, or nothing can run it.
        """
        ...

    def remember(self, spec: ModelSpec, devices: dict[str, int], load_s: float) -> None:
        """Keep what a load took."""
        ...

    def largest_context(self, spec: ModelSpec, budgets: dict[str, int]) -> int | None:
        """Return how many tokens of context would fit into the whole budgets, if that is known."""
        ...


class KeepSpare(Protocol):
    """Keeps a process ahead of the next load."""

    def keep(self, wanted: bool) -> None:
        """Have one or have none. Returns at once."""
        ...

    async def aclose(self) -> None:
        """Have none."""
        ...


class Loader:
    """Keeps the models of a pool in memory.

    `spare` is kept while something may be loaded; `watch` looks on at each load.
    """

    spare: KeepSpare | None = None
    watch: Watch = Nobody()

    def __init__(
        self,
        seats: Callable[[], Iterable[Seat]],
        open_worker: OpenWorker,
        sizing: Sizing,
        ledger: Ledger,
        rules: Rules,
        feed: Feed,
        clock: Callable[[], float],
    ) -> None:
        self.room = Room(seats, ledger, rules, self._evict, clock)
        self._seats = seats
        self._open_worker = open_worker
        self.sizing = sizing
        self._feed = feed
        self._clock = clock
        self._loading = asyncio.Semaphore(rules.max_loading)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._housekeeper: asyncio.Task[None] | None = None
        self._closing = False

    def keep_to(self, rules: Rules) -> None:
        """Keep to other rules from now on; what loads already is not counted again."""
        if rules.max_loading != self.room.rules.max_loading:
            self._loading = asyncio.Semaphore(rules.max_loading)
        self.room.rules = rules

    def start(self) -> None:
        """Begin to keep house. Idempotent."""
        if self._housekeeper is None:
            self._housekeeper = asyncio.create_task(self._keep_house(), name="pool housekeeping")

    def want(self, seat: Seat, *, may_evict: bool = True) -> None:
        """See to it that the model becomes ready. Idempotent.

        The first replica may push others out; further ones come where there is room.
        """
        if self._closing or not seat.spec.enabled:
            return
        if seat.has_given_up:
            if not seat.is_ready and seat.failure is not None:
                seat.refuse(LoadFailed(f"{seat.spec.name} has failed: {seat.failure.message}"))
            return
        self.start()
        # Nobody has to go for the sake of a second one.
        may_evict = may_evict and not seat.is_ready
        for place, replica in enumerate(seat.replicas):
            # One that is being unloaded comes back by itself, if somebody waits then; one that has
            # died, when its watch has seen it.
            if replica.loading is None and replica.unloading is None and replica.worker is None:
                bringing = self._bring(seat, replica, may_evict=may_evict and not place)
                replica.loading = self._task(bringing, f"load {replica.key}")

    def dismiss(
        self, seat: Seat, replica: Replica, why: EventKind, drain_s: float = 0.0
    ) -> asyncio.Task[None]:
        """Close the door, let the running requests end within `drain_s`, and unload.

        The task ends when the memory is back.
        """
        replica.closed = True
        if replica.unloading is None:
            replica.unloading = self._task(
                self._unload(seat, replica, why, drain_s), f"unload {replica.key}"
            )
        return replica.unloading

    def released(self, seat: Seat) -> None:
        """Look whether a model that has answered is to go."""
        self.room.notify()
        self.let_go(seat)

    def let_go(self, seat: Seat) -> None:
        """Unload what only ended its requests, and what nobody has used for long enough."""
        for replica in tuple(seat.retired):
            if not replica.leases and replica.unloading is None:
                self.dismiss(seat, replica, "unloaded")
        if seat.keep_alive < 0 or seat.spec.pinned or len(seat.line):
            return
        for replica in seat.replicas:
            idle = replica.is_ready and not replica.leases and replica.unloading is None
            if idle and self._clock() - replica.idle_since >= seat.keep_alive:
                self.dismiss(seat, replica, "expired")

    def give_up(self) -> None:
        """Begin no load any more, and end those under way."""
        self._closing = True
        for seat in self._seats():
            for replica in seat.replicas:
                if replica.loading is not None and not replica.is_ready:
                    self.dismiss(seat, replica, "unloaded")

    async def aclose(self) -> None:
        """Give up all loads and unload everything."""
        self.give_up()
        going: list[asyncio.Task[None]] = []
        for seat in self._seats():
            for one in seat.everybody():
                one.hurry()
                going.append(self.dismiss(seat, one, "unloaded"))
        if going:
            await asyncio.wait(going)
        if self._housekeeper is not None:
            self._housekeeper.cancel()
        if self.spare is not None:
            await self.spare.aclose()
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _bring(self, seat: Seat, replica: Replica, *, may_evict: bool) -> None:
        again = False
        try:
            await asyncio.sleep(max(0.0, min(seat.retry_at - self._clock(), 60.0)))
            await self._load(seat, replica, may_evict=may_evict)
        except Unwanted:
            # Somebody may have come while it was looked at; for him others may be pushed out.
            again = replica in seat.replicas[:1] and seat.is_waited_for and not seat.is_ready
        except HeadraceError as error:
            again = self._load_failed(seat, replica, error)
        except Exception as error:
            # Whatever a source or a library raises: those who wait must hear of it.
            wrapped = LoadFailed(f"{seat.spec.name} could not be loaded.", detail=repr(error))
            self._load_failed(seat, replica, wrapped)
            raise
        finally:
            replica.loading = None
            self.room.notify()
        if again:
            self.want(seat)

    def _load_failed(self, seat: Seat, replica: Replica, error: HeadraceError) -> bool:
        """Tell everybody; return whether it is tried again unasked."""
        broken = isinstance(error, LoadFailed | WorkerDied | OutOfMemory)
        known = seat.restarts > 0 and broken and replica.footprint is not None
        if isinstance(error, Draining):
            seat.refuse(error)
            return False
        seat.wanted_until = 0.0
        if isinstance(error, DoesNotFit):
            seat.last_error = error.message
        else:
            seat.failed(error, self.room.rules, counts=broken)
        self._tell("load_failed", seat, replica, error=error.message, detail=error.detail)
        if seat.has_given_up:
            self._tell("failed", seat, replica, error=error.message)
        if not seat.is_ready:
            seat.refuse(error)
        # One that has served comes back by itself; one that never has waits to be asked.
        return known and not seat.has_given_up

    async def _load(self, seat: Seat, replica: Replica, *, may_evict: bool) -> None:
        replica.began = self._clock()
        if not _is_remote(replica):
            self._keep_spare(True)
        need = await asyncio.to_thread(self.sizing.footprint, replica.spec, replica.report)
        replica.footprint = need
        await self.room.book(seat, replica, need.devices, may_evict=may_evict)
        try:
            async with self._loading:
                await self._start(seat, replica, need)
        except BaseException:
            self.room.ledger.release(replica.key)
            raise

    async def _start(self, seat: Seat, replica: Replica, need: Footprint) -> None:
        replica.began = began = self._clock()
        self._tell("loading", seat, replica, need=dict(need.devices), how=need.how)
        worker = self._open_worker(replica.spec, replica.report)
        try:
            async with self.watch.loading(worker, replica.spec):
                await worker.start()
            load_s = self._clock() - began
            # What has died since its load holds nothing; its watch will see to it.
            # What cannot be seen of a device, as in a container, is as it was estimated.
            measured = {**need.devices, **await worker.memory()}
        except BaseException:
            await worker.aclose()
            raise
        self.room.ledger.settle(replica.key, measured)
        replica.up(worker, load_s, dict(measured))
        self._task(self._watch(seat, replica, worker), f"watch {replica.key}")
        self._tell("ready", seat, replica, ms=round(load_s * 1000), memory=dict(measured))
        seat.now_ready()
        self._task(self._remember(replica.spec, dict(measured), load_s), "remember")

    async def _remember(self, spec: ModelSpec, devices: dict[str, int], load_s: float) -> None:
        # A full disk takes nothing from those who are served.
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self.sizing.remember, spec, devices, load_s)

    async def _unload(self, seat: Seat, replica: Replica, why: EventKind, drain_s: float) -> None:
        replica.closed = True
        if (loading := replica.loading) is not None:
            replica.loading = None
            loading.cancel()
            await asyncio.wait({loading})
        was_up, worker, held = replica.is_ready, replica.worker, dict(replica.memory)
        try:
            if worker is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(drain_s):
                        await replica.idle()
                await worker.aclose()
        finally:
            # Whatever went wrong: the place is free for the next load.
            self.room.ledger.release(replica.key)
            replica.down()
            seat.retired.discard(replica)
            replica.unloading, replica.closed = None, False
            if not seat.is_ready:
                seat.not_ready()
        if was_up:
            self._tell(why, seat, replica)
            self._task(self._remember(replica.spec, held, replica.load_s), "remember")
        self.room.notify()
        if seat.is_waited_for and not seat.draining:
            self.want(seat)

    async def _watch(self, seat: Seat, replica: Replica, worker: PooledWorker) -> None:
        await worker.died.wait()
        if replica.worker is not worker or replica.unloading is not None:
            return
        up_s = self._clock() - replica.loaded_at
        reason = worker.models()[0].reason or "it ended"
        self.room.ledger.release(replica.key)
        replica.down()
        replica.took_ill()
        if not seat.is_ready:
            seat.not_ready()
        if up_s > self.room.rules.crash_window_s:
            seat.steady()
        seat.restarts += 1
        seat.failed(WorkerDied(reason), self.room.rules)
        self._tell("died", seat, replica, reason=reason)
        if seat.has_given_up:
            self._tell("failed", seat, replica, error=reason)
            if not seat.is_ready:
                seat.refuse(LoadFailed(f"{seat.spec.name} has failed: {reason}"))
        elif replica in seat.replicas:
            seat.failure = None
            self.want(seat)
        else:
            seat.retired.discard(replica)
        self.room.notify()
        await worker.aclose()

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            for seat in tuple(self._seats()):
                self.let_go(seat)
                for replica in seat.everybody():
                    self._measure(replica)
            self._trim()
            self._look_ahead()

    def _look_ahead(self) -> None:
        """Have a process ready for the next load, if there can be one."""
        places = [one for seat in self._seats() if seat.spec.enabled for one in seat.replicas]
        if not any(one.loading for one in places):
            self._keep_spare(any(one.worker is None and not _is_remote(one) for one in places))

    def _keep_spare(self, wanted: bool) -> None:
        if self.spare is not None:
            self.spare.keep(wanted and self.room.rules.spare and not self._closing)

    def _measure(self, replica: Replica) -> None:
        """Follow a process that has grown; what it gave back it may take again."""
        if not replica.is_ready or replica.worker is None:
            return
        now = replica.worker.models()[0].memory or 0
        if now > replica.memory.get("cpu", 0):
            replica.memory = {**replica.memory, "cpu": now}
            self.room.ledger.settle(replica.key, replica.memory)

    def _trim(self) -> None:
        for seat, replica in self.room.excessive():
            self._evict(seat, replica, by="the budget")

    def _evict(self, seat: Seat, replica: Replica, *, by: str) -> asyncio.Task[None]:
        if replica.unloading is None:
            seat.evictions += 1
            self._tell("evicted", seat, replica, by=by)
        return self.dismiss(seat, replica, "unloaded")

    def _tell(self, kind: EventKind, seat: Seat, replica: Replica, **data: Any) -> None:
        self._feed.tell(kind, seat.spec.name, replica.number, **data)

    def _task(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("headrace.pool.task", exc_info=error)


def _is_remote(replica: Replica) -> bool:
    return replica.footprint is not None and not replica.footprint.devices
