"""Issue 17.2: in which order contenders are measured, what is left out, and that time is kept."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from headrace.engines.measured import Agreement
from headrace.lab.tune import race
from headrace.lab.tune.contender import NO_TIME
from headrace.lab.tune.measure import Bound, Shape
from headrace.lab.tune.race import Clock, Race

AGREES = Agreement(prompts=1, greedy=1, forced=1, distance=0, compared=8)


class Time:
    """A clock that only the contenders move."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    time = Time()
    monkeypatch.setattr(race, "time", time)
    return time


class Scripted:
    """A contender with known rates by the number of streams; each turn takes `turn_s` seconds."""

    def __init__(
        self, time: Time, name: str, *rates: float, memory: int = 1, turn_s: float = 10, **more: Any
    ) -> None:
        self.time, self.name, self.turn_s, self.more = time, name, turn_s, more
        self.known = dict[int, float](
            zip((1, 8, 32), rates if len(rates) == 3 else rates * 3, strict=True)
        )
        self.done: dict[int, list[float]] = {}
        self.memory = {"cpu": memory}
        self.fault: str | None = None
        self.left_out: str | None = None
        self.agreement: Agreement | None = None
        self.is_loaded = True
        self.log: list[str] = []
        self.least: dict[int, float] = {}

    @property
    def can_win(self) -> bool:
        return self.fault is None and self.left_out is None

    def rates(self, streams: int) -> list[float]:
        return self.done.get(streams, [])

    def rate(self, streams: int) -> float:
        return statistics.median(self.rates(streams) or [0.0])

    def expected_s(self, streams: int) -> float:
        return self.turn_s if self.rates(streams) else 0.0

    def whole(self, streams: int) -> int:
        return len(self.rates(streams))

    async def try_out(self, shape: Shape, least: Any, limit_s: float, *, keep: bool) -> None:
        self.least = dict(least)
        await self.measure(shape, 0, limit_s, keep=keep)

    async def measure(self, shape: Shape, number: int, limit_s: float, *, keep: bool) -> None:
        end = self.time.now + limit_s
        for streams in shape.streams:
            self.log.append(f"{number} {streams}")
            self.time.now = min(self.time.now + self.turn_s, end)
            factors = self.more.get("factors") or [1.0]
            rate = self.known[streams] * factors[number % len(factors)]
            self.done.setdefault(streams, []).append(rate)

    async def judge(self, reference: Any, limit_s: float, *, keep: bool) -> None:
        self.time.now += min(self.more.get("judge_s", 1), limit_s)
        self.agreement, self.fault = AGREES, self.more.get("fault")

    async def aclose(self) -> None:
        self.is_loaded = False


async def run(
    time: Time, field: Any, streams: tuple[int, ...] = (1,), budget: float = 1000, rounds: int = 3
) -> float:
    """Run all of a race, and return the seconds that it took."""

    async def prepare(contender: Any) -> None:
        time.now += contender.more.get("prepare_s", 0)

    began = time.now
    shape = Shape(streams=streams, rounds=rounds, budget_s=budget)
    one = Race(field, shape, Clock(budget), 1000, lambda *_: None)
    await one.first_turns(prepare)
    reference: Any = object()
    await one.rounds(reference)
    await one.near_ties()
    await one.between()
    one.leave_out()
    return time.now - began


async def test_only_the_fastest_are_compared_and_measured_again(time: Time) -> None:
    rates = (100.0, 95.0, 80.0, 50.0)
    fast, second, near, slow = (Scripted(time, "x", rate, memory=9) for rate in rates)
    await run(time, [slow, near, second, fast])
    assert slow.log == ["0 1"]
    assert (slow.agreement, slow.is_loaded) == (None, False)
    assert slow.left_out == "slower in its first turns, 50.0 of 100.0 tokens/s at 1"
    # Below 0.85 of the best after the second round.
    assert near.log == ["0 1", "1 1"]
    assert second.log == fast.log == ["0 1", "1 1", "2 1"]


async def test_a_first_turn_has_to_reach_a_share_of_the_best_so_far(time: Time) -> None:
    first, second = Scripted(time, "x", 100, 100, 300), Scripted(time, "x", 100, 100, 40)
    await run(time, [first, second], (1, 8, 32))
    assert first.least == {1: 0, 32: 0}
    assert second.least == {1: pytest.approx(60), 32: pytest.approx(180)}


@pytest.mark.parametrize(
    ("bound", "tokens", "seconds", "slow"),
    [
        # The first answers have 128 tokens: at 60 tokens/s they take 2.1 s.
        (Bound(least=60), 0, 2.0, False),
        (Bound(least=60), 100, 2.2, True),
        (Bound(least=60), 140, 2.2, False),
        (Bound(), 0, 1000.0, False),
    ],
)
def test_a_turn_is_slow_once_it_had_time_for_its_first_answers(
    bound: Bound, tokens: int, seconds: float, slow: bool
) -> None:
    assert bound.is_slow(tokens, seconds, 128) is slow


async def test_the_best_for_many_streams_stays_though_it_is_slow_with_one(time: Time) -> None:
    alone, many = Scripted(time, "x", 100, 20, 10), Scripted(time, "x", 10, 200, 500)
    await run(time, [alone, many], (1, 8, 32))
    assert alone.can_win
    assert many.can_win
    # At last the number of streams of which no winner is chosen.
    assert alone.log[-1] == many.log[-1] == "2 8"


async def test_luck_in_a_first_turn_is_found_out(time: Time) -> None:
    """A machine was idle for one turn: what was slower then is measured beside it."""
    lucky, too = (Scripted(time, "x", 100, factors=[1, 0.2, 0.2]) for _ in range(2))
    steady = Scripted(time, "x", 60)
    await run(time, [lucky, too, steady])
    assert lucky.rate(1) == too.rate(1) == pytest.approx(20)
    assert steady.log[:2] == ["0 1", "2 1"]
    assert steady.agreement is not None


async def test_what_does_not_agree_is_passed_over(time: Time) -> None:
    wrong = Scripted(time, "x", 100, fault="junk")
    right, too, slow = (Scripted(time, "x", rate) for rate in (60, 50, 30))
    await run(time, [wrong, right, too, slow])
    assert (right.agreement, right.left_out) == (AGREES, None)
    assert too.agreement == AGREES, "the first two are"
    assert wrong.log == ["0 1"]
    assert slow.left_out is not None


@pytest.mark.parametrize("count", [1, 4, 40])
@pytest.mark.parametrize("turn_s", [0.1, 5, 200])
async def test_it_ends_in_its_time(time: Time, count: int, turn_s: float) -> None:
    field = [Scripted(time, "x", 100 + n % 3, turn_s=turn_s, judge_s=20) for n in range(count)]
    assert await run(time, field, (1, 8, 32), budget=100) <= 100 + 1e-6
    assert any(one.can_win and one.agreement for one in field)
    out = [one for one in field if not one.can_win]
    assert all(one.left_out for one in out)
    if (count, turn_s) == (40, 200):
        assert field[-1].left_out == NO_TIME
        assert field[-1].log == []


async def test_conversions_do_not_count(time: Time) -> None:
    field = [Scripted(time, "x", 100, prepare_s=500) for _ in range(2)]
    assert 1000 < await run(time, field, budget=100) <= 1100
    assert all(one.agreement for one in field)


@pytest.mark.parametrize(
    ("factors", "memory", "turns"),
    [([0.955], 1, 5), ([0.8], 1, 3), ([1.01, 0.9, 0.98], 1, 8), ([0.955], 9, 3)],
)
async def test_near_ties_are_measured_until_they_are_decided(
    time: Time, factors: list[float], memory: int, turns: int
) -> None:
    """In turns, in so many rounds at most; what takes more memory is no near tie."""
    large = Scripted(time, "large", 100, memory=5)
    small = Scripted(time, "small", 100, memory=memory, factors=factors)
    await run(time, [large, small])
    assert len(small.log) == turns
    time.now = 0
    again = [Scripted(time, "x", 100, memory=5), Scripted(time, "x", 100, factors=factors)]
    assert await run(time, again, budget=60) <= 60
