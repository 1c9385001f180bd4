"""The book of memory: who holds how much of which device, out of which budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from headrace.core.status import DeviceStatus

ReadDevices = Callable[[], Mapping[str, tuple[int, int]]]
"""Returns total and free bytes of each device, as the machine has them now."""


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
