"""What an operator can do to a pool while it serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import msgspec

from headrace.core.errors import (
    Disabled,
    Draining,
    HeadraceError,
    LoadFailed,
    RequestError,
    UnknownModel,
)
from headrace.core.model import ModelSpec
from headrace.core.secrets import shown
from headrace.core.status import ModelStatus, Plan, PoolEvent, PoolStatus, Reloaded
from headrace.pool.plan import plan_load
from headrace.pool.policy import Rules
from headrace.pool.pool import Pool
from headrace.pool.seat import Seat, needs_new_worker
from headrace.pool.state import Remembered, StateFile

Specify = Callable[[str, Mapping[str, Any]], ModelSpec]
"""Returns the specification of a name or reference with changed settings. Raises ConfigError."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a configuration asks for, read anew."""

    specs: tuple[ModelSpec, ...]
    rules: Rules
    budgets: dict[str, int]
    specify: Specify
    drain_s: float = 30.0
    needs_restart: tuple[str, ...] = ()


class PoolAdmin:
    """The Admin of a pool; what is done by hand is kept in a state file."""

    def __init__(
        self,
        pool: Pool,
        *,
        specify: Specify,
        state: StateFile,
        reread: Callable[[], Wanted],
        drain_s: float = 30.0,
    ) -> None:
        self.pool = pool
        self._specify = specify
        self._state = state
        self._reread = reread
        self._drain_s = drain_s
        self._by_hand: dict[str, Remembered] = {}
        self._lock = asyncio.Lock()

    def restore(self) -> None:
        """Do again what was done by hand before the service was last stopped.

        A setting that is not accepted any more is dropped, and the log says so.
        """
        self._by_hand = dict(self._state.read())
        for name, kept in tuple(self._by_hand.items()):
            try:
                self._restore(name, kept)
            except HeadraceError as error:
                self._forget(name, error)

    async def aclose(self) -> None:
        """Close the pool, and leave the state to another service."""
        await self.pool.aclose()
        self._state.close()

    def status(self) -> PoolStatus:
        """Tell how all models and devices stand."""
        return PoolStatus(
            models=tuple(status_of(seat) for seat in self.pool.seats.values()),
            devices=self.pool.ledger.status(),
        )

    async def load(self, model: str, changes: Mapping[str, Any] | None = None) -> ModelStatus:
        """Load a model, and wait for it; see `Admin`."""
        async with self._lock:
            seat = await self._with(model, changes or {})
            seat.reset()
            await self._keep(seat, loaded=True)
        self._want(seat)
        try:
            await seat.up()
        except (RequestError, LoadFailed):
            # A name that was mistyped, or a file that is no model, is not kept.
            if seat.reference is not None and seat.info is None:
                await self._drop(seat)
            raise
        return status_of(seat)

    async def unload(self, model: str) -> ModelStatus:
        """Unload a model when its requests have ended; see `Admin`."""
        async with self._lock:
            seat = self.pool.seat(model)
            await self._keep(seat, loaded=False)
        seat.wanted_until = 0.0
        seat.refuse_watchers(Draining(f"{seat.spec.name} is being unloaded."))
        await self._unload(seat)
        return status_of(seat)

    async def restart(self, model: str) -> ModelStatus:
        """Unload and load again; see `Admin`."""
        seat = self.pool.seat(model)
        await self._unload(seat)
        return await self.load(seat.spec.name)

    async def update(self, model: str, changes: Mapping[str, Any]) -> ModelStatus:
        """Change settings; see `Admin`."""
        async with self._lock:
            seat = self.pool.seat(model)
            await self._change(seat, changes)
        return status_of(seat)

    async def plan(self, model: str) -> Plan:
        """Tell what a load would need and do; see `Admin`."""
        try:
            seat = self.pool.seat(model)
        except UnknownModel:
            return await plan_load(self.pool.loader, self._specify(model, {}))
        return await plan_load(self.pool.loader, seat.spec, seat)

    async def reload(self) -> Reloaded:
        """Apply a changed configuration; see `Admin`."""
        async with self._lock:
            wanted = await asyncio.to_thread(self._reread)
            self._specify = wanted.specify
            self._drain_s = wanted.drain_s
            seats, pool = self.pool.seats, self.pool
            specs = {spec.name: self._by(spec.name, spec) for spec in wanted.specs}
            for name, seat in seats.items():
                if seat.reference is not None and name not in specs:
                    specs[name] = self._by(seat.reference, seat.spec)
            removed = tuple(name for name in seats if name not in specs)
            added = tuple(name for name in specs if name not in seats)
            changed = tuple(
                name for name, spec in specs.items() if name in seats and seats[name].spec != spec
            )
            pool.loader.keep_to(wanted.rules)
            # In place: who sizes models reads the same budgets.
            pool.ledger.budgets.clear()
            pool.ledger.budgets.update(wanted.budgets)
            for name in removed:
                pool.remove(seats[name])
            for name in added:
                seat = pool.add(specs[name])
                if seat.preload and seat.spec.enabled:
                    pool.loader.want(seat, may_evict=False)
            for name in changed:
                self._apply(seats[name], specs[name])
            pool.loader.room.notify()
        pool.feed.tell("reloaded", added=added, changed=changed, removed=removed)
        return Reloaded(
            added=added, changed=changed, removed=removed, needs_restart=wanted.needs_restart
        )

    def events(self) -> AsyncGenerator[PoolEvent, None]:
        """Yield what happens from now on."""
        return self.pool.feed.listen()

    def _restore(self, name: str, kept: Remembered) -> None:
        seats = self.pool.seats
        if name not in seats:
            if kept.reference is None:
                # The configuration has lost the model; what was done to it waits for its return.
                return
            self._add(kept.reference, kept.changes)
            self._by_hand[name] = kept
        spec = self._specify(kept.reference or name, kept.changes)
        seats[name].apply(msgspec.structs.replace(spec, name=name))
        if kept.loaded is not None:
            seats[name].preload = kept.loaded
        self.pool.name_all()

    async def _with(self, model: str, changes: Mapping[str, Any]) -> Seat:
        """Return a model, changed and enabled; it is added if it is not served yet."""
        try:
            seat = self.pool.seat(model)
        except UnknownModel:
            if not model:
                raise
            name = self._specify(model, changes).name
            if name not in self.pool.seats:
                return self._add(model, changes)
            seat = self.pool.seats[name]
        if not seat.spec.enabled:
            changes = {"enabled": True, **changes}
        if changes:
            await self._change(seat, changes)
        return seat

    def _add(self, reference: str, changes: Mapping[str, Any]) -> Seat:
        spec = self._specify(reference, changes)
        if spec.name in self.pool.seats:
            return self.pool.seats[spec.name]
        seat = self.pool.add(spec)
        seat.reference = reference
        kept = Remembered(reference=reference, changes=dict(changes), loaded=None)
        self._by_hand[spec.name] = kept
        self.pool.feed.tell("added", spec.name, reference=reference)
        return seat

    async def _change(self, seat: Seat, changes: Mapping[str, Any]) -> None:
        name = seat.spec.name
        kept = self._by_hand.get(name, Remembered())
        merged = {**kept.changes, **changes}
        spec = self._specify(seat.reference or name, merged)
        self._by_hand[name] = msgspec.structs.replace(kept, changes=merged)
        self._apply(seat, msgspec.structs.replace(spec, name=name))
        self.pool.feed.tell("updated", name, changes=dict(changes))
        await self._keep(seat)

    def _apply(self, seat: Seat, spec: ModelSpec) -> None:
        loader = self.pool.loader
        was_up, anew = seat.is_ready, needs_new_worker(seat.spec, spec)
        seat.apply(spec)
        self.pool.name_all()
        if anew:
            seat.reset()
        if not spec.enabled:
            seat.refuse(Disabled(f"{spec.name} has been switched off."))
            for replica in seat.replicas:
                loader.dismiss(seat, replica, "unloaded", self._drain_s)
        elif was_up and anew:
            self._want(seat)
        elif seat.is_ready or seat.is_waited_for:
            loader.want(seat, may_evict=seat.is_waited_for)
        loader.let_go(seat)

    def _want(self, seat: Seat) -> None:
        # Until it is there or has failed: who asked for it may have gone by then.
        if not seat.stays:
            seat.wanted_until = float("inf")
        self.pool.loader.want(seat)

    def _by(self, reference: str, spec: ModelSpec) -> ModelSpec:
        """Return what a configured model is with what was changed by hand."""
        kept = self._by_hand.get(spec.name)
        if kept is None or not kept.changes:
            return spec
        try:
            return msgspec.structs.replace(self._specify(reference, kept.changes), name=spec.name)
        except HeadraceError as error:
            self._forget(spec.name, error)
            return spec

    def _forget(self, name: str, error: HeadraceError) -> None:
        # The configuration accepts it no longer; the rest is worth more than this.
        del self._by_hand[name]
        self.pool.feed.tell("load_failed", name, error=error.message)

    async def _drop(self, seat: Seat) -> None:
        async with self._lock:
            name = seat.spec.name
            if self.pool.seats.get(name) is seat:
                self.pool.remove(seat)
                self._by_hand.pop(name, None)
                await asyncio.to_thread(self._state.write, dict(self._by_hand))
                self.pool.feed.tell("removed", name)

    async def _unload(self, seat: Seat) -> None:
        going = [
            self.pool.loader.dismiss(seat, replica, "unloaded", self._drain_s)
            for replica in seat.everybody()
        ]
        if going:
            await asyncio.wait(going)

    async def _keep(self, seat: Seat, *, loaded: bool | None = None) -> None:
        kept = self._by_hand.get(seat.spec.name, Remembered())
        if loaded is not None:
            kept = msgspec.structs.replace(kept, loaded=loaded)
        self._by_hand[seat.spec.name] = kept
        # Until it is on the disk, which may be slow.
        await asyncio.to_thread(self._state.write, dict(self._by_hand))


def status_of(seat: Seat) -> ModelStatus:
    """Tell how a model stands."""
    spec, info = seat.spec, seat.info
    footprint = next((one.footprint for one in seat.replicas if one.footprint), None)
    stage = next((one.stage for one in seat.replicas if one.loading is not None), ("", 0, 0))
    return ModelStatus(
        id=spec.name,
        source=spec.model,
        state=seat.state,
        aliases=spec.aliases,
        engine=info.engine if info else spec.engine or "auto",
        engine_reason=info.engine_reason if info else "",
        device=info.device if info else spec.device or "auto",
        quantization=info.quantization if info else None,
        context_length=info.context_length if info else spec.context_length,
        enabled=spec.enabled,
        pinned=spec.pinned,
        keep_alive=spec.keep_alive,
        continuation=spec.continuation,
        estimated=footprint,
        memory=_sum([one.memory for one in seat.everybody()]),
        running=seat.running,
        max_running=seat.slots or None,
        queued=len(seat.line),
        max_queued=spec.max_queued,
        until=_until(seat),
        last_used=seat.wall(seat.last_used) if seat.last_used is not None else None,
        restarts=seat.restarts,
        evictions=seat.evictions,
        continuations=seat.continuations,
        last_error=seat.last_error,
        progress=stage[0] or None,
        done=stage[1],
        total=stage[2],
        replicas=tuple(one.status() for one in seat.everybody()),
        options=shown(spec.options),
    )


def _until(seat: Seat) -> float | None:
    up = [one.idle_since for one in seat.replicas if one.is_ready]
    if not up or seat.keep_alive < 0 or seat.spec.pinned or seat.running:
        return None
    return seat.wall(max(up) + seat.keep_alive)


def _sum(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0) for part in parts) for name in names}
