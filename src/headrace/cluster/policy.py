"""The decisions of a cluster as pure functions: the node for a request, and for a load."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from headrace.core.status import DeviceStatus
from headrace.machine import HOST

_NEAR = 0.25
"""How much more of its slots a node may use for a prompt that it has in its cache."""


class Candidate(NamedTuple):
    """A node that could take a request.

    `load` is its running and waiting requests of the model, for each slot. `matched` is how many
    blocks of the prompt's beginning it has seen. `free` is memory in bytes, `idle` that with the
    memory of idle models; `fits` is whether the model can be loaded without evicting. `failed` is
    whether the last load there has failed. `rank` decides between equals.
    """

    name: str
    ready: bool = False
    loading: bool = False
    failed: bool = False
    load: float = 0.0
    matched: int = 0
    fits: bool = False
    free: int = 0
    idle: int = 0
    rank: int = 0


def choose_node(candidates: Sequence[Candidate]) -> str | None:
    """Return the name of the node for a request, or None if there is no candidate.

    A node that has loaded the model is preferred, with the least load; one that has the prompt's
    beginning in its cache if it is not much busier. Then one that is loading it, then one where
    it fits without evicting, then the one with the most memory that is idle.
    """
    ready = [candidate for candidate in candidates if candidate.ready]
    if ready:
        return _least_busy(ready).name
    if not candidates:
        return None
    return min(candidates, key=_effort).name


def _least_busy(ready: Sequence[Candidate]) -> Candidate:
    least = min(candidate.load for candidate in ready)
    near = [candidate for candidate in ready if candidate.load <= least + _NEAR]
    longest = max(candidate.matched for candidate in near)
    if longest:
        ready = [candidate for candidate in near if candidate.matched == longest]
    return min(ready, key=lambda candidate: (candidate.load, candidate.rank))


def _effort(candidate: Candidate) -> tuple[bool, bool, bool, int, int]:
    memory = candidate.free if candidate.fits else candidate.idle
    return candidate.failed, not candidate.loading, not candidate.fits, -memory, candidate.rank


def rank(model: str, node: str) -> int:
    """Return the place of a node for a model among equals, the same at every front."""
    return int.from_bytes(hashlib.blake2s(f"{model}\0{node}".encode(), digest_size=4).digest())


def allows(wanted: Sequence[str], name: str, labels: Sequence[str]) -> bool:
    """Whether a model with these labels may run on a node; its name is a label too."""
    return not wanted or name in wanted or any(label in wanted for label in labels)


def copies_of(copies: int, nodes: int) -> int:
    """Return how many workers of a model one of `nodes` nodes gets: distinct nodes come first."""
    return max(1, -(-copies // max(1, nodes)))


def free_memory(devices: Sequence[DeviceStatus]) -> dict[str, int]:
    """Return the bytes that are not booked, by device."""
    return {device.name: device.budget - device.booked for device in devices}


def fits(need: Mapping[str, int] | None, free: Mapping[str, int]) -> bool:
    """Whether a need in bytes by device, None if unknown, is free."""
    if need is None:
        return True
    gpus = sum(amount for device, amount in free.items() if device != HOST)
    for device, amount in need.items():
        there = free.get(device, 0) if device == HOST else max(gpus, free.get(device, 0))
        if amount > there:
            return False
    return True
