"""What went on during the last minute, by model, in bounded memory."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from headrace.core.record import Activity, Rates, RequestRecord, RunningRequest

Running = Callable[[], Sequence[RunningRequest]]

_SLOT_S = 0.5
_SPEED_SLOTS = 10
"""Tokens per second are those of the last 5 s, for which a person can wait."""
_LATENCIES = 32
"""Of each kind, model and slot: enough for a percentile, however many requests there are."""
_MODELS = 1024
_NO_MODEL = "-"


@dataclass(slots=True)
class _Slot:
    """Half a second of one model."""

    requests: int = 0
    failed: int = 0
    prompt: float = 0.0
    completion: float = 0.0
    first: list[float] = field(default_factory=list[float])
    each: list[float] = field(default_factory=list[float])


_Slots = defaultdict[int, _Slot]


@dataclass(slots=True)
class _Seen:
    """How far a request had come, and when (monotonic seconds)."""

    at: float
    prompt: int = 0
    completion: int = 0


class Recent:
    """A Sink that keeps what is needed to tell how each model has done over `window_s` seconds.

    `running` are the requests that run now: their tokens count as they come, spread over the
    time since they were last looked at, and those of a request that has ended and was never
    looked at over its own duration. `clock` is monotonic, `wall` Unix time. Not thread-safe.
    """

    def __init__(
        self,
        running: Running,
        window_s: float = 60.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._running = running
        self._slots_kept = max(_SPEED_SLOTS, round(window_s / _SLOT_S))
        self._clock = clock
        self._wall = wall
        self._models: dict[str, _Slots] = {}
        self._seen: dict[str, _Seen] = {}

    def record(self, record: RequestRecord) -> None:
        """Take note of a request that has ended now."""
        now, metrics = self._clock(), record.metrics
        began = now - metrics.total_ms / 1000
        first = _after(began, metrics.time_to_first_token_ms)
        admitted = _after(began, metrics.load_ms + (metrics.queue_ms or 0.0))
        seen = self._seen.pop(record.id, None) or _Seen(min(admitted or began, now))
        # Names that nobody serves come from outside, and there is no end of them.
        slots = self._slots(_NO_MODEL if record.error == "UnknownModel" else record.model, now)
        slot = slots[_number(now)]
        slot.requests += 1
        slot.failed += record.outcome == "error"
        _keep(slot.first, metrics.time_to_first_token_ms)
        _keep(slot.each, metrics.time_per_output_token_ms)
        # A prompt that was counted and then refused in the queue was never computed.
        was_computed = record.outcome == "ok" or metrics.queue_ms is not None or first is not None
        tokens = metrics.usage.prompt_tokens * was_computed, metrics.usage.completion_tokens
        _advance(slots, seen, tokens, first, now)

    def activity(self) -> Activity:
        """Tell what runs now, oldest first, and how each model has done of late."""
        running, now = self._running(), self._clock()
        self._look(running, now)
        for slots in self._models.values():
            self._forget(slots, now)
        self._models = {name: slots for name, slots in self._models.items() if slots}
        rates = (self._rates(name, slots, now) for name, slots in sorted(self._models.items()))
        oldest_first = sorted(running, key=lambda one: one.since)
        return Activity(running=tuple(oldest_first), rates=tuple(rates))

    def _look(self, running: Iterable[RunningRequest], now: float) -> None:
        """Book what running requests have got since they were last looked at."""
        before, self._seen = self._seen, {}
        ahead = self._wall() - now
        for one in running:
            began = min(one.since - ahead, now)
            seen = self._seen[one.id] = before.get(one.id) or _Seen(began)
            first = _after(began, one.time_to_first_token_ms)
            prompt = 0 if first is None else one.prompt_tokens
            tokens = prompt, one.completion_tokens
            _advance(self._slots(one.model, now), seen, tokens, first, now)

    def _slots(self, model: str, now: float) -> _Slots:
        """Return the slots of a model; of too many models the one that slept longest goes."""
        slots = self._models.pop(model, None) or defaultdict(_Slot)
        if len(slots) > self._slots_kept + _SPEED_SLOTS:
            self._forget(slots, now)
        if len(self._models) >= _MODELS:
            del self._models[next(iter(self._models))]
        self._models[model] = slots
        return slots

    def _forget(self, slots: _Slots, now: float) -> None:
        oldest = _number(now) - self._slots_kept
        for number in [number for number in slots if number <= oldest]:
            del slots[number]

    def _rates(self, model: str, slots: _Slots, now: float) -> Rates:
        since = _number(now) - _SPEED_SLOTS
        lately = [slot for number, slot in slots.items() if number >= since]
        seconds = now - since * _SLOT_S
        first = sorted(value for slot in slots.values() for value in slot.first)
        each = sorted(value for slot in slots.values() for value in slot.each)
        return Rates(
            model=model,
            window_s=self._slots_kept * _SLOT_S,
            requests=sum(slot.requests for slot in slots.values()),
            failed=sum(slot.failed for slot in slots.values()),
            prompt_tokens_per_second=sum(slot.prompt for slot in lately) / seconds,
            completion_tokens_per_second=sum(slot.completion for slot in lately) / seconds,
            time_to_first_token_p50_ms=_percentile(first, 0.5),
            time_to_first_token_p99_ms=_percentile(first, 0.99),
            time_per_output_token_p50_ms=_percentile(each, 0.5),
            time_per_output_token_p99_ms=_percentile(each, 0.99),
        )


def _advance(
    slots: _Slots, seen: _Seen, tokens: tuple[int, int], first: float | None, now: float
) -> None:
    """Book what is new: the prompt up to the first token, the answer from there to now."""
    prompt, completion = max(0, tokens[0] - seen.prompt), max(0, tokens[1] - seen.completion)
    turn = first if first is not None and seen.at < first <= now else None
    if prompt:
        for number, share in _shares(seen.at, now if turn is None else turn):
            slots[number].prompt += share * prompt
    if completion:
        for number, share in _shares(seen.at if turn is None else turn, now):
            slots[number].completion += share * completion
    seen.at, (seen.prompt, seen.completion) = now, tokens


def _shares(begin: float, end: float) -> Iterable[tuple[int, float]]:
    """Return the slots that matter for speed, and which part of the time lies in each."""
    last = _number(end)
    if end <= begin:
        return ((last, 1.0),)
    return (
        (number, (min(end, (number + 1) * _SLOT_S) - max(begin, number * _SLOT_S)) / (end - begin))
        for number in range(max(_number(begin), last - _SPEED_SLOTS), last + 1)
    )


def _number(at: float) -> int:
    return math.floor(at / _SLOT_S)


def _after(began: float, ms: float | None) -> float | None:
    return None if ms is None else began + ms / 1000


def _keep(values: list[float], value: float | None) -> None:
    if value is not None and len(values) < _LATENCIES:
        values.append(value)


def _percentile(ordered: Sequence[float], part: float) -> float | None:
    """Return the smallest value that `part` of all do not exceed (nearest rank)."""
    return ordered[math.ceil(part * len(ordered)) - 1] if ordered else None
