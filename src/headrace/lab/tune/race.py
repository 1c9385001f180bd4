"""The order in which contenders are measured, so that a run ends within its time.

All take a first turn, the defaults of each engine before its other options; one that is clearly
slower than the best so far is cut. The fastest are compared with the reference, and only those that
agree and are nearly as fast as the best are measured again, in turns, so that other load on the
machine affects all of them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Generator, Sequence

import msgspec

from headrace.engines import measured
from headrace.lab.tune.agreement import Reference
from headrace.lab.tune.contender import NO_TIME, Contender
from headrace.lab.tune.measure import Shape
from headrace.worker.spec import OnProgress

_FIRST, _COMPARED = 0.55, 0.75
"""The shares of the time after which first turns end, and comparisons."""
_OF_LEFT, _REST = 0.25, 0.02
"""What a contender may take of the time for first turns; the share of all that is too short."""
_HOPELESS = 0.6
"""Below this share of the best a first turn is cut."""
_KEPT = (0.75, 0.75, 0.85, 0.9)
"""The share of the best from which on one is measured in the first round, the second ..."""
_LEAST_KEPT, _MOST_NEAR = 2, 4
_MORE_ROUNDS = 5
"""Further rounds of those that are nearly as fast as the best."""


class Clock:
    """The time that a run may take, from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._began = time.monotonic()
        self._stopped = 0.0

    @property
    def passed(self) -> float:
        """Seconds that counted so far."""
        return time.monotonic() - self._began - self._stopped

    @property
    def left(self) -> float:
        """Seconds that are left, at least 0."""
        return max(0.0, self.seconds - self.passed)

    def until(self, share: float) -> float:
        """Return the seconds until this share of the time is over, at least 0."""
        return max(0.0, self.seconds * share - self.passed)

    @contextlib.contextmanager
    def stopped(self) -> Generator[None]:
        """Do not count what is made once: a conversion for an engine."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._stopped += time.monotonic() - began


class Race:
    """Measures the contenders of `field`. `room` is the memory for those that stay loaded."""

    def __init__(
        self, field: Sequence[Contender], shape: Shape, clock: Clock, room: int, report: OnProgress
    ) -> None:
        self._field = field
        self._shape = shape
        self._clock = clock
        self._room = room
        self._report = report
        self._aims = tuple(dict.fromkeys((min(shape.streams), max(shape.streams))))

    async def first_turns(self, prepare: Callable[[Contender], Awaitable[None]]) -> None:
        """Let all take a first turn, while there is time."""
        shape = msgspec.structs.replace(self._shape, streams=self._aims)
        for number, contender in enumerate(self._field):
            left = self._clock.until(_FIRST)
            if left <= _REST * self._clock.seconds:
                contender.left_out = NO_TIME
                continue
            self._report("first turns", 100 * number // len(self._field), 100)
            with self._clock.stopped():
                await prepare(contender)
            if contender.fault is None:
                limit = left * max(_OF_LEFT, 1 / (len(self._field) - number))
                least = {n: _HOPELESS * self._best(n) for n in self._aims}
                await contender.try_out(shape, least, limit, keep=self._has_room())
        self._report("first turns", 100, 100)

    async def rounds(self, reference: Reference) -> None:
        """Measure the fastest that agree in turns, and fewer of them after each round.

        Which these are is decided before each round again: a first turn may have had luck.
        """
        for number in range(self._shape.rounds):
            label = f"round {number + 1} of {self._shape.rounds}"
            agreeing = await self._fastest(reference, _KEPT[min(number, len(_KEPT) - 1)])
            # Every other round is reversed, so that no engine is always the first.
            for place, contender in enumerate(agreeing if number % 2 == 0 else agreeing[::-1]):
                self._report(label, 100 * place // len(agreeing), 100)
                streams = [n for n in self._aims if contender.whole(n) <= number]
                if not await self._measure(contender, streams, number):
                    return
            self._report(label, 100, 100)

    async def between(self) -> None:
        """Measure the best with the other numbers of streams, which decide nothing."""
        best = {contender: None for n in self._aims for contender in nearly_best(self._field, n)}
        for number in range(self._shape.rounds):
            for contender in best:
                streams = [n for n in self._shape.streams if n not in self._aims]
                self._report("other numbers of streams", 100 * number // self._shape.rounds, 100)
                await self._measure(contender, streams, number)

    def leave_out(self) -> None:
        """Note of those that were not compared why not."""
        for contender in self._field:
            if contender.can_win and contender.agreement is None:
                contender.left_out = self._why(contender)

    async def _fastest(self, reference: Reference, share: float) -> list[Contender]:
        """Return those that agree and have this share of the best of them, or are among the first.

        They are compared with the reference now, if they have not been.
        """
        result: dict[Contender, None] = {}
        for streams in self._aims:
            agreeing: list[Contender] = []
            ranked = [each for each in self._field if each.can_win and each.rate(streams)]
            for contender in sorted(ranked, key=lambda each: each.rate(streams), reverse=True):
                if len(agreeing) >= _LEAST_KEPT:
                    least = share * agreeing[0].rate(streams)
                    if contender.rate(streams) < least or len(agreeing) == _MOST_NEAR:
                        break
                if await self._agrees(contender, reference, is_first=not agreeing):
                    agreeing.append(contender)
            result |= dict.fromkeys(agreeing)
        for contender in self._field:
            if contender not in result:
                await contender.aclose()
        return list(result)

    async def _agrees(self, contender: Contender, reference: Reference, *, is_first: bool) -> bool:
        limit = self._clock.left if is_first else self._clock.until(_COMPARED)
        if contender.agreement is None and limit:
            self._report("comparing answers", 0, 0)
            keep = contender.is_loaded or self._has_room()
            await contender.judge(reference, limit, keep=keep)
        return contender.can_win and contender.agreement is not None

    async def near_ties(self) -> None:
        """Measure again, in turns, what is nearly as fast as the best, until it is decided."""
        for streams in self._aims:
            near = nearly_best(self._field, streams)
            first = self._shape.rounds
            for number in range(first, first + _MORE_ROUNDS):
                if is_decided(near, streams):
                    break
                self._report(f"near ties at {streams}", 100 * (number - first) // _MORE_ROUNDS, 100)
                for contender in near if number % 2 == 0 else near[::-1]:
                    if not await self._measure(contender, [streams], number):
                        return

    async def _measure(self, contender: Contender, streams: Sequence[int], number: int) -> bool:
        """Take a turn of a round with each number of streams; false if there is no time for any."""
        left = self._clock.left
        fitting = [n for n in streams if contender.expected_s(n) < left]
        if streams and not fitting:
            return False
        if fitting:
            shape = msgspec.structs.replace(self._shape, streams=tuple(fitting))
            keep = contender.is_loaded or self._has_room()
            await contender.measure(shape, number, left, keep=keep)
        return True

    def _agreed(self) -> list[Contender]:
        return [each for each in self._field if each.can_win and each.agreement is not None]

    def _best(self, streams: int) -> float:
        return max((each.rate(streams) for each in self._field if each.fault is None), default=0.0)

    def _has_room(self) -> bool:
        held = sum(max(each.memory.values(), default=0) for each in self._field if each.is_loaded)
        return held < self._room

    def _why(self, contender: Contender) -> str:
        agreed = self._agreed()
        best = {n: max((each.rate(n) for each in agreed), default=0.0) for n in self._aims}
        rates = {n: contender.rate(n) for n in self._aims}
        if not all(0 < rate <= _KEPT[-1] * best[n] for n, rate in rates.items()):
            return NO_TIME
        words = " and ".join(f"{rates[n]:.1f} of {best[n]:.1f} tokens/s at {n}" for n in rates)
        return f"slower in its first turns, {words}"


def nearly_best(field: Sequence[Contender], streams: int) -> list[Contender]:
    """Return the fastest that agrees, and those that are nearly as fast and take less memory."""
    right = [each for each in field if each.can_win and each.agreement and each.rate(streams)]
    right.sort(key=lambda contender: contender.rate(streams), reverse=True)
    least = measured.NEAR * right[0].rate(streams) if right else 0.0
    most = sum(right[0].memory.values()) if right else 0
    smaller = [contender for contender in right[1:] if sum(contender.memory.values()) < most]
    near = [contender for contender in smaller if contender.rate(streams) >= least]
    return [*right[:1], *near][:_MOST_NEAR]


def is_decided(near: Sequence[Contender], streams: int) -> bool:
    """Whether all but the first are slower by enough rounds, or failed."""
    rates = [contender.rates(streams) for contender in near if contender.fault is None]
    if len(rates) < 2:
        return True
    enough = all(len(each) >= measured.LEAST_PAIRS for each in rates)
    return enough and all(measured.is_slower(each, rates[0]) for each in rates[1:])
