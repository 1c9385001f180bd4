"""Pool: many models behind one Backend."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import ClassVar

import msgspec

from headrace.core.adapter import names_of
from headrace.core.errors import ConfigError, Draining, HeadraceError, UnknownModel, WorkerDied
from headrace.core.events import ChoicesLeft, Event, Finish, Progress
from headrace.core.model import Capabilities, ModelInfo, ModelSpec
from headrace.core.preset import addressed, plain
from headrace.core.request import AnyRequest
from headrace.pool.attempt import Attempt
from headrace.pool.continuation import Continuation, Diverged, Way
from headrace.pool.entry import ModelEntry
from headrace.pool.events import EventBus
from headrace.pool.ledger import Ledger
from headrace.pool.loader import Loader, Sizing
from headrace.pool.observer import Observer
from headrace.pool.places import KeepWarm
from headrace.pool.policy import Rules
from headrace.pool.replica import Replica
from headrace.pool.requests import OpenRequests
from headrace.pool.worker import OpenWorker
from headrace.worker.spec import unloaded_info


class Pool:
    """A Backend over many models, each in as many processes as it has replicas.

    If it `is_node`, fronts of a cluster order how many replicas there are, and what is preloaded.
    """

    is_node: ClassVar[bool] = False

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        open_worker: OpenWorker,
        *,
        sizing: Sizing,
        ledger: Ledger,
        rules: Rules | None = None,
        warm: KeepWarm | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.events = EventBus()
        self.ledger = ledger
        self.entries: dict[str, ModelEntry] = {}
        self.leaving: list[ModelEntry] = []
        self.draining = self._started = False
        # Models whose load at the start takes longer than its forecast.
        self._late: list[ModelEntry] = []
        self._names: dict[str, str] = {}
        self._clock = clock
        self.loader = Loader(
            self._all_entries, open_worker, sizing, ledger, rules or Rules(), self.events, clock
        )
        self.loader.warm = warm
        self._requests = OpenRequests(clock)
        self._closing: asyncio.Task[None] | None = None
        for spec in specs:
            self.add(spec)

    def __repr__(self) -> str:
        """Describe the entries and the memory."""
        return f"<Pool {list(self.entries.values())!r}, {self.ledger!r}>"

    @property
    def ready(self) -> bool:
        """Whether the start has ended and requests can be answered, if need be after a load."""
        return (
            not self.draining
            and self._started
            and any(
                entry.spec.enabled and not entry.failures.wait_s and entry not in self._late
                for entry in self.entries.values()
            )
        )

    def attach_observer(self, observer: Observer) -> None:
        """Attach an observer. Call before the first request."""
        self.loader.observer = observer

    def add(self, spec: ModelSpec) -> ModelEntry:
        """Add a model; nothing is loaded yet."""
        entry = self.entries[spec.name] = ModelEntry(spec, self._clock, copies=int(self.is_node))
        entry.draining = self.draining
        self.rebuild_names()
        return entry

    def remove(self, entry: ModelEntry) -> None:
        """Remove a model: running requests end, waiting ones are refused, then it is unloaded."""
        del self.entries[entry.spec.name]
        self.leaving = [old for old in self.leaving if list(old.all_replicas())] + [entry]
        self.rebuild_names()
        entry.refuse(UnknownModel(f"The model {entry.spec.name!r} is not served any more."))
        entry.retire()
        self.loader.unload_idle(entry)

    def rebuild_names(self) -> None:
        """Rebuild the index of names and aliases."""
        self._names = {
            name: entry.spec.name for entry in self.entries.values() for name in entry.spec.names
        }

    def check_names(self, spec: ModelSpec) -> None:
        """Check that no other model has a name of this one, and that it has none twice.

        Raises:
            ConfigError: one is taken.
        """
        for name, count in Counter(spec.names).items():
            owner = self._names.get(name, spec.name)
            if count > 1 or owner != spec.name:
                raise ConfigError(f"{name} is already a name of {owner}.", param="aliases")

    def entry(self, name: str) -> ModelEntry:
        """Find a model by name or alias; an only model is found without a name.

        Raises:
            UnknownModel: names the models that are served.
        """
        if not name and len(self.entries) == 1:
            return next(iter(self.entries.values()))
        if name not in self._names:
            served = ", ".join(sorted(self._names))
            raise UnknownModel(
                f"The model {name!r} is not served here; there is {served}.", param="model"
            )
        return self.entries[self._names[name]]

    async def start(self) -> None:
        """Load the models with `preload`, in order, as long as they fit.

        Raises:
            HeadraceError: of the first that failed, after all have been tried.
        """
        self.loader.start()
        preloaded = () if self.is_node else self.entries.values()
        entries = [e for e in preloaded if e.preload and e.spec.enabled]
        for entry in entries:
            self.loader.ensure_loaded(entry, may_evict=False)
            # A load that hangs does not keep the next one waiting.
            while any(r.loading and not r.is_overdue for r in entry.replicas):
                await self.loader.memory.changed()
        self._started = True
        late = {r.loading: e for e in entries for r in e.replicas if r.loading}
        if late:
            self._late = [*late.values()]
            await asyncio.wait(late)
            self._late = []
        for entry in entries:
            if entry.failures.error is not None:
                raise entry.failures.error

    def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        """Return the stream of a worker; if the worker dies, another one continues if possible.

        Raises:
            HeadraceError: in the stream, of any family, at any time before the Finish.
        """
        return self._answer(request) if request.queues else self._answer_at_once(request)

    async def _answer_at_once(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        entry = self.entry(request.model)
        request = addressed(entry.spec, request)
        with self._requests.counted():
            replica = await self._ready_replica(entry, request)
            # What it has waited for can be the end of a worker that it has crashed before.
            if entry.failures.suspects.admit(request, self._clock()):
                stream = self._answer(request)
            else:
                stream = self._answer_as_guest(entry, replica, request)
            async with aclosing(stream):
                async for event in stream:
                    yield event

    async def _answer_as_guest(
        self, entry: ModelEntry, replica: Replica, request: AnyRequest
    ) -> AsyncGenerator[Event, None]:
        lease = replica.take_guest(request)
        try:
            async with aclosing(lease.worker.ask(request)) as stream:
                async for event in stream:
                    yield event
        except WorkerDied as error:
            self.loader.worker_failed(entry, lease, error)
            raise
        finally:
            replica.guests.discard(lease)
            if entry.queue.next_alone() is not None:
                entry.grant()

    async def _answer(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        with self.loader.observer.observe(request) as observation, self._requests.counted():
            entry = self.entry(request.model)
            given = addressed(entry.spec, observation.request)
            continuation = Continuation(given, entry.spec.continuation, self._clock)
            suspect = False
            while not continuation.is_whole:
                attempt = Attempt(self.loader, entry, continuation, observation, alone=suspect)
                try:
                    async with attempt:
                        while not attempt.is_granted:
                            progress = entry.progress()
                            observation.saw(progress)
                            yield progress
                            await attempt.wait()
                        async for event in attempt.events():
                            if type(event) is Finish:
                                attempt.finished(event)
                            elif not attempt.has_begun and type(event) is not Progress:
                                attempt.saw(event)
                            if (new := continuation.new(event)) is not None:
                                observation.saw(new)
                                yield new
                            elif type(event) is ChoicesLeft:
                                attempt.choice_ended(event)
                        return
                except (HeadraceError, Diverged) as error:
                    if not continuation.is_whole:
                        self._retry(entry, continuation, error)
                    suspect = isinstance(error, WorkerDied) and not attempt.has_begun

    async def relay(self, request: AnyRequest, deliver: Callable[[Event], None]) -> None:
        """Answer a request as `ask` does, but deliver each event by a call, which is cheaper.

        An exception of `deliver` ends the stream, and is raised.
        """
        if request.queues:
            await self._relay(request, deliver)
            return
        async with aclosing(self.ask(request)) as stream:
            async for event in stream:
                deliver(event)

    async def _relay(self, request: AnyRequest, deliver: Callable[[Event], None]) -> None:
        with self.loader.observer.observe(request) as observation, self._requests.counted():
            entry = self.entry(request.model)
            given = addressed(entry.spec, observation.request)
            continuation = Continuation(given, entry.spec.continuation, self._clock)
            suspect = False

            def pass_on(event: Event) -> None:
                if type(event) is Finish:
                    attempt.finished(event)
                elif not attempt.has_begun and type(event) is not Progress:
                    attempt.saw(event)
                if (new := continuation.new(event)) is not None:
                    observation.saw(new)
                    deliver(new)
                elif type(event) is ChoicesLeft:
                    attempt.choice_ended(event)

            while not continuation.is_whole:
                attempt = Attempt(self.loader, entry, continuation, observation, alone=suspect)
                try:
                    async with attempt:
                        while not attempt.is_granted:
                            observation.saw(progress := entry.progress())
                            deliver(progress)
                            await attempt.wait()
                        await attempt.relay(pass_on)
                        return
                except (HeadraceError, Diverged) as error:
                    if not continuation.is_whole:
                        self._retry(entry, continuation, error)
                    suspect = isinstance(error, WorkerDied) and not attempt.has_begun

    def models(self) -> tuple[ModelInfo, ...]:
        """Return the metadata of all models, without waiting."""
        return tuple(info for entry in self.entries.values() for info in _infos(entry))

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, let running ones end within `drain_s`, end the rest. Idempotent.

        A second call can shorten the wait. When it returns, all processes have ended.
        """
        self._requests.limit_wait(drain_s)
        if self._closing is None:
            self.draining = True
            for entry in self._all_entries():
                entry.draining = True
            self.events.publish("draining", running=len(self._requests), drain_s=drain_s)
            self._closing = asyncio.create_task(self._close(), name="close the pool")
        await asyncio.shield(self._closing)

    def abandon(self) -> None:
        """End all processes, after the event loop was closed."""
        for entry in self._all_entries():
            for replica in entry.all_replicas():
                if replica.worker is not None:
                    replica.worker.abandon()

    async def _close(self) -> None:
        error = Draining("The service is stopping.")
        for entry in self._all_entries():
            entry.refuse(error)
        self.loader.stop_loading()
        self.events.close()
        await self._requests.wait()
        await self.loader.aclose()
        self.loader.observer.closed()

    async def _ready_replica(self, entry: ModelEntry, request: AnyRequest) -> Replica:
        """Return a loaded replica; the load is begun and awaited if there is none.

        Raises:
            Loading, QueueTimeout: the request may not wait that long.
        """
        entry.check()
        if not entry.is_ready:
            self.loader.ensure_loaded(entry)
        return await entry.ready_replica(request)

    def _retry(
        self, entry: ModelEntry, continuation: Continuation, error: HeadraceError | Diverged
    ) -> None:
        """Prepare another attempt.

        Raises:
            HeadraceError: the answer cannot be continued.
        """
        why = str(error)
        try:
            if self.draining and continuation.way is None and isinstance(error, HeadraceError):
                raise error
            way: Way = continuation.retry(error, _capabilities(entry))
        finally:
            del error  # as in `retry`
        entry.continuations += 1
        id = continuation.request.id
        self.events.publish("continued", entry.spec.name, id=id, way=way, why=why)

    def _all_entries(self) -> list[ModelEntry]:
        return [*self.entries.values(), *self.leaving]


def _capabilities(entry: ModelEntry) -> Capabilities:
    return entry.info.capabilities if entry.info else Capabilities()


def header_of(entry: ModelEntry) -> ModelInfo | None:
    """Return the metadata from the header of a model's file, if it was read for its settings."""
    return entry.header[1] if entry.header and entry.header[0] is entry.spec else None


def _infos(entry: ModelEntry) -> Sequence[ModelInfo]:
    info = _info(entry)
    presets = (
        msgspec.structs.replace(info, id=name, aliases=(), base=info.id, preset=plain(preset))
        for name, preset in entry.spec.presets.items()
    )
    return (info, *presets, *_adapted(entry.spec, info))


def _adapted(spec: ModelSpec, info: ModelInfo) -> Iterator[ModelInfo]:
    for adapter, settings in spec.adapters.items():
        name, *aliases = names_of(spec.name, adapter, settings)
        yield msgspec.structs.replace(
            info, id=name, aliases=tuple(aliases), base=info.id, adapter=settings.source
        )


def _info(entry: ModelEntry) -> ModelInfo:
    failure = entry.failures.error
    reason = failure.message if failure is not None and entry.state == "failed" else None
    if entry.info is None:
        if (described := header_of(entry)) is None:
            return unloaded_info(entry.spec, entry.state, reason)
        return msgspec.structs.replace(described, state=entry.state, reason=reason)
    live = next(
        (replica.worker for replica in entry.replicas if replica.worker and replica.is_ready), None
    )
    info = live.models()[0] if live else msgspec.structs.replace(entry.info, memory=None)
    return msgspec.structs.replace(
        info,
        state=entry.state,
        reason=reason,
        aliases=entry.spec.aliases,
        preset=plain(entry.spec),
    )
