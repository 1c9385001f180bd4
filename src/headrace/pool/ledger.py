"""Ledger: the memory of the devices that is booked for models."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field

from headrace.core.status import DeviceStatus, Footprint
from headrace.machine import HOST

ReadDevices = Callable[[], Mapping[str, tuple[int, int]]]
"""Returns the total and the free bytes of each device now."""

_numbers = itertools.count()


@dataclass(frozen=True)
class _Booking:
    """Bytes by device: what the load was `planned` to take, and what is `held`."""

    planned: Mapping[str, int] = field(default_factory=dict[str, int])
    held: Mapping[str, int] = field(default_factory=dict[str, int])

    def repeated(self, device: str, budget: int) -> int:
        """Return what it takes beyond the whole budget, and would again after a reload."""
        held = self.held.get(device, 0)
        return held - budget if held > budget >= self.planned.get(device, 0) else 0


def named(held: Mapping[str, int], placed: Iterable[str]) -> dict[str, int]:
    """Return memory by the names that the service has for the devices of a process.

    The process sees only the GPUs on which it is `placed`, and numbers them from 0.
    """
    gpus = [device for device in placed if device != HOST]
    names = {f"cuda:{number}": device for number, device in enumerate(gpus)}
    return {names.get(device, device): amount for device, amount in held.items()}


def to_book(need: Footprint | None, held: Mapping[str, int]) -> dict[str, int]:
    """Return what to book for a load that holds so much, in bytes by device.

    That is no less than it needs if its requests take memory that it does not hold yet.
    """
    if need is None or (held and "batch" not in need.parts):
        return dict(held)
    both = {**need.devices, **held}
    return {name: max(need.devices.get(name, 0), held.get(name, 0)) for name in both}


class Ledger:
    """Books bytes by device under a key. A booking is `pending` until the load has ended.

    After a worker's unexpected end its booking is `lingering` until the memory is free.
    """

    def __init__(self, budgets: dict[str, int], read_devices: ReadDevices) -> None:
        self.budgets = budgets
        self._read_devices = read_devices
        self._bookings: dict[str, _Booking] = {}
        self._pending: set[str] = set()
        self._lingering: set[str] = set()

    def __repr__(self) -> str:
        """Describe the bookings and the budgets."""
        return f"<Ledger {dict(self.booked())} of {self.budgets}>"

    def booked(self) -> Mapping[str, int]:
        """Return how many bytes are booked of each device."""
        return {device: self._sum(self._bookings, device) for device in self.budgets}

    @property
    def is_settled(self) -> bool:
        """Whether no booking is pending or lingering; otherwise `free` may be too low."""
        return not (self._pending or self._lingering)

    @property
    def returning(self) -> dict[str, int]:
        """The bytes by device that workers which have ended still hold."""
        sums = ((device, self._sum(self._lingering, device)) for device in self.budgets)
        return {device: amount for device, amount in sums if amount}

    def of(self, key: str) -> Mapping[str, int]:
        """Return what is booked under a key."""
        return self._bookings.get(key, _Booking()).held

    def free(self) -> dict[str, int]:
        """Return what can still be booked: the rest of the budget, at most what the machine has.

        Devices without a budget are left out.
        """
        machine = self._read_devices()
        return {
            device: max(
                0, min(budget - self._sum(self._bookings, device), self._left(device, machine))
            )
            for device, budget in self.budgets.items()
        }

    def excess(self) -> dict[str, int]:
        """Return by how much bookings exceed the budgets, of devices where they do.

        What a single one takes beyond the whole budget is left out if its load was planned within
        it: to unload it would change nothing, as the next load would take as much.
        """
        amounts = {
            device: self._sum(self._bookings, device)
            - budget
            - sum(booking.repeated(device, budget) for booking in self._bookings.values())
            for device, budget in self.budgets.items()
        }
        return {device: amount for device, amount in amounts.items() if amount > 0}

    def book(self, key: str, devices: Mapping[str, int]) -> None:
        """Book the memory of a load."""
        self._bookings[key] = _Booking(dict(devices), dict(devices))
        self._pending.add(key)

    def settle(self, key: str, devices: Mapping[str, int]) -> None:
        """Replace the booked amounts by the measured ones."""
        if (booking := self._bookings.get(key)) is not None:
            self._bookings[key] = _Booking(booking.planned, dict(devices))
            self._pending.discard(key)

    def release(self, key: str) -> None:
        """Remove the booking of a key. Idempotent."""
        self._bookings.pop(key, None)
        self._pending.discard(key)

    @contextlib.contextmanager
    def lingering(self, key: str) -> Generator[None]:
        """Keep the booking of a key for this context, while another can be made under the key."""
        held = f"{key} ended {next(_numbers)}"
        self._bookings[held] = self._bookings.get(key, _Booking())
        self.release(key)
        self._lingering.add(held)
        try:
            yield
        finally:
            self._lingering.discard(held)
            self.release(held)

    def status(self) -> tuple[DeviceStatus, ...]:
        """Return the status of each device."""
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
        # Pending bookings may still be free on the machine.
        return machine.get(device, (0, 0))[1] - self._sum(self._pending, device)

    def _sum(self, keys: Iterable[str], device: str) -> int:
        return sum(self._bookings[key].held.get(device, 0) for key in keys)
