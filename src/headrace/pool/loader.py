"""Loader: loads and unloads the models of a pool, within the budgets of memory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

import msgspec

from headrace.core.errors import Draining, HeadraceError, LoadFailed, OutOfMemory, WorkerDied
from headrace.core.model import ModelSpec
from headrace.core.status import EventKind, Footprint
from headrace.machine import HOST
from headrace.pool.entry import ModelEntry
from headrace.pool.events import EventBus
from headrace.pool.ledger import Ledger, named, to_book
from headrace.pool.memory import MemoryQueue, Sizing, Unwanted
from headrace.pool.observer import NullObserver, Observer
from headrace.pool.places import KeepWarm, Places
from headrace.pool.policy import Rules
from headrace.pool.replica import Lease, Replica
from headrace.pool.worker import OpenWorker, PooledWorker

log = logging.getLogger("headrace.pool")

_HOUSEKEEPING_S = 0.5
_DYING_S, _LAST_S = 10.0, 0.5


class Loader:
    """Loads and unloads the models of a pool.

    `warm` is kept while a load is possible; `observer` observes each load.
    """

    warm: KeepWarm | None = None
    observer: Observer = NullObserver()

    def __init__(
        self,
        entries: Callable[[], Iterable[ModelEntry]],
        open_worker: OpenWorker,
        sizing: Sizing,
        ledger: Ledger,
        rules: Rules,
        events: EventBus,
        clock: Callable[[], float],
    ) -> None:
        self.memory = MemoryQueue(entries, ledger, rules, self._evict, clock)
        self._entries = entries
        self._open_worker = open_worker
        self.sizing = sizing
        self._events = events
        self._clock = clock
        self._places = Places(rules.max_loading)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._housekeeper: asyncio.Task[None] | None = None
        self._closing = self._sees_gpus = False

    def apply_rules(self, rules: Rules) -> None:
        """Apply changed rules; loads that have started do not count for a new `max_loading`."""
        if rules.max_loading != self.memory.rules.max_loading:
            self._places = Places(rules.max_loading)
        self.memory.rules = rules

    def start(self) -> None:
        """Start housekeeping. Idempotent."""
        if self._housekeeper is None:
            self._housekeeper = asyncio.create_task(self._housekeep(), name="pool housekeeping")

    def ensure_loaded(self, entry: ModelEntry, *, may_evict: bool = True) -> None:
        """Start to load the replicas that are not loaded. Idempotent.

        The load of the first one may evict other models; the others need free memory.
        """
        if self._closing or not entry.spec.enabled:
            return
        if entry.failures.is_open:
            if not entry.is_ready:
                entry.refuse(entry.failures.refusal(entry.spec.name))
            return
        self.start()
        # No other model is evicted for a second replica.
        may_evict = may_evict and not entry.is_ready
        for number, replica in enumerate(entry.replicas):
            # A replica that is being unloaded is loaded again afterwards if it is wanted then; one
            # that has died, when `_watch` has noticed it.
            if replica.is_empty:
                work = self._run_load(entry, replica, may_evict=may_evict and not number)
                replica.begin_loading(self._task(work, f"load {replica.key}"))

    def unload(
        self, entry: ModelEntry, replica: Replica, why: EventKind, drain_s: float = 0.0
    ) -> asyncio.Task[None]:
        """Take no new requests, let running ones end within `drain_s`, and unload.

        The task ends when the memory is back.
        """
        if replica.unloading is not None:
            return replica.unloading
        work = self._unload(entry, replica, replica.loading, why, drain_s)
        task = self._task(work, f"unload {replica.key}")
        replica.begin_unloading(task)
        return task

    def request_ended(self, entry: ModelEntry) -> None:
        """Unload a model if it is not needed after this request."""
        self.memory.notify()
        self.unload_idle(entry)

    def unload_idle(self, entry: ModelEntry) -> None:
        """Unload retired replicas without requests, and replicas idle for `keep_alive`."""
        for replica in tuple(entry.retired):
            if not replica.leases and replica.unloading is None:
                self.unload(entry, replica, "unloaded")
        if entry.keep_alive < 0 or entry.spec.pinned or len(entry.queue):
            return
        for replica in entry.replicas:
            idle = replica.is_ready and not replica.leases and replica.unloading is None
            if idle and self._clock() - replica.idle_since >= entry.keep_alive:
                self.unload(entry, replica, "expired")

    def stop_loading(self) -> None:
        """Start no more loads, and cancel those in progress."""
        self._closing = True
        for entry in self._entries():
            for replica in entry.replicas:
                if replica.loading is not None and not replica.is_ready:
                    self.unload(entry, replica, "unloaded")

    async def aclose(self) -> None:
        """Cancel all loads and unload everything."""
        self.stop_loading()
        unloading: dict[bool, list[asyncio.Task[None]]] = {False: [], True: []}
        for entry in self._entries():
            for replica in entry.all_replicas():
                replica.stop_draining()
                has_died = replica.worker is not None and replica.worker.died.is_set()
                unloading[has_died].append(self.unload(entry, replica, "unloaded"))
        # The end of the service does not wait for what a dead process still holds.
        for tasks, timeout_s in ((unloading[False], None), (unloading[True], _LAST_S)):
            if tasks:
                await asyncio.wait(tasks, timeout=timeout_s)
        if self._housekeeper is not None:
            self._housekeeper.cancel()
        if self.warm is not None:
            await self.warm.aclose()
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _run_load(self, entry: ModelEntry, replica: Replica, *, may_evict: bool) -> None:
        again = False
        try:
            await asyncio.sleep(max(0.0, min(entry.failures.retry_at - self._clock(), 60.0)))
            await self.load(entry, replica, may_evict=may_evict)
        except Unwanted as error:
            self._not_loaded(entry, replica, str(error))
            # A request that has arrived since may evict others.
            again = replica in entry.replicas[:1] and entry.is_wanted and not entry.is_ready
        except HeadraceError as error:
            again = self._load_failed(entry, replica, error)
        except Exception as error:
            # A source or a library can raise anything: the waiting requests must have an end.
            wrapped = LoadFailed(f"{entry.spec.name} could not be loaded.", detail=repr(error))
            again = self._load_failed(entry, replica, wrapped)
            raise
        finally:
            replica.loading_ended()
            self.memory.notify()
            if again:
                self.ensure_loaded(entry)

    def _not_loaded(self, entry: ModelEntry, replica: Replica, reason: str) -> None:
        if reason and reason != replica.reason:
            self._publish("not_loaded", entry, replica, reason=reason)
        replica.reason = reason or None

    def _load_failed(self, entry: ModelEntry, replica: Replica, error: HeadraceError) -> bool:
        """Record a failed load; return whether to load again, for which the requests wait."""
        replica.reason = error.message
        if isinstance(error, Draining):
            entry.refuse(error)
            return False
        broken = isinstance(error, LoadFailed | WorkerDied | OutOfMemory)
        entry.failures.load_failed(error, self.memory.rules, counts=broken)
        self._publish("load_failed", entry, replica, error=error.message, detail=error.detail)
        self._publish_failed(entry, replica, error)
        # A model that has served is loaded again; one that never has, at the next request.
        if broken and replica.info is not None and entry.failures.loads_again(self.memory.rules):
            entry.failures.recovered()
            return True
        entry.clear_wanted()
        if not entry.is_ready:
            is_open = entry.failures.is_open
            entry.refuse(entry.failures.refusal(entry.spec.name) if is_open else error)
        return False

    async def load(self, entry: ModelEntry, replica: Replica, *, may_evict: bool) -> None:
        """Load a replica in the task that it has for this; raises HeadraceError or Unwanted."""
        replica.starting()
        if not _is_remote(replica):
            self._keep_warm(True)
        need = await asyncio.to_thread(self.sizing.footprint, replica.spec, replica.report)
        replica.estimated(need)
        devices = await self.memory.book(entry, replica, need, may_evict=may_evict)
        need = msgspec.structs.replace(need, devices=devices, choices=())
        try:
            replica.place(need, self.memory.ledger.budgets)
            async with self._places.hold(need.load_s, lambda: self._overdue(replica)):
                await self._start(entry, replica, need)
        except BaseException:
            self.memory.ledger.release(replica.key)
            raise

    def _overdue(self, replica: Replica) -> None:
        replica.overdue()
        self.memory.notify()

    async def _start(self, entry: ModelEntry, replica: Replica, need: Footprint) -> None:
        replica.starting()
        began = self._clock()
        self._publish("loading", entry, replica, need=dict(need.devices), how=need.how)
        worker = self._open_worker(replica.placed_spec, replica.report)
        try:
            async with self.observer.loading(worker, replica.spec):
                await worker.start()
            load_s = self._clock() - began
            measured = self._measured(need.devices, await worker.memory())
        except BaseException:
            await worker.aclose()
            raise
        self.memory.ledger.settle(replica.key, to_book(need, measured))
        replica.loaded(worker, load_s, dict(measured))
        self._task(self._watch(entry, replica, worker), f"watch {replica.key}")
        ready = {"ms": round(load_s * 1000), "memory": dict(measured), "engine": need.engine}
        self._publish("ready", entry, replica, **ready)
        entry.became_ready()
        self._task(self._remember(replica.placed_spec, dict(measured), load_s), "remember")

    def _measured(self, planned: Mapping[str, int], held: Mapping[str, int]) -> dict[str, int]:
        """Return what a load has taken: what was measured, or planned where that is unknown.

        In a container, the driver of a GPU may not know our processes; where it has reported one,
        it reports all. A worker that has died since holds nothing; `_watch` handles its end.
        """
        self._sees_gpus |= any(device != HOST for device in held)
        if not (self._sees_gpus and held):
            return {**planned, **held}
        return {HOST: planned.get(HOST, 0), **held}

    async def _remember(self, spec: ModelSpec, devices: dict[str, int], load_s: float) -> None:
        # A full disk must not affect requests.
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self.sizing.remember, spec, devices, load_s)

    async def _unload(
        self,
        entry: ModelEntry,
        replica: Replica,
        load: asyncio.Task[None] | None,
        why: EventKind,
        drain_s: float,
    ) -> None:
        if load is not None:
            load.cancel()
            await asyncio.wait({load})
        was_ready, worker, held = replica.is_ready, replica.worker, dict(replica.memory)
        try:
            if worker is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(drain_s):
                        await replica.idle()
                await worker.aclose()
        finally:
            # Even after an error the replica is free for the next load.
            self.memory.ledger.release(replica.key)
            replica.unloaded()
            entry.retired.discard(replica)
            entry.became_unready()
        if was_ready:
            self._publish(why, entry, replica)
            self._task(self._remember(replica.placed_spec, held, replica.load_s), "remember")
        self.memory.notify()
        if entry.is_wanted and not entry.draining:
            self.ensure_loaded(entry)

    def worker_failed(self, entry: ModelEntry, lease: Lease, error: WorkerDied) -> None:
        """Note that a request got `error`: its worker takes no more, and will have ended soon.

        The error of an engine's own process arrives before the worker's end is noticed.
        """
        replica, worker = lease.replica, lease.worker
        if replica.worker is worker and replica.unloading is None:
            if not replica.lost:
                self._task(self._bury(entry, replica, worker), f"bury {replica.key}")
            replica.lose(lease, error)

    async def _bury(self, entry: ModelEntry, replica: Replica, worker: PooledWorker) -> None:
        """Unload a worker that reported its death, and lives."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DYING_S):
                await worker.died.wait()
                return
        if replica.worker is worker and replica.unloading is None:
            await self.unload(entry, replica, "died")

    async def _watch(self, entry: ModelEntry, replica: Replica, worker: PooledWorker) -> None:
        await worker.died.wait()
        if replica.worker is not worker or replica.unloading is not None:
            return
        up_s = self._clock() - replica.loaded_at
        reason = worker.models()[0].reason or "it ended"
        # A request may have been given the cause by the engine.
        error = replica.cause or worker.failure or WorkerDied(reason)
        leases = [*{*replica.lost, *replica.leases, *replica.guests}]
        entry.crashed(error, self.memory.rules, up_s=up_s, victims=leases)
        with self.memory.ledger.lingering(replica.key):
            replica.died()
            entry.became_unready()
            self._publish("died", entry, replica, reason=reason)
            self._restart(entry, replica, error)
            # Returns when the memory is free, for which a load may wait.
            await worker.aclose()
        self.memory.notify()

    def _restart(self, entry: ModelEntry, replica: Replica, error: HeadraceError) -> None:
        self._publish_failed(entry, replica, error)
        if entry.failures.is_open:
            if not entry.is_ready:
                entry.refuse(entry.failures.refusal(entry.spec.name))
        elif replica in entry.replicas:
            entry.failures.recovered()
            self.ensure_loaded(entry)
        if replica not in entry.replicas:
            entry.retired.discard(replica)
        self.memory.notify()

    def _publish_failed(self, entry: ModelEntry, replica: Replica, error: HeadraceError) -> None:
        if entry.failures.is_open:
            wait_s = round(entry.failures.wait_s, 1)
            self._publish("failed", entry, replica, error=error.message, retry_after_s=wait_s)

    async def _housekeep(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S)
            for entry in tuple(self._entries()):
                self.unload_idle(entry)
                for replica in entry.all_replicas():
                    self._update_memory(replica)
            for entry, replica in self.memory.excessive():
                self._evict(entry, replica, by="the budget")
            self._prepare_warm_process()

    def _prepare_warm_process(self) -> None:
        """Keep a process ready while a load is possible."""
        enabled = [entry for entry in self._entries() if entry.spec.enabled]
        replicas = [replica for entry in enabled for replica in entry.replicas]
        if not any(replica.loading for replica in replicas):
            self._keep_warm(any(r.worker is None and not _is_remote(r) for r in replicas))

    def _keep_warm(self, wanted: bool) -> None:
        if self.warm is not None:
            self.warm.keep(wanted and self.memory.rules.spare and not self._closing)

    def _update_memory(self, replica: Replica) -> None:
        """Raise the booking of a process that has grown; it is never lowered."""
        if replica.is_ready and replica.worker is not None and replica.footprint is not None:
            held = named(replica.worker.held, replica.footprint.devices)
            if replica.grown(held):
                booking = to_book(replica.footprint, replica.memory)
                self.memory.ledger.settle(replica.key, booking)

    def _evict(self, entry: ModelEntry, replica: Replica, *, by: str) -> asyncio.Task[None]:
        if replica.unloading is None:
            entry.evictions += 1
            self._publish("evicted", entry, replica, by=by)
        return self.unload(entry, replica, "unloaded")

    def _publish(self, kind: EventKind, entry: ModelEntry, replica: Replica, **data: Any) -> None:
        self._events.publish(kind, entry.spec.name, replica.number, **data)

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
