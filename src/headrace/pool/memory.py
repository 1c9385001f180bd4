"""MemoryQueue in memory for those who want to load: in order, and by what the policy decides."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from headrace.core.errors import DoesNotFit, UnknownModel
from headrace.core.model import ModelSpec
from headrace.core.status import DeviceStatus, Footprint, Plan
from headrace.pool import policy
from headrace.pool.entry import ModelEntry
from headrace.pool.policy import Evict, Fits, Never, Rules, Wait
from headrace.pool.replica import OnProgress, Replica

_LOOK_AGAIN_S = 1.0


ReadDevices = Callable[[], Mapping[str, tuple[int, int]]]
"""Returns total and free bytes of each device, as the machine has them now."""


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


class Ledger:
    """Books bytes by device under a key. What is booked before it is taken is `pending`."""

    def __init__(self, budgets: dict[str, int], read_devices: ReadDevices) -> None:
        self.budgets = budgets
        self._read_devices = read_devices
        self._booked: dict[str, dict[str, int]] = {}
        self._pending: set[str] = set()

    def __repr__(self) -> str:
        """Tell what is booked of what."""
        return f"<Ledger {dict(self.booked())} of {self.budgets}>"

    def booked(self) -> Mapping[str, int]:
        """Return what is booked of each device."""
        return {device: self._sum(self._booked, device) for device in self.budgets}

    @property
    def is_settled(self) -> bool:
        """Whether nothing is being taken just now; until it is, `free` may tell too little."""
        return not self._pending

    def of(self, key: str) -> Mapping[str, int]:
        """Return what is booked under a key."""
        return self._booked.get(key, {})

    def free(self) -> dict[str, int]:
        """Return what may still be booked: of the budget, and of what the machine has.

        A device without a budget has nothing to give.
        """
        machine = self._read_devices()
        return {
            device: max(
                0, min(budget - self._sum(self._booked, device), self._left(device, machine))
            )
            for device, budget in self.budgets.items()
        }

    def excess(self) -> dict[str, int]:
        """Return by how much the measured bookings exceed the budgets, where they do."""
        over = {device: booked - self.budgets[device] for device, booked in self.booked().items()}
        return {device: amount for device, amount in over.items() if amount > 0}

    def book(self, key: str, devices: Mapping[str, int]) -> None:
        """Book what a load is about to take."""
        self._booked[key] = dict(devices)
        self._pending.add(key)

    def settle(self, key: str, devices: Mapping[str, int]) -> None:
        """Put the measured amounts in place of the booked ones."""
        if key in self._booked:
            self._booked[key] = dict(devices)
            self._pending.discard(key)

    def release(self, key: str) -> None:
        """Give back what a key has booked. Idempotent."""
        self._booked.pop(key, None)
        self._pending.discard(key)

    def status(self) -> tuple[DeviceStatus, ...]:
        """Tell how each device stands."""
        machine, booked = self._read_devices(), self.booked()
        return tuple(
            DeviceStatus(
                name=device,
                total=machine.get(device, (0, 0))[0],
                budget=budget,
                booked=booked[device],
                free=machine.get(device, (0, 0))[1],
            )
            for device, budget in self.budgets.items()
        )

    def _left(self, device: str, machine: Mapping[str, tuple[int, int]]) -> int:
        # What is booked and not yet taken still looks free to the machine.
        return machine.get(device, (0, 0))[1] - self._sum(self._pending, device)

    def _sum(self, keys: Iterable[str], device: str) -> int:
        return sum(self._booked[key].get(device, 0) for key in keys)


class Unwanted(Exception):
    """NullObserver waits for the load any more, or it may not push others out."""


class Dismiss(Protocol):
    """Unloads a replica that is idle, for the sake of another model."""

    def __call__(self, entry: ModelEntry, replica: Replica, *, by: str) -> asyncio.Task[None]:
        """Return the task that ends when the memory is back."""
        ...


class _Want:
    """A load that has no room yet."""

    def __init__(self, replica: Replica, since: float, need: Mapping[str, int]) -> None:
        self.replica = replica
        self.since = since
        self.need = need
        self.is_evicting = False
        self.closed: set[Replica] = set()


class MemoryQueue:
    """Who waits for memory, and how each of them gets it."""

    def __init__(
        self,
        entries: Callable[[], Iterable[ModelEntry]],
        ledger: Ledger,
        rules: Rules,
        dismiss: Dismiss,
        clock: Callable[[], float],
    ) -> None:
        self.ledger = ledger
        self.rules = rules
        self._entries = entries
        self._dismiss = dismiss
        self._clock = clock
        self._wants: list[_Want] = []
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        """Tell who waits."""
        return (
            f"<MemoryQueue {self.ledger!r}, waiting: {[want.replica.key for want in self._wants]}>"
        )

    def notify(self) -> None:
        """Have those who wait look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def book(
        self, entry: ModelEntry, replica: Replica, need: Mapping[str, int], *, may_evict: bool
    ) -> None:
        """Wait for room and book it.

        Raises:
            DoesNotFit: there will be none.
            Unwanted: nobody waits for it any more; or others would have to go, and may not.
        """
        want = _Want(replica, self._clock(), need)
        self._wants.append(want)
        end = want.since + replica.spec.load_timeout_s
        try:
            while not await self._step(entry, want, may_evict=may_evict):
                if self._clock() > end:
                    raise DoesNotFit(
                        f"{entry.spec.name} has waited {replica.spec.load_timeout_s:g} s for "
                        f"memory ({numbers(need)}) that others are using.",
                        retry_after_s=self.rules.longest_wait_s,
                    )
        finally:
            self._wants.remove(want)
            for closed in want.closed:
                closed.reopen(want)
            for other in self._entries():
                other.grant()
            self.notify()

    async def _step(self, entry: ModelEntry, want: _Want, *, may_evict: bool) -> bool:
        """Try once to get room; tell whether it is booked."""
        changed, now = self._changed, self._clock()
        decision = self._decide(want)
        if isinstance(decision, Fits):
            self.ledger.book(want.replica.key, want.need)
            return True
        if isinstance(decision, Never):
            raise DoesNotFit(self.refusal(entry.spec.name, want.need, decision))
        if not may_evict or not entry.is_wanted:
            raise Unwanted
        first = self._wants[0] is want
        if isinstance(decision, Evict) and self._may_evict(want, now):
            want.is_evicting = True
            await asyncio.gather(*[asyncio.shield(task) for task in self._evict(decision, entry)])
            return False
        until = now + _LOOK_AGAIN_S
        if isinstance(decision, Wait):
            until = min(until, decision.until or until)
            for key in decision.close if first else ():
                if (found := self.find(key)) is not None:
                    found[1].close(want)
                    want.is_evicting = True
                    want.closed.add(found[1])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.001, until - now)):
                await changed.wait()
        return False

    def _may_evict(self, want: _Want, now: float) -> bool:
        """Tell whether those before only wait for others to end, and not for too long."""
        before = self._wants[: self._wants.index(want)]
        patient_s = self.rules.longest_wait_s
        return all(not one.is_evicting and now - one.since < patient_s for one in before)

    def decide(
        self, need: Mapping[str, int], free: Mapping[str, int], waited_s: float
    ) -> policy.Decision:
        """Decide how `need` bytes by device could be had, for one who has waited so long."""
        residents = [
            # Who is leaving anyway holds nobody's memory for good.
            replica.resident(
                pinned=entry.spec.pinned and replica in entry.replicas and replica.unloading is None
            )
            for entry in self._entries()
            for replica in entry.all_replicas()
            if self.ledger.of(replica.key)
        ]
        now, rules = self._clock(), self.rules
        return policy.make_room(need, free, residents, waited_s=waited_s, now=now, rules=rules)

    def _decide(self, want: _Want) -> policy.Decision:
        free = self.ledger.free()
        decision = self.decide(want.need, free, self._clock() - want.since)
        if isinstance(decision, Fits):
            # What is free is for those before who fit too, and what somebody makes free for him.
            left = dict(free)
            for one in self._wants[: self._wants.index(want)]:
                if one.is_evicting or _fits(one.need, free):
                    left = {name: have - one.need.get(name, 0) for name, have in left.items()}
            if not _fits(want.need, left):
                return Wait()
        if isinstance(decision, Never) and not self.ledger.is_settled:
            # What a load has taken already counts twice: booked, and gone from the machine.
            return Wait()
        return decision

    def refusal(self, name: str, need: Mapping[str, int], never: Never) -> str:
        """Tell why a model cannot be loaded, with the numbers."""
        pinned = [one.spec.name for one in self._entries() if one.spec.pinned and one.is_ready]
        budget, free = self.ledger.budgets.get(never.device, 0), self.ledger.free()
        held = f" Pinned: {', '.join(pinned)}." if pinned else ""
        return (
            f"{name} needs {numbers(need)}; the budget of {never.device} is {_size(budget)}, "
            f"{_size(free.get(never.device, 0))} of it free now, and {_size(never.missing)} would "
            f"still be missing.{held}"
        )

    def _evict(self, decision: Evict, by: ModelEntry) -> list[asyncio.Task[None]]:
        found = [self.find(key) for key in decision.keys]
        return [self._dismiss(*pair, by=by.spec.name) for pair in found if pair is not None]

    def excessive(self) -> list[tuple[ModelEntry, Replica]]:
        """Return idle ones that should go because those that are loaded outgrew the budget."""
        if not (excess := self.ledger.excess()):
            return []
        decision = self.decide(excess, {}, waited_s=0.0)
        found = [self.find(key) for key in decision.keys] if isinstance(decision, Evict) else []
        return [pair for pair in found if pair is not None and pair[1].unloading is None]

    def find(self, key: str) -> tuple[ModelEntry, Replica] | None:
        """Find a replica and its entry by the key in the ledger."""
        pairs = ((entry, replica) for entry in self._entries() for replica in entry.all_replicas())
        return next((pair for pair in pairs if pair[1].key == key), None)


def _fits(need: Mapping[str, int], free: Mapping[str, int]) -> bool:
    return all(amount <= free.get(name, 0) for name, amount in need.items())


def numbers(need: Mapping[str, int]) -> str:
    """Return bytes by device in words."""
    return " and ".join(f"{_size(size)} of {name}" for name, size in need.items())


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


async def plan_load(
    memory: MemoryQueue, sizing: Sizing, spec: ModelSpec, entry: ModelEntry | None = None
) -> Plan:
    """Plan a load; `entry` is the model's, where it is served already.

    Raises:
        UnknownModel: the model is not on this machine, and only its header could tell.
        HeadraceError: it is damaged, or nothing can run it.
    """

    def report(what: str, done: int, total: int) -> None:
        if what.startswith("downloading"):
            raise UnknownModel(f"{spec.model} is not on this machine yet; pull it first.")

    need = await asyncio.to_thread(sizing.footprint, spec, report)
    budgets = dict(memory.ledger.budgets)
    largest = await asyncio.to_thread(sizing.largest_context, spec, budgets)
    up = entry is not None and entry.is_ready
    evict, reason = ((), "It is loaded.") if up else _consequences(memory, spec, need)
    return Plan(
        model=spec.name,
        engine=need.engine or spec.engine or "auto",
        need=need,
        fits=evict is not None,
        loaded=up,
        evict=evict or (),
        largest_context=largest,
        reason=reason,
        devices=memory.ledger.status(),
    )


def _consequences(
    memory: MemoryQueue, spec: ModelSpec, need: Footprint
) -> tuple[tuple[str, ...] | None, str]:
    """Return who would have to go, None where even that would not do, and a sentence."""
    if not need.devices:
        return (), "It takes no memory of this machine."
    free = memory.ledger.free()
    has = f"needs {numbers(need.devices)} ({need.how}), {numbers(free)} free"
    # As if it had waited for long enough: who is busy would end his requests and go.
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
