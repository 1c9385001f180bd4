"""The decisions of the pool as pure functions: evictions, waits, the choice of a replica."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from headrace.config.tree import Rules
from headrace.core.request import AnyRequest
from headrace.machine import HOST

_IN_USE_S = 60.0
_MIN_WAIT_S = 0.001
_BLOCK_CHARACTERS, _MAX_REQUEST_BLOCKS = 256, 64
# Of so many slots, one is for a request of a batch that has no token yet.
_STARTING = 16
# How many more requests than another a replica may run, for the sake of its cache.
_AHEAD = 8


class Resident(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that is loaded, or that is `loading` and busy. Times in seconds, sizes in bytes."""

    key: str
    devices: Mapping[str, int]
    busy: bool
    pinned: bool
    loaded_at: float
    idle_since: float
    load_s: float
    loading: bool = False


class Fits(msgspec.Struct, frozen=True):
    """There is enough free memory."""


class Evict(msgspec.Struct, frozen=True):
    """There is enough once these are unloaded. All of them are idle."""

    keys: tuple[str, ...]


class Wait(msgspec.Struct, frozen=True):
    """Not now; decide again after a change, or at `until`.

    `close` are replicas that take no new requests from now on, so that they become idle.
    """

    until: float | None = None
    close: tuple[str, ...] = ()


class Never(msgspec.Struct, frozen=True):
    """There can never be enough: `device` lacks `missing` bytes."""

    device: str
    missing: int


Decision = Fits | Evict | Wait | Never
_ORDER = (Fits, Evict, Wait, Never)


def make_room(
    need: Mapping[str, int],
    free: Mapping[str, int],
    residents: Sequence[Resident],
    *,
    waited_s: float,
    now: float,
    rules: Rules,
) -> Decision:
    """Decide how to get `need` bytes by device, while `free` bytes are free.

    Models are evicted first whose idle time is long compared to their load time.
    """
    short = _shortfall(need, free)
    if not short:
        return Fits()
    movable = [resident for resident in residents if not resident.pinned]
    if (never := _check_possible(short, movable)) is not None:
        return never
    patient = waited_s < rules.longest_wait_s
    idle = [resident for resident in movable if not resident.busy]
    ready = [resident for resident in idle if not patient or _evictable_at(resident, rules) <= now]
    selected = _select(short, sorted(ready, key=lambda resident: _reload_cost(resident, now)))
    if selected is not None:
        return Evict(tuple(resident.key for resident in selected))
    if patient:
        times = [_evictable_at(resident, rules) for resident in idle if resident not in ready]
        times.append(now + rules.longest_wait_s - waited_s)
        return Wait(max(min(times), now + _MIN_WAIT_S))
    # The load has waited long enough: models in its way finish their requests and are unloaded.
    # Not while they load: models would evict each other before they have served a request.
    loaded = sorted(
        (resident for resident in movable if not resident.loading),
        key=lambda resident: (resident.busy, _reload_cost(resident, now)),
    )
    closing = _select(short, loaded)
    return Wait(close=tuple(resident.key for resident in closing or ()))


def in_use(resident: Resident, now: float) -> Resident:
    """Return a resident that counts as busy until it has been idle for some time."""
    busy = resident.busy or now - resident.idle_since < _IN_USE_S
    return msgspec.structs.replace(resident, busy=busy)


def choose_devices(
    decisions: Sequence[tuple[Mapping[str, int], Decision]],
    free: Mapping[str, int],
    crowded: Mapping[str, int],
) -> int:
    """Return the place of the best decision, each about a need in bytes by device.

    Free memory is better than evicting, and that better than waiting. Then devices are preferred
    that have fewer replicas of the model, by the counts in `crowded`, and more free memory.
    """

    def rank(place: int) -> tuple[int, int, int, int]:
        need, decision = decisions[place]
        gpus = [device for device in need if device != HOST] or [*need]
        own = sum(crowded.get(device, 0) for device in gpus)
        spare = min((free.get(device, 0) - need[device] for device in gpus), default=0)
        effort = len(decision.keys) if isinstance(decision, Evict) else 0
        return _ORDER.index(type(decision)), own + effort, -spare, place

    return min(range(len(decisions)), key=rank)


def _shortfall(need: Mapping[str, int], free: Mapping[str, int]) -> dict[str, int]:
    return {
        device: amount - free.get(device, 0)
        for device, amount in need.items()
        if amount > free.get(device, 0)
    }


def _check_possible(short: Mapping[str, int], movable: Sequence[Resident]) -> Never | None:
    for device, missing in short.items():
        total = sum(resident.devices.get(device, 0) for resident in movable)
        if missing > total:
            return Never(device, missing - total)
    return None


def _evictable_at(resident: Resident, rules: Rules) -> float:
    return resident.loaded_at + max(rules.min_residence_s, resident.load_s)


def _reload_cost(resident: Resident, now: float) -> float:
    """Return the cost of loading it again per second of its idle time."""
    return (resident.load_s + 0.1) / (max(0.0, now - resident.idle_since) + 0.1)


def _select(short: Mapping[str, int], order: Iterable[Resident]) -> list[Resident] | None:
    """Select from the front until there is enough, then drop those that are not needed."""
    selected: list[Resident] = []
    left = dict(short)
    for resident in order:
        held = resident.devices
        if not any(held.get(device, 0) for device, missing in left.items() if missing > 0):
            continue
        selected.append(resident)
        left = {device: missing - held.get(device, 0) for device, missing in left.items()}
        if all(missing <= 0 for missing in left.values()):
            return _without_surplus(short, selected)
    return None


def _without_surplus(short: Mapping[str, int], selected: list[Resident]) -> list[Resident]:
    for resident in tuple(reversed(selected)):
        rest = [other for other in selected if other is not resident]
        if all(
            sum(other.devices.get(device, 0) for other in rest) >= missing
            for device, missing in short.items()
        ):
            selected = rest
    return selected


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A replica that could take a request.

    `free` is how many more requests it takes: the choices of those that it has make room for them
    one by one. `running` is how many slots are taken, and `work` the tokens of its requests.
    `matched` is how many blocks of the prompt's beginning it has seen. `weight` is its share of the
    work, which is halved while `unhealthy`. `batch` is how many of its slots requests of batches
    have, and `starting` how many of these requests have no token yet. `held` is whether other
    requests of its client have to begin or end first.
    """

    number: int
    free: int
    running: int
    max_running: int
    work: float
    weight: float = 1.0
    unhealthy: bool = False
    matched: int = 0
    batch: int = 0
    starting: int = 0
    held: bool = False

    @property
    def open(self) -> int:
        """How many requests begin at once."""
        return max(0, min(self.free, self.max_running - self.running))


def left_for_batch(candidate: Candidate, *, quiet: bool) -> Candidate:
    """Return a candidate with the slots that requests of batches may take.

    One slot stays free, so that no other request waits for the end of one of a batch. Unless it has
    been `quiet`, half of them do, and few requests start at a time: their prompts are in the way
    of the next one's. An only slot is taken.
    """
    total, free = candidate.max_running, candidate.open
    if not quiet and candidate.starting >= max(1, total // _STARTING):
        return msgspec.structs.replace(candidate, free=0)
    most = max(1, total - 1 if quiet else total // 2)
    spare = 1 if total > 1 else 0
    free = max(0, min(free - spare, most - candidate.batch))
    return msgspec.structs.replace(candidate, free=free)


def choose_replica(candidates: Sequence[Candidate]) -> int | None:
    """Return the number of the replica for a request, or None.

    It is the one with the least work for its weight, of those with an open slot if any has. One
    that has the prompt's beginning in its cache is preferred unless it is too far ahead of the
    emptiest (`_is_near`).
    """
    usable = [each for each in candidates if each.free > 0 and not each.held]
    usable = [each for each in usable if each.open] or usable
    if not usable:
        return None
    least = min(candidate.running for candidate in usable)
    near = [candidate for candidate in usable if _is_near(candidate, least)]
    longest = max((candidate.matched for candidate in near if not candidate.unhealthy), default=0)
    if longest:
        usable = [c for c in near if c.matched == longest and not c.unhealthy]
    return min(usable, key=_busyness).number


def _is_near(candidate: Candidate, least: int) -> bool:
    """Whether a cache is worth the company: few more requests than the emptiest replica has.

    The bound does not grow with the slots alone: all prompts of an application begin alike, and
    hundreds of them would run on one replica while another is idle.
    """
    ahead = min(candidate.max_running // 4, max(_AHEAD, least // 4))
    return candidate.running <= least + max(1, ahead)


def _busyness(candidate: Candidate) -> tuple[float, float, int]:
    share = candidate.weight / 2 if candidate.unhealthy else candidate.weight
    return (candidate.work / share, -share, candidate.number)


def backoff_s(failures: int) -> float:
    """Return the delay in seconds after consecutive failures: 0, 1, 2, 4 ... 60."""
    return min(60.0, 2.0 ** min(failures - 2, 6)) if failures > 1 else 0.0


def blocks_of(request: AnyRequest) -> tuple[int, ...]:
    """Return hashes of growing prefixes of a prompt; equal prefixes share a cache."""
    # The cache of a prompt is that of one adapter.
    text = request.adapter + request.opening()
    hashes: list[int] = []
    end = min(len(text), _BLOCK_CHARACTERS * _MAX_REQUEST_BLOCKS)
    for start in range(0, end, _BLOCK_CHARACTERS):
        block = text[start : start + _BLOCK_CHARACTERS]
        hashes.append(hash((hashes[-1] if hashes else 0, block)))
    return tuple(hashes)
