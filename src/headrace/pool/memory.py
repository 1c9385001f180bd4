"""The loads that wait for memory, in order, and what a load would need."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from headrace.core.errors import DoesNotFit, UnknownModel
from headrace.core.model import ModelSpec
from headrace.core.status import Footprint, Plan
from headrace.pool import policy
from headrace.pool.entry import ModelEntry
from headrace.pool.ledger import Ledger
from headrace.pool.policy import Evict, Fits, Never, Rules, Wait
from headrace.pool.replica import OnProgress, Replica

_RETRY_S = 1.0


class Sizing(Protocol):
    """Estimates and remembers what models need. Blocking; called on threads."""

    def footprint(self, spec: ModelSpec, on_progress: OnProgress) -> Footprint:
        """Return what a load needs; downloads the model if needed.

        Raises:
            HeadraceError: there is no such model, or no engine can run it.
        """
        ...

    def remember(self, spec: ModelSpec, devices: dict[str, int], load_s: float) -> None:
        """Store what a load took."""
        ...

    def largest_context(self, spec: ModelSpec, budgets: dict[str, int]) -> int | None:
        """Return the longest context in tokens that fits into the whole budgets, if known."""
        ...


class Unwanted(Exception):
    """No request waits for the load any more, or it would have to evict other models."""


class EvictReplica(Protocol):
    """Unloads an idle replica to make room for another model."""

    def __call__(self, entry: ModelEntry, replica: Replica, *, by: str) -> asyncio.Task[None]:
        """Return the task that ends when the memory is free."""
        ...


class _PendingLoad:
    """A load that waits for memory."""

    def __init__(self, replica: Replica, since: float, need: Mapping[str, int]) -> None:
        self.replica = replica
        self.since = since
        self.need = need
        self.is_evicting = False
        self.closed: set[Replica] = set()


class MemoryQueue:
    """The loads that wait for memory, in order."""

    def __init__(
        self,
        entries: Callable[[], Iterable[ModelEntry]],
        ledger: Ledger,
        rules: Rules,
        evict: EvictReplica,
        clock: Callable[[], float],
    ) -> None:
        self.ledger = ledger
        self.rules = rules
        self._entries = entries
        self._evict_replica = evict
        self._clock = clock
        self._waiting: list[_PendingLoad] = []
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        """Describe the ledger and the waiting loads."""
        waiting = [load.replica.key for load in self._waiting]
        return f"<MemoryQueue {self.ledger!r}, waiting: {waiting}>"

    def notify(self) -> None:
        """Make the waiting loads try again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changed(self) -> None:
        """Wait for the next `notify`."""
        await self._changed.wait()

    async def book(
        self, entry: ModelEntry, replica: Replica, need: Mapping[str, int], *, may_evict: bool
    ) -> None:
        """Wait for memory and book it.

        Raises:
            DoesNotFit: there can never be enough, or there was not within `load_timeout_s`.
            Unwanted: no request waits for the model any more; or `may_evict` is false, and other
                models would have to be evicted.
        """
        load = _PendingLoad(replica, self._clock(), need)
        self._waiting.append(load)
        end = load.since + replica.spec.load_timeout_s
        try:
            while not await self._step(entry, load, may_evict=may_evict):
                if self._clock() > end:
                    raise DoesNotFit(
                        f"{entry.spec.name} has waited {replica.spec.load_timeout_s:g} s for "
                        f"memory ({describe_bytes(need)}) that others are using.",
                        retry_after_s=self.rules.longest_wait_s,
                    )
        finally:
            self._waiting.remove(load)
            for closed in load.closed:
                closed.reopen(load)
            for other in self._entries():
                other.grant()
            self.notify()

    async def _step(self, entry: ModelEntry, load: _PendingLoad, *, may_evict: bool) -> bool:
        """Try once to book the memory; return whether it is booked."""
        changed, now = self._changed, self._clock()
        decision = self._decide(load)
        if isinstance(decision, Fits):
            self.ledger.book(load.replica.key, load.need)
            return True
        if isinstance(decision, Never):
            raise DoesNotFit(self.refusal(entry.spec.name, load.need, decision))
        may_evict = may_evict and entry.is_wanted
        if not may_evict and not self.ledger.returning:
            raise Unwanted
        first = may_evict and self._waiting[0] is load
        if may_evict and isinstance(decision, Evict) and self._may_evict(load, now):
            load.is_evicting = True
            await asyncio.gather(*[asyncio.shield(task) for task in self._evict(decision, entry)])
            return False
        until = now + _RETRY_S
        if isinstance(decision, Wait):
            until = min(until, decision.until or until)
            for key in decision.close if first else ():
                if (pair := self.find(key)) is not None:
                    pair[1].close(load)
                    load.is_evicting = True
                    load.closed.add(pair[1])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.001, until - now)):
                await changed.wait()
        return False

    def _may_evict(self, load: _PendingLoad, now: float) -> bool:
        """Whether all earlier loads wait for busy models, and not for too long."""
        limit_s = self.rules.longest_wait_s
        return all(
            not earlier.is_evicting and now - earlier.since < limit_s
            for earlier in self._waiting[: self._waiting.index(load)]
        )

    def decide(
        self, need: Mapping[str, int], free: Mapping[str, int], waited_s: float
    ) -> policy.Decision:
        """Decide how to get `need` bytes by device, for a load that has waited `waited_s`."""
        residents = [
            # A replica that is being unloaded does not keep its memory.
            replica.resident(
                pinned=entry.spec.pinned and replica in entry.replicas and replica.unloading is None
            )
            for entry in self._entries()
            for replica in entry.all_replicas()
            if self.ledger.of(replica.key)
        ]
        now, rules = self._clock(), self.rules
        return policy.make_room(need, free, residents, waited_s=waited_s, now=now, rules=rules)

    def _decide(self, load: _PendingLoad) -> policy.Decision:
        free = self.ledger.free()
        decision = self.decide(load.need, free, self._clock() - load.since)
        if isinstance(decision, Fits):
            # Earlier loads come first if they fit too, or if models are evicted for them.
            left = dict(free)
            for earlier in self._waiting[: self._waiting.index(load)]:
                if earlier.is_evicting or _fits(earlier.need, free):
                    left = {name: size - earlier.need.get(name, 0) for name, size in left.items()}
            if not _fits(load.need, left):
                return Wait()
        if isinstance(decision, Never) and not self.ledger.is_settled:
            # The memory of a load in progress counts twice: as booked, and as used on the machine.
            return Wait()
        returning = self.ledger.returning
        later = {device: size + returning.get(device, 0) for device, size in free.items()}
        if isinstance(decision, Evict) and returning and _fits(load.need, later):
            return Wait()
        return decision

    def refusal(self, name: str, need: Mapping[str, int], never: Never) -> str:
        """Return the message that a model cannot be loaded, with the numbers."""
        pinned = [
            other.spec.name for other in self._entries() if other.spec.pinned and other.is_ready
        ]
        budget, free = self.ledger.budgets.get(never.device, 0), self.ledger.free()
        pinned_text = f" Pinned: {', '.join(pinned)}." if pinned else ""
        return (
            f"{name} needs {describe_bytes(need)}; the budget of {never.device} is "
            f"{_size(budget)}, {_size(free.get(never.device, 0))} of it free now, and "
            f"{_size(never.missing)} would still be missing.{pinned_text}"
        )

    def _evict(self, decision: Evict, by: ModelEntry) -> list[asyncio.Task[None]]:
        pairs = [self.find(key) for key in decision.keys]
        return [self._evict_replica(*pair, by=by.spec.name) for pair in pairs if pair is not None]

    def excessive(self) -> list[tuple[ModelEntry, Replica]]:
        """Return idle replicas to evict because the loaded ones have outgrown the budget."""
        if not (excess := self.ledger.excess()):
            return []
        decision = self.decide(excess, {}, waited_s=0.0)
        pairs = [self.find(key) for key in decision.keys] if isinstance(decision, Evict) else []
        return [pair for pair in pairs if pair is not None and pair[1].unloading is None]

    def find(self, key: str) -> tuple[ModelEntry, Replica] | None:
        """Find a replica and its entry by its key in the ledger."""
        pairs = ((entry, replica) for entry in self._entries() for replica in entry.all_replicas())
        return next((pair for pair in pairs if pair[1].key == key), None)


def _fits(need: Mapping[str, int], free: Mapping[str, int]) -> bool:
    return all(amount <= free.get(name, 0) for name, amount in need.items())


def describe_bytes(need: Mapping[str, int]) -> str:
    """Return bytes by device as text."""
    return " and ".join(f"{_size(size)} of {name}" for name, size in need.items())


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


async def plan_load(
    memory: MemoryQueue, sizing: Sizing, spec: ModelSpec, entry: ModelEntry | None = None
) -> Plan:
    """Return what a load would need and do; `entry` is that of a model that is served.

    Raises:
        UnknownModel: the model is not on this machine.
        HeadraceError: it is damaged, or no engine can run it.
    """

    def report(stage: str, done: int, total: int) -> None:
        if stage.startswith("downloading"):
            raise UnknownModel(f"{spec.model} is not on this machine yet; pull it first.")

    need = await asyncio.to_thread(sizing.footprint, spec, report)
    budgets = dict(memory.ledger.budgets)
    largest = await asyncio.to_thread(sizing.largest_context, spec, budgets)
    is_ready = entry is not None and entry.is_ready
    evict, reason = ((), "It is loaded.") if is_ready else _consequences(memory, spec, need)
    return Plan(
        model=spec.name,
        engine=need.engine or spec.engine or "auto",
        need=need,
        fits=evict is not None,
        loaded=is_ready,
        evict=evict or (),
        largest_context=largest,
        reason=reason,
        devices=memory.ledger.status(),
    )


def _consequences(
    memory: MemoryQueue, spec: ModelSpec, need: Footprint
) -> tuple[tuple[str, ...] | None, str]:
    """Return the models to evict, None if the model cannot fit, and an explanation."""
    if not need.devices:
        return (), "It takes no memory of this machine."
    free = memory.ledger.free()
    has = f"needs {describe_bytes(need.devices)} ({need.how}), {describe_bytes(free)} free"
    # As after a long wait: busy models finish their requests and are unloaded.
    decision = memory.decide(need.devices, free, waited_s=float("inf"))
    match decision:
        case Fits():
            return (), f"It fits: {has}."
        case Evict(keys) | Wait(close=keys) if keys:
            pairs = [memory.find(key) for key in keys]
            names = tuple(dict.fromkeys(pair[0].spec.name for pair in pairs if pair))
            return names, f"It fits once {', '.join(names)} has gone: {has}."
        case Never():
            return None, memory.refusal(spec.name, need.devices, decision)
        case _:
            return None, f"It does not fit now: {has}."
