"""Leases: the requests that run on a replica, with the sums that the choice of a replica needs.

The sums are kept as leases change, so that a request costs no more beside thousands of others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from headrace.core.request import AnyRequest


class Counted(Protocol):
    """What is counted of a lease; see `Lease`."""

    request: AnyRequest
    cost: float
    size: int
    choices: int
    prompt_cost: float
    has_begun: bool
    is_alone: bool


L = TypeVar("L", bound=Counted)


@dataclass
class Tally:
    """Sums over leases.

    `taken` is of slots or choices, whichever a lease has more of; `starting` counts those without
    a token, and `starting_cost` the tokens of their prompts; `several` counts those with more than
    one choice left, and `awaited` those that run alone until they begin.
    """

    requests: int = 0
    size: int = 0
    choices: int = 0
    taken: int = 0
    cost: float = 0.0
    starting: int = 0
    starting_cost: float = 0.0
    several: int = 0
    awaited: int = 0

    def count(self, lease: Counted, sign: int) -> None:
        """Add a lease, or take it out with a `sign` of -1."""
        self.requests += sign
        self.size += sign * lease.size
        self.choices += sign * lease.choices
        self.taken += sign * max(lease.size, lease.choices)
        self.cost += sign * lease.cost
        self.several += sign * (lease.choices > 1)
        if not lease.has_begun:
            self.starting += sign
            self.starting_cost += sign * lease.prompt_cost
            self.awaited += sign * lease.is_alone


_NOTHING = Tally()


class Leases(Generic[L]):
    """The leases of one replica. They change by `change` only."""

    def __init__(self) -> None:
        self._leases: set[L] = set()
        self._clients: dict[str, Tally] = {}
        self.clear()

    def __len__(self) -> int:
        """Return the number of leases."""
        return len(self._leases)

    def __iter__(self) -> Iterator[L]:
        """Iterate over the leases, in no order."""
        return iter(self._leases)

    def __contains__(self, lease: object) -> bool:
        """Whether a lease is one of these."""
        return lease in self._leases

    def clear(self) -> None:
        """Remove all leases."""
        self._leases.clear()
        self._clients.clear()
        self.all, self.batch = Tally(), Tally()

    def of_client(self, client: str) -> Tally:
        """Return the sums over the requests of a client."""
        return self._clients.get(client, _NOTHING)

    def add(self, lease: L) -> None:
        """Add a lease."""
        self._leases.add(lease)
        self._count(lease, 1)

    def remove(self, lease: L) -> None:
        """Remove a lease, if it is one of these."""
        if lease not in self._leases:
            return
        self._leases.discard(lease)
        self._count(lease, -1)
        if not self._leases:
            # Sums of floats that were added and taken away need not be 0.
            self.clear()

    def change(self, lease: L, **values: Any) -> None:
        """Set attributes of a lease, which may have been removed."""
        is_counted = lease in self._leases
        if is_counted:
            self._count(lease, -1)
        for name, value in values.items():
            setattr(lease, name, value)
        if is_counted:
            self._count(lease, 1)

    def _count(self, lease: L, sign: int) -> None:
        client = lease.request.client
        own = self._clients.setdefault(client, Tally())
        own.count(lease, sign)
        if not own.requests:
            del self._clients[client]
        self.all.count(lease, sign)
        if lease.request.batch:
            self.batch.count(lease, sign)
