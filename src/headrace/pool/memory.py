"""The loads that wait for memory, in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from headrace.core.errors import DoesNotFit
from headrace.core.model import ModelSpec
from headrace.core.status import Footprint
from headrace.machine import HOST
from headrace.pool import policy
from headrace.pool.entry import ModelEntry
from headrace.pool.ledger import Ledger
from headrace.pool.policy import Evict, Fits, Never, Rules, Wait
from headrace.pool.replica import Replica
from headrace.worker.spec import OnProgress

_RETRY_S = 1.0


class Sizing(Protocol):
    """Estimates and remembers what models need. Blocking; called on threads."""

    def footprint(self, spec: ModelSpec, on_progress: OnProgress) -> Footprint:
        """Return what a load needs; downloads the model if needed.

        Raises:
            HeadraceError: there is no such model, or no engine can run it.
        """
        ...

    def without_file(self, spec: ModelSpec) -> Sizing:
        """Return estimates of a model that is known but not on this machine, else itself."""
        ...

    def remember(self, spec: ModelSpec, devices: dict[str, int], load_s: float) -> None:
        """Store what a load took."""
        ...

    def largest_context(self, spec: ModelSpec, budgets: dict[str, int]) -> int | None:
        """Return the longest context in tokens that fits into the whole budgets, if known."""
        ...


class Unwanted(Exception):
    """No request waits for the load any more, or it would have to evict other models.

    The message is why there is not enough memory; empty if that is not the reason.
    """


class EvictReplica(Protocol):
    """Unloads an idle replica to make room for another model."""

    def __call__(self, entry: ModelEntry, replica: Replica, *, by: str) -> asyncio.Task[None]:
        """Return the task that ends when the memory is free."""
        ...


class _PendingLoad:
    """A load that waits for memory; `need` is the one of its `choices` that is best now."""

    def __init__(
        self, entry: ModelEntry, replica: Replica, since: float, choices: Sequence[dict[str, int]]
    ) -> None:
        self.entry = entry
        self.replica = replica
        self.since = since
        self.choices = choices
        self.need = choices[0]
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
        self, entry: ModelEntry, replica: Replica, need: Footprint, *, may_evict: bool
    ) -> dict[str, int]:
        """Wait for memory and book it; return the bytes by device, one of the need's choices.

        Raises:
            DoesNotFit: there can never be enough, or there was not within `load_timeout_s`.
            Unwanted: no request waits for the model any more; or `may_evict` is false, and other
                models would have to be evicted.
        """
        choices = need.choices or (need.devices,)
        load = _PendingLoad(entry, replica, self._clock(), choices)
        self._waiting.append(load)
        end = load.since + replica.spec.load_timeout_s
        try:
            while not await self._step(entry, load, may_evict=may_evict):
                if self._clock() > end:
                    raise DoesNotFit(
                        f"{entry.spec.name} has waited {replica.spec.load_timeout_s:g} s for "
                        f"memory ({describe_bytes(load.need)}) that others are using.",
                        retry_after_s=self.rules.longest_wait_s,
                    )
            return load.need
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
            message = self.refusal(entry.spec.name, load.need, decision)
            raise DoesNotFit(message + _elsewhere(load.choices))
        is_wanted = entry.is_wanted
        # Another replica may have been loaded meanwhile, which is not evicted for this one.
        may_evict = may_evict and not entry.is_ready
        if not (may_evict and is_wanted) and not self.ledger.returning:
            has_reason = is_wanted or not may_evict or self._has_others(load)
            raise Unwanted(self._too_little(load) if has_reason else "")
        may_evict = may_evict and is_wanted
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
        self,
        need: Mapping[str, int],
        free: Mapping[str, int],
        waited_s: float,
        *,
        yields: bool = False,
    ) -> policy.Decision:
        """Decide how to get `need` bytes by device, for a load that has waited `waited_s`.

        One that `yields` is for requests of batches only: it waits for models that are in use.
        """
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
        if yields:
            waited_s, residents = 0.0, [policy.in_use(each, now) for each in residents]
        return policy.make_room(need, free, residents, waited_s=waited_s, now=now, rules=rules)

    def _has_others(self, load: _PendingLoad) -> bool:
        """Whether another replica of the model has memory, which may have come first."""
        others = (replica for replica in load.entry.replicas if replica is not load.replica)
        return any(self.ledger.of(replica.key) for replica in others)

    def _too_little(self, load: _PendingLoad) -> str:
        free = {device: size for device, size in self.ledger.free().items() if device in load.need}
        return (
            f"It needs {describe_bytes(load.need)}, of which {describe_bytes(free)} are free, and "
            f"no other model is unloaded for it.{_elsewhere(load.choices)}"
        )

    def _decide(self, load: _PendingLoad) -> policy.Decision:
        """Choose the devices of a load, and decide how to get their memory."""
        free, waited_s = self.ledger.free(), self._clock() - load.since
        decisions = [
            (need, self._decide_in_turn(load, need, free, waited_s)) for need in load.choices
        ]
        load.need, decision = decisions[self.best(decisions, free, load.entry)]
        return decision

    def best(
        self,
        decisions: Sequence[tuple[dict[str, int], policy.Decision]],
        free: Mapping[str, int],
        entry: ModelEntry | None,
    ) -> int:
        """Return the place of the best decision for a replica of a model."""
        keys = [replica.key for replica in entry.replicas] if entry else []
        crowded = Counter(device for key in keys for device in self.ledger.of(key))
        return policy.choose_devices(decisions, free, crowded)

    def _decide_in_turn(
        self, load: _PendingLoad, need: dict[str, int], free: Mapping[str, int], waited_s: float
    ) -> policy.Decision:
        queue = load.entry.queue
        yields = bool(queue.count(batch=True)) and not queue.count(batch=False)
        decision = self.decide(need, free, waited_s, yields=yields)
        if isinstance(decision, Fits):
            # Earlier loads come first if they fit too, or if models are evicted for them.
            left = dict(free)
            for earlier in self._waiting[: self._waiting.index(load)]:
                if earlier.is_evicting or _fits(earlier.need, free):
                    left = {name: size - earlier.need.get(name, 0) for name, size in left.items()}
            if not _fits(need, left):
                return Wait()
        if isinstance(decision, Never) and not self.ledger.is_settled:
            # The memory of a load in progress counts twice: as booked, and as used on the machine.
            return Wait()
        returning = self.ledger.returning
        later = {device: size + returning.get(device, 0) for device, size in free.items()}
        if isinstance(decision, Evict) and returning and _fits(need, later):
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


def _elsewhere(choices: Sequence[Mapping[str, int]]) -> str:
    if len(choices) == 1:
        return ""
    sets = [" and ".join(device for device in need if device != HOST) for need in choices]
    return f" It fits on none of {', '.join(sets)}."


def _fits(need: Mapping[str, int], free: Mapping[str, int]) -> bool:
    return all(amount <= free.get(name, 0) for name, amount in need.items())


def describe_bytes(need: Mapping[str, int]) -> str:
    """Return bytes by device as text."""
    return " and ".join(f"{_size(size)} of {name}" for name, size in need.items())


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
