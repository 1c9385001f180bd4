"""PoolAdmin: changes to a pool while it serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from headrace.core.errors import (
    Disabled,
    Draining,
    HeadraceError,
    LoadFailed,
    RequestError,
    UnknownModel,
    Unsupported,
)
from headrace.core.library import LibraryEntry, LibraryFilter
from headrace.core.measurement import Curve
from headrace.core.model import ModelInfo, ModelSpec, needs_new_worker
from headrace.core.status import ModelStatus, Plan, PoolEvent, PoolStatus, Reloaded, StoredModel
from headrace.pool.adapting import adapted, check_adapters, give_up, goes_ahead, load_ahead
from headrace.pool.entry import ModelEntry
from headrace.pool.loader import Loader
from headrace.pool.plan import plan_load
from headrace.pool.policy import Rules
from headrace.pool.pool import Pool, header_of
from headrace.pool.state import Remembered, StateFile
from headrace.pool.status import status_of

Specify = Callable[[str, Mapping[str, Any]], ModelSpec]
"""Returns the specification of a name or reference with changed settings. Raises ConfigError."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What an Admin shows beside its pool; all but `library` block."""

    stored: Callable[[], Sequence[StoredModel]] = tuple
    measurements: Callable[[], Sequence[Curve]] = tuple
    describe: Callable[[ModelSpec], ModelInfo] | None = None
    library: (
        Callable[[Loader, Specify, LibraryFilter], Awaitable[Sequence[LibraryEntry]]] | None
    ) = None


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A configuration that was read again."""

    specs: tuple[ModelSpec, ...]
    rules: Rules
    budgets: dict[str, int]
    specify: Specify
    drain_s: float = 30.0
    needs_restart: tuple[str, ...] = ()


class PoolAdmin:
    """The Admin of a pool; changes are kept in a state file."""

    def __init__(
        self,
        pool: Pool,
        *,
        specify: Specify,
        state: StateFile,
        reread: Callable[[], Wanted],
        drain_s: float = 30.0,
        shown: Shown | None = None,
    ) -> None:
        self.pool = pool
        self._specify = specify
        self._state = state
        self._reread = reread
        self._drain_s = drain_s
        self._shown = shown or Shown()
        self._kept: dict[str, Remembered] = {}
        self._lock = asyncio.Lock()
        self._reading = asyncio.Lock()

    def restore(self) -> None:
        """Apply the changes in the state file; what is refused now is dropped and logged."""
        self._kept = dict(self._state.read())
        for name, kept in tuple(self._kept.items()):
            try:
                self._restore(name, kept)
            except HeadraceError as error:
                self._forget(name, error)

    async def aclose(self) -> None:
        """Close the pool, and unlock the state file."""
        await self.pool.aclose()
        self._state.close()

    def status(self) -> PoolStatus:
        """Return the status of all models and devices."""
        return PoolStatus(models=self.model_statuses(), devices=self.pool.ledger.status())

    def model_statuses(self) -> tuple[ModelStatus, ...]:
        """Return the status of all models, without reading the devices, which costs more."""
        return tuple(status_of(entry) for entry in self.pool.entries.values())

    def stored(self) -> Sequence[StoredModel]:
        """Return the models that were downloaded; see `Admin`."""
        return self._shown.stored()

    async def describe(self, model: str) -> None:
        """Read the header of a model that was not loaded yet, which `Pool.models` has then.

        Raises:
            UnknownModel: it is not served.
            HeadraceError: its file cannot be read.
        """
        entry = self.pool.entry(model)
        async with self._reading:
            if (
                self._shown.describe is None
                or entry.info is not None
                or header_of(entry) is not None
            ):
                return
            spec = entry.spec
            info = await asyncio.to_thread(self._shown.describe, spec)
            # One that is not downloaded may be later.
            if info.format != "none":
                entry.header = (spec, info)

    async def load(self, model: str, changes: Mapping[str, Any] | None = None) -> ModelStatus:
        """Load a model, and wait for it; see `Admin`."""
        async with self._lock:
            entry = await self._changed_entry(model, changes or {})
            entry.reset()
            await self._store(entry, loaded=True)
        self._begin_load(entry)
        try:
            await entry.ready_replica()
        except (RequestError, LoadFailed):
            # A mistyped name, or a file that is not a model, is not kept.
            if entry.reference is not None and entry.info is None:
                await self._drop(entry)
            raise
        return status_of(entry)

    async def unload(self, model: str) -> ModelStatus:
        """Unload a model after its requests have ended; see `Admin`."""
        async with self._lock:
            entry = self.pool.entry(model)
            await self._store(entry, loaded=False)
        entry.clear_wanted()
        entry.fail_load_waits(Draining(f"{entry.spec.name} is being unloaded."))
        await self._unload(entry)
        return status_of(entry)

    async def restart(self, model: str) -> ModelStatus:
        """Unload and load again; see `Admin`."""
        entry = self.pool.entry(model)
        await self._unload(entry)
        return await self.load(entry.spec.name)

    async def update(self, model: str, changes: Mapping[str, Any]) -> ModelStatus:
        """Change settings; see `Admin`."""
        entry = self.pool.entry(model)
        # One change of a model after another; other models need not wait for its load.
        async with entry.changing:
            async with self._lock:
                spec = await self._change(entry, changes, ahead=True)
            if spec is not None:
                await self._change_after_load(entry, changes, spec)
        return status_of(entry)

    async def _change_after_load(
        self, entry: ModelEntry, changes: Mapping[str, Any], spec: ModelSpec
    ) -> None:
        await load_ahead(self.pool.loader, entry, spec)
        try:
            async with self._lock:
                await self._change(entry, changes)
        finally:
            give_up(self.pool.loader, entry)

    async def plan(self, model: str) -> Plan:
        """Return what a load would need and do; see `Admin`."""
        loader = self.pool.loader
        try:
            entry = self.pool.entry(model)
        except UnknownModel:
            return await plan_load(loader.memory, loader.sizing, self._specify(model, {}))
        return await plan_load(loader.memory, loader.sizing, entry.spec, entry)

    def measurements(self) -> Sequence[Curve]:
        """Return what was measured here; see `Admin`."""
        return self._shown.measurements()

    async def library(self, wanted: LibraryFilter) -> Sequence[LibraryEntry]:
        """Return the models of the library that match; see `Admin`."""
        if self._shown.library is None:
            raise Unsupported("This service has no library.")
        return await self._shown.library(self.pool.loader, self._specify, wanted)

    async def reload(self) -> Reloaded:
        """Apply a changed configuration; see `Admin`."""
        async with self._lock:
            wanted = await asyncio.to_thread(self._reread)
            entries, pool = self.pool.entries, self.pool
            before, self._specify = self._specify, wanted.specify
            specs = {spec.name: self._with_changes(spec.name, spec) for spec in wanted.specs}
            for name, entry in entries.items():
                if entry.reference is not None and name not in specs:
                    specs[name] = self._with_changes(entry.reference, entry.spec)
            removed = tuple(name for name in entries if name not in specs)
            added = tuple(name for name in specs if name not in entries)
            changed = tuple(
                name
                for name, spec in specs.items()
                if name in entries and entries[name].spec != spec
            )
            try:
                in_place = await self._adapted(specs, changed)
            except HeadraceError:
                self._specify = before
                raise
            self._drain_s = wanted.drain_s
            pool.loader.apply_rules(wanted.rules)
            # In place: Sizing reads the same dictionary.
            pool.ledger.budgets.clear()
            pool.ledger.budgets.update(wanted.budgets)
            for name in removed:
                pool.remove(entries[name])
            for name in added:
                entry = pool.add(specs[name])
                if entry.preload and entry.spec.enabled:
                    pool.loader.ensure_loaded(entry, may_evict=False)
            for name in changed:
                self._apply(entries[name], specs[name], in_place=name in in_place)
            pool.loader.memory.notify()
        pool.events.publish("reloaded", added=added, changed=changed, removed=removed)
        return Reloaded(
            added=added, changed=changed, removed=removed, needs_restart=wanted.needs_restart
        )

    async def _adapted(
        self, specs: Mapping[str, ModelSpec], changed: Sequence[str]
    ) -> frozenset[str]:
        """Return the models whose workers have changed their adapters, after a check of all.

        Raises:
            ConfigError: an adapter does not go with its model.
        """
        loader, entries = self.pool.loader, self.pool.entries
        for name in changed:
            if entries[name].is_ready:
                await check_adapters(loader, entries[name].spec, specs[name])
        return frozenset(
            [name for name in changed if await adapted(loader, entries[name], specs[name])]
        )

    def events(self) -> AsyncGenerator[PoolEvent, None]:
        """Yield events from now on; see `Admin`."""
        return self.pool.events.subscribe()

    def _restore(self, name: str, kept: Remembered) -> None:
        entries = self.pool.entries
        if name not in entries:
            if kept.reference is None:
                # The model is not configured any more: its changes are kept until it is again.
                return
            self._add(kept.reference, kept.changes)
            self._kept[name] = kept
        spec = self._specify(kept.reference or name, kept.changes)
        entries[name].apply(msgspec.structs.replace(spec, name=name))
        if kept.loaded is not None:
            entries[name].preload = kept.loaded
        self.pool.rebuild_names()

    async def _changed_entry(self, model: str, changes: Mapping[str, Any]) -> ModelEntry:
        """Return a model, changed and enabled; it is added if it is not served yet."""
        try:
            entry = self.pool.entry(model)
        except UnknownModel:
            if not model:
                raise
            name = self._specify(model, changes).name
            if name not in self.pool.entries:
                return self._add(model, changes)
            entry = self.pool.entries[name]
        if not entry.spec.enabled:
            changes = {"enabled": True, **changes}
        if changes:
            await self._change(entry, changes)
        return entry

    def _add(self, reference: str, changes: Mapping[str, Any]) -> ModelEntry:
        spec = self._specify(reference, changes)
        if spec.name in self.pool.entries:
            return self.pool.entries[spec.name]
        entry = self.pool.add(spec)
        entry.reference = reference
        kept = Remembered(reference=reference, changes=dict(changes), loaded=None)
        self._kept[spec.name] = kept
        self.pool.events.publish("added", spec.name, reference=reference)
        return entry

    async def _change(
        self, entry: ModelEntry, changes: Mapping[str, Any], *, ahead: bool = False
    ) -> ModelSpec | None:
        """Change settings; if `ahead`, return a specification that is worth a load before it."""
        if self.pool.entries.get(name := entry.spec.name) is not entry:
            raise UnknownModel(f"{name} is not served any more.")
        kept = self._kept.get(name, Remembered())
        merged = kept.merged(changes)
        spec = msgspec.structs.replace(self._specify(entry.reference or name, merged), name=name)
        self.pool.check_names(spec)
        await check_adapters(self.pool.loader, entry.spec, spec)
        in_place = await adapted(self.pool.loader, entry, spec)
        if ahead and not in_place and goes_ahead(entry, spec):
            return spec
        if any(replica.spec != spec for replica in entry.coming):
            give_up(self.pool.loader, entry)
        self._kept[name] = msgspec.structs.replace(kept, changes=merged)
        self._apply(entry, spec, in_place=in_place)
        self.pool.events.publish("updated", name, changes=dict(changes))
        await self._store(entry)
        return None

    def _apply(self, entry: ModelEntry, spec: ModelSpec, *, in_place: bool) -> None:
        loader, was_ready = self.pool.loader, entry.is_ready
        needs_worker = not in_place and needs_new_worker(entry.spec, spec)
        entry.apply(spec, in_place=in_place)
        self.pool.rebuild_names()
        if needs_worker:
            entry.reset()
        if not spec.enabled:
            entry.refuse(Disabled(f"{spec.name} has been switched off."))
            for replica in entry.replicas:
                loader.unload(entry, replica, "unloaded", self._drain_s)
        elif was_ready and needs_worker:
            self._begin_load(entry)
        elif entry.is_ready or entry.is_wanted:
            loader.ensure_loaded(entry, may_evict=entry.is_wanted)
        loader.unload_idle(entry)
        entry.grant()

    def _begin_load(self, entry: ModelEntry) -> None:
        # Until it is ready or has failed, even if the caller does not wait.
        if not entry.has_lasting_replica:
            entry.mark_wanted()
        self.pool.loader.ensure_loaded(entry)

    def _with_changes(self, reference: str, spec: ModelSpec) -> ModelSpec:
        """Return a specification with the kept changes."""
        kept = self._kept.get(spec.name)
        if kept is None or not kept.changes:
            return spec
        try:
            return msgspec.structs.replace(self._specify(reference, kept.changes), name=spec.name)
        except HeadraceError as error:
            self._forget(spec.name, error)
            return spec

    def _forget(self, name: str, error: HeadraceError) -> None:
        # The changes are not accepted any more: continue without them.
        del self._kept[name]
        self.pool.events.publish("load_failed", name, error=error.message)

    async def _drop(self, entry: ModelEntry) -> None:
        async with self._lock:
            name = entry.spec.name
            if self.pool.entries.get(name) is entry:
                self.pool.remove(entry)
                self._kept.pop(name, None)
                await asyncio.to_thread(self._state.write, dict(self._kept))
                self.pool.events.publish("removed", name)

    async def _unload(self, entry: ModelEntry) -> None:
        unloading = [
            self.pool.loader.unload(entry, replica, "unloaded", self._drain_s)
            for replica in entry.all_replicas()
        ]
        if unloading:
            await asyncio.wait(unloading)

    async def _store(self, entry: ModelEntry, *, loaded: bool | None = None) -> None:
        kept = self._kept.get(entry.spec.name, Remembered())
        if loaded is not None:
            kept = msgspec.structs.replace(kept, loaded=loaded)
        self._kept[entry.spec.name] = kept
        # On a thread: the disk may be slow.
        await asyncio.to_thread(self._state.write, dict(self._kept))
