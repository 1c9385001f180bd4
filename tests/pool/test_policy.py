"""Who goes, who waits, who answers: the decisions as functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.pool.policy import (
    Candidate,
    Evict,
    Fits,
    Never,
    Resident,
    Rules,
    Wait,
    backoff_s,
    choose_replica,
    make_room,
)

NOW = 1000.0
RULES = Rules(min_residence_s=1.0, longest_wait_s=20.0)


def resident(key: str, size: int | Mapping[str, int] = 10, **given: Any) -> Resident:
    devices = {"cpu": size} if isinstance(size, int) else size
    facts = {"busy": False, "pinned": False, "loaded_at": 0.0, "idle_since": 900.0, "load_s": 1.0}
    return Resident(key=key, devices=devices, **{**facts, **given})


def room(need: int, free: int, *residents: Resident, waited_s: float = 0.0) -> Any:
    return make_room(
        {"cpu": need}, {"cpu": free}, residents, waited_s=waited_s, now=NOW, rules=RULES
    )


def test_that_what_fits_evicts_nobody() -> None:
    assert room(10, 10, resident("a")) == Fits()
    assert room(0, 0) == Fits()


def test_that_the_longest_idle_goes_first_and_the_cheap_before_the_dear() -> None:
    """M6: idle time against the cost of loading again."""
    old, new = resident("old", idle_since=100.0), resident("new", idle_since=990.0)
    assert room(10, 0, new, old) == Evict(("old",))
    dear, cheap = resident("dear", load_s=60.0), resident("cheap", load_s=1.0)
    assert room(10, 0, dear, cheap) == Evict(("cheap",))
    # Sixty times as dear, and idle for much more than sixty times as long.
    forgotten = resident("forgotten", load_s=60.0, idle_since=0.0)
    assert room(10, 0, forgotten, resident("fresh", idle_since=999.0)) == Evict(("forgotten",))


def test_that_nobody_goes_in_vain() -> None:
    small, big = resident("small", 10, idle_since=100.0), resident("big", 40)
    assert room(40, 0, small, big) == Evict(("big",))
    assert room(50, 0, small, big) == Evict(("small", "big"))


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 999), st.booleans()), max_size=8),
    st.integers(1, 200),
    st.integers(0, 100),
)
@settings(max_examples=300, derandomize=True, deadline=None, database=None)
def test_that_what_goes_is_enough_and_no_more(
    given: list[tuple[int, int, bool]], need: int, free: int
) -> None:
    residents = [
        resident(str(n), size, idle_since=float(idle), pinned=pinned)
        for n, (size, idle, pinned) in enumerate(given)
    ]
    by_key = {one.key: one for one in residents}
    movable = sum(one.devices["cpu"] for one in residents if not one.pinned)
    decision = room(need, free, *residents)
    if need <= free:
        assert decision == Fits()
    elif need > free + movable:
        assert decision == Never("cpu", need - free - movable)
    else:
        assert isinstance(decision, Evict)
        sizes = [by_key[key].devices["cpu"] for key in decision.keys]
        assert not any(by_key[key].pinned for key in decision.keys)
        assert free + sum(sizes) >= need > free + sum(sizes) - min(sizes)


def test_that_the_busy_and_the_pinned_stay() -> None:
    """M6: the busy are waited for, the pinned are not."""
    busy, pinned = resident("busy", busy=True), resident("pinned", pinned=True)
    assert isinstance(room(10, 0, busy, pinned), Wait)
    assert room(15, 0, busy, pinned) == Never("cpu", 5)
    assert room(10, 0, pinned) == Never("cpu", 10)


def test_that_who_has_just_been_loaded_stays_a_while() -> None:
    """M6: a minimum residence, or as long as the load took."""
    fresh = resident("fresh", loaded_at=999.5, idle_since=999.5, load_s=0.2)
    assert room(10, 0, fresh) == Wait(until=1000.5)
    slow = resident("slow", loaded_at=998.0, idle_since=998.0, load_s=7.0)
    assert room(10, 0, slow) == Wait(until=1005.0)
    # Who has waited for long enough waits for no residence.
    assert room(10, 0, slow, waited_s=20.0) == Evict(("slow",))
    # Until then the wait ends when it has been long enough, whoever stays longer.
    assert room(10, 0, resident("x", loaded_at=999.0, load_s=500.0), waited_s=15.0) == Wait(1005.0)


def test_that_the_longest_wait_closes_the_doors_of_as_many_as_it_takes() -> None:
    busy = [resident(str(n), 10, busy=True, idle_since=float(n)) for n in range(3)]
    assert room(20, 0, *busy, waited_s=19.0).close == ()
    closing = room(20, 0, *busy, waited_s=20.0)
    assert closing == Wait(close=("0", "1"))
    idle = resident("idle", 10, idle_since=999.9)
    assert set(room(20, 0, *busy, idle, waited_s=20.0).close) == {"idle", "0"}
    assert "pinned" not in room(20, 0, *busy, resident("pinned", pinned=True), waited_s=99).close


def test_that_nobody_is_put_out_before_it_has_served() -> None:
    """Or those who wait long would have each other loaded in vain."""
    loading = resident("loading", busy=True, loading=True)
    assert room(10, 0, loading, waited_s=99.0) == Wait()
    assert room(10, 0, loading, resident("x", busy=True), waited_s=99.0) == Wait(close=("x",))


def test_that_each_device_gets_what_it_lacks() -> None:
    """One on another device is no help."""
    need, free = {"cpu": 5, "cuda:0": 50}, {"cpu": 10, "cuda:0": 20}
    host = resident("host", {"cpu": 100}, idle_since=0.0)
    card = resident("card", {"cpu": 1, "cuda:0": 30})
    other = resident("other", {"cuda:1": 80}, idle_since=0.0)

    def decide(*residents: Resident, **given: int) -> Any:
        return make_room({**need, **given}, free, residents, waited_s=0.0, now=NOW, rules=RULES)

    assert decide(host, card, other) == Evict(("card",))
    assert decide(host, other) == Never("cuda:0", 30)
    assert decide(host, card, other, cpu=60) == Evict(("host", "card"))
    # A device that nobody knows has nothing.
    assert make_room({"tpu": 1}, free, [host], waited_s=0, now=NOW, rules=RULES) == Never("tpu", 1)


def candidate(number: int, **given: Any) -> Candidate:
    facts = {"free": 4, "running": 0, "max_running": 4, "work": 0.0}
    return Candidate(number=number, **{**facts, **given})


def test_that_the_least_work_for_its_weight_answers() -> None:
    """M3: least outstanding work, weighted."""
    assert choose_replica([]) is None
    assert choose_replica([candidate(0, work=100.0), candidate(1, work=50.0)]) == 1
    heavy, light = candidate(0, work=100.0, weight=3.0), candidate(1, work=50.0)
    assert choose_replica([heavy, light]) == 0
    # Between two that do nothing: the stronger, then the first.
    assert choose_replica([candidate(0), candidate(1, weight=2.0)]) == 1
    assert choose_replica([candidate(0), candidate(1)]) == 0


def test_that_only_who_has_slots_answers() -> None:
    full, half = candidate(0, free=0, running=4), candidate(1, free=1, running=3, work=999.0)
    assert choose_replica([full, half]) == 1
    # Choices of one request have all slots: they make room where no other replica has any.
    shared = candidate(2, free=3, running=4)
    assert choose_replica([full, half, shared]) == 1
    assert choose_replica([full, shared]) == 2
    assert choose_replica([candidate(0, free=0, max_running=0)]) is None


def test_that_a_known_beginning_goes_before_little_more_work() -> None:
    """M3: a prefix that is cached draws, while its replica is not overloaded."""
    knows = candidate(0, matched=3, running=1, free=3, work=500.0)
    assert choose_replica([knows, candidate(1)]) == 0
    assert choose_replica([knows, candidate(1, matched=4)]) == 1
    loaded = candidate(0, matched=3, running=3, free=1, work=500.0)
    assert choose_replica([loaded, candidate(1)]) == 1
    assert choose_replica([loaded, candidate(1, running=2, free=2)]) == 0


def test_that_replicas_with_many_slots_share_what_begins_alike() -> None:
    """M3, issue 17.5: 256 streams with one beginning all ran on one replica of sixteen."""
    running = [0, 0, 0, 0]
    for _ in range(256):
        candidates = [
            candidate(
                number, matched=int(count > 0), running=count, free=8192 - count, max_running=8192,
                work=float(count),
            )
            for number, count in enumerate(running)
        ]  # fmt: skip
        running[choose_replica(candidates) or 0] += 1
    assert min(running) >= 60
    # With more of them, a few more are as nothing: the cache of a long conversation is worth them.
    knows = candidate(0, matched=9, running=120, free=136, max_running=256)
    assert choose_replica([knows, candidate(1, running=100, free=156, max_running=256)]) == 0


def test_that_an_ailing_one_counts_half() -> None:
    """M3: health."""
    unhealthy = candidate(0, unhealthy=True, work=60.0)
    assert choose_replica([unhealthy, candidate(1, work=100.0)]) == 1
    assert choose_replica([unhealthy, candidate(1, work=130.0)]) == 0
    # What it knows is gone with its process.
    assert choose_replica([candidate(0, unhealthy=True, matched=5), candidate(1)]) == 1


@pytest.mark.parametrize(
    ("failures", "wait_s"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 4), (7, 32), (8, 60), (5000, 60)]
)
def test_how_long_it_waits_after_failures(failures: int, wait_s: float) -> None:
    """M5: 1, 2, 4 ... 60 seconds."""
    assert backoff_s(failures) == wait_s
