"""Decisions of the pool as functions of their arguments: who goes, who waits, who answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from headrace.config.tree import Rules

_SECOND_THOUGHTS_S = 0.001


class Resident(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that is loaded, or `loading` and busy. Times are in seconds, sizes in bytes."""

    key: str
    devices: Mapping[str, int]
    busy: bool
    pinned: bool
    loaded_at: float
    idle_since: float
    load_s: float
    loading: bool = False


class Fits(msgspec.Struct, frozen=True):
    """There is room."""


class Evict(msgspec.Struct, frozen=True):
    """There is, once these have gone. All of them are idle."""

    keys: tuple[str, ...]


class Wait(msgspec.Struct, frozen=True):
    """Not now; look again when something has changed, or at `until`.

    `close` are those that take no new request from now on, so that they become idle.
    """

    until: float | None = None
    close: tuple[str, ...] = ()


class Never(msgspec.Struct, frozen=True):
    """There will be none; `device` is where it lacks, `missing` how many bytes."""

    device: str
    missing: int


Decision = Fits | Evict | Wait | Never


def make_room(
    need: Mapping[str, int],
    free: Mapping[str, int],
    residents: Sequence[Resident],
    *,
    waited_s: float,
    now: float,
    rules: Rules,
) -> Decision:
    """Decide how `need` bytes by device can be had, where `free` bytes are free now.

    Idle models go first whose idle time is long against the time that loading them again takes.
    """
    short = _short(need, free)
    if not short:
        return Fits()
    movable = [one for one in residents if not one.pinned]
    if (never := _never(short, movable)) is not None:
        return never
    patient = waited_s < rules.longest_wait_s
    idle = [one for one in movable if not one.busy]
    ready = [one for one in idle if not patient or _free_at(one, rules) <= now]
    chosen = _enough(short, sorted(ready, key=lambda one: _worth(one, now)))
    if chosen is not None:
        return Evict(tuple(one.key for one in chosen))
    if patient:
        times = [_free_at(one, rules) for one in idle if one not in ready]
        times.append(now + rules.longest_wait_s - waited_s)
        return Wait(max(min(times), now + _SECOND_THOUGHTS_S))
    # Somebody has waited for long enough: those in the way serve whom they have, and then go.
    # Not before they serve anybody, or all would be loaded in turn and nobody answered.
    loaded = [one for one in movable if not one.loading]
    going = _enough(short, sorted(loaded, key=lambda one: (one.busy, _worth(one, now))))
    return Wait(close=tuple(one.key for one in going or ()))


def _short(need: Mapping[str, int], free: Mapping[str, int]) -> dict[str, int]:
    return {
        device: amount - free.get(device, 0)
        for device, amount in need.items()
        if amount > free.get(device, 0)
    }


def _never(short: Mapping[str, int], movable: Sequence[Resident]) -> Never | None:
    for device, missing in short.items():
        most = sum(one.devices.get(device, 0) for one in movable)
        if missing > most:
            return Never(device, missing - most)
    return None


def _free_at(one: Resident, rules: Rules) -> float:
    return one.loaded_at + max(rules.min_residence_s, one.load_s)


def _worth(one: Resident, now: float) -> float:
    """Return the cost of loading it again for each second that it has not been needed."""
    return (one.load_s + 0.1) / (max(0.0, now - one.idle_since) + 0.1)


def _enough(short: Mapping[str, int], order: Iterable[Resident]) -> list[Resident] | None:
    """Take from the front until it suffices; then give back whom it does not need."""
    chosen: list[Resident] = []
    left = dict(short)
    for one in order:
        if not any(one.devices.get(device, 0) for device, missing in left.items() if missing > 0):
            continue
        chosen.append(one)
        left = {device: missing - one.devices.get(device, 0) for device, missing in left.items()}
        if all(missing <= 0 for missing in left.values()):
            return _needed(short, chosen)
    return None


def _needed(short: Mapping[str, int], chosen: list[Resident]) -> list[Resident]:
    for one in tuple(reversed(chosen)):
        rest = [other for other in chosen if other is not one]
        if all(
            sum(other.devices.get(device, 0) for other in rest) >= missing
            for device, missing in short.items()
        ):
            chosen = rest
    return chosen


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that could take a request.

    `work` is the tokens it has to do, `running` its requests, `matched` how many blocks of the
    prompt's beginning it has seen. `weight` is its share; an `ailing` one counts half.
    """

    number: int
    free: int
    running: int
    max_running: int
    work: float
    weight: float = 1.0
    ailing: bool = False
    matched: int = 0


def choose_replica(candidates: Sequence[Candidate], size: int = 1) -> int | None:
    """Return the number of the replica for a request of `size` slots, None where there is none.

    The one with the least work for its weight; but one that knows the prompt's beginning goes
    before it, while it has not a quarter of its slots more to do than the emptiest.
    """
    able = [one for one in candidates if one.free >= min(size, one.max_running) and one.free > 0]
    if not able:
        return None
    least = min(one.running for one in able)
    near = [one for one in able if one.running <= least + max(1, one.max_running // 4)]
    longest = max((one.matched for one in near if not one.ailing), default=0)
    if longest:
        able = [one for one in near if one.matched == longest and not one.ailing]
    return min(able, key=_busyness).number


def _busyness(one: Candidate) -> tuple[float, float, int]:
    share = one.weight / 2 if one.ailing else one.weight
    return (one.work / share, -share, one.number)


def backoff_s(failures: int) -> float:
    """Return how long to wait after so many failures in a row: 0, 1, 2, 4 ... 60 seconds."""
    return min(60.0, 2.0 ** min(failures - 2, 6)) if failures > 1 else 0.0
