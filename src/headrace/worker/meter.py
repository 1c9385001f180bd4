"""Computes the figures of a request from its events (docs/figures.md)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import msgspec

from headrace.core.events import Delta, Event, Progress
from headrace.core.metrics import DeviceUse, Gaps, InferenceMetrics, Usage, percentile
from headrace.core.request import Request


class Meter:
    """The clock and the counters of one request, over all of its choices."""

    def __init__(self, request: Request, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._received = request.received
        self._started_at = time.time() - (clock() - request.received)
        self._load_ms = request.load_ms
        self._compile_ms: float | None = None
        self._admitted: float | None = None
        self._visible: float | None = None
        self._content: float | None = None
        self._token_times: list[float] = []
        self._chunks = self._calls = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._completion_tokens = self._reasoning_tokens = 0
        self._resumed_tokens = 0
        self._decodes = True

    def resumed(self, prompt_tokens: int, answered_tokens: int) -> None:
        """Note a continued answer: these tokens count as usage, but not for the rates."""
        self._prompt_tokens = prompt_tokens
        self._resumed_tokens = answered_tokens

    @contextmanager
    def compiling(self) -> Generator[None]:
        """Measure what is compiled for the request before the engine has it."""
        began = self._clock()
        try:
            yield
        finally:
            self._compile_ms = (self._compile_ms or 0.0) + (self._clock() - began) * 1000

    def admitted(self, prompt_tokens: int, cached_tokens: int, *, decodes: bool = True) -> None:
        """Note that the engine has started; later calls can only raise the cached count.

        Without `decodes` no tokens follow, and all of the engine's time is prefill.
        """
        self._decodes = decodes
        if self._admitted is None:
            self._admitted = self._clock()
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = max(self._cached_tokens, cached_tokens)

    def thought(self, tokens: int) -> None:
        """Note that the tokens of the last delta are thinking."""
        self._reasoning_tokens += tokens

    def called(self, calls: int) -> None:
        """Note the calls of tools in a choice that is over."""
        self._calls += calls

    def delta(self, tokens: int, *, visible: bool, thinking: bool = False) -> None:
        """Note a delta, its number of tokens, and whether it has visible text.

        `thinking` is whether that is thinking alone.
        """
        now = self._clock()
        self._chunks += 1
        self._completion_tokens += tokens
        if tokens:
            self._token_times.append(now)
        if visible and self._content is None:
            self._visible = self._visible or now
            self._content = None if thinking else now

    def correct(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> None:
        """Take the counts of the engine; `completion_tokens` are those that no delta carried."""
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = max(self._cached_tokens, cached_tokens)
        self._completion_tokens += completion_tokens

    @property
    def usage(self) -> Usage:
        """The tokens so far."""
        return Usage(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=min(self._cached_tokens, self._prompt_tokens),
            completion_tokens=self._resumed_tokens + self._completion_tokens,
            reasoning_tokens=self._reasoning_tokens,
        )

    def finish(self, outcome: str, devices: tuple[DeviceUse, ...] = ()) -> InferenceMetrics:
        """Return the figures as of now; `outcome` is a finish reason."""
        now, times, usage = self._clock(), self._token_times, self.usage
        first, last = (times[0], times[-1]) if times else (None, None)
        prefill_ms = _ms(self._admitted, first if self._decodes else now)
        decode_ms = _ms(first, last) if len(times) > 1 else None
        fresh = usage.prompt_tokens + self._resumed_tokens - self._cached_tokens
        steps = self._completion_tokens - 1
        waited = _ms(self._received, self._admitted)
        before_ms = self._load_ms + (self._compile_ms or 0.0)
        return InferenceMetrics(
            started_at=self._started_at,
            queue_ms=None if waited is None else max(0.0, waited - before_ms),
            load_ms=self._load_ms,
            compile_ms=self._compile_ms,
            time_to_first_token_ms=_ms(self._received, self._visible),
            time_to_first_content_ms=_ms(self._received, self._content),
            prefill_ms=prefill_ms,
            prefill_tokens_per_second=_rate(fresh, prefill_ms),
            decode_tokens_per_second=_rate(steps, decode_ms),
            time_per_output_token_ms=decode_ms / steps if decode_ms and steps > 0 else None,
            inter_token_ms=_gaps(times),
            total_ms=(now - self._received) * 1000,
            chunks=self._chunks,
            tool_calls=self._calls,
            usage=usage,
            devices=devices,
            outcome=outcome,
        )


class Received:
    """What has been received of an answer. Times are monotonic seconds."""

    __slots__ = ("admitted_at", "chunks", "first_at", "prompt_tokens", "tokens", "visible_at")

    def __init__(self) -> None:
        self.chunks = self.tokens = self.prompt_tokens = 0
        self.admitted_at: float | None = None
        self.first_at: float | None = None
        self.visible_at: float | None = None

    def saw(self, event: Event) -> None:
        """Note an event; called for every token."""
        if type(event) is Delta:
            self.chunks += 1
            self.tokens += len(event.token_ids)
            if self.visible_at is None:
                self._first_output(event)
        elif isinstance(event, Progress):
            self._admitted(event)

    def _first_output(self, delta: Delta) -> None:
        now = time.monotonic()
        self.first_at = self.first_at or now
        if delta.text or delta.reasoning:
            self.visible_at = now

    def _admitted(self, event: Progress) -> None:
        if event.stage == "prefill":
            self.admitted_at = self.admitted_at or time.monotonic()
            self.prompt_tokens = event.total

    def metrics(self, request: Request) -> InferenceMetrics:
        """Return the figures as of now, as the child would have reported them."""
        now, received = time.monotonic(), request.received
        queue_ms = _ms(received, self.admitted_at)
        return InferenceMetrics(
            started_at=time.time() - (now - received),
            queue_ms=None if queue_ms is None else max(0.0, queue_ms - request.load_ms),
            load_ms=request.load_ms,
            time_to_first_token_ms=_ms(received, self.visible_at),
            prefill_ms=_ms(self.admitted_at, self.first_at),
            total_ms=(now - received) * 1000,
            chunks=self.chunks,
            usage=Usage(prompt_tokens=self.prompt_tokens, completion_tokens=self.tokens),
            outcome="error",
        )


def figures(metrics: InferenceMetrics) -> dict[str, object]:
    """Return the scalar figures that are defined, for a log record."""
    values = msgspec.structs.asdict(metrics) | msgspec.structs.asdict(metrics.usage)
    return {
        name: round(value, 3) if isinstance(value, float) else value
        for name, value in values.items()
        if isinstance(value, int | float | str) and value != ""
    }


def trace_of(request: Request) -> dict[str, object]:
    """Return the id of the trace that a request belongs to, for its log record."""
    return {"trace_id": request.traceparent[3:35]} if request.traceparent else {}


def _ms(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start) * 1000


def _rate(count: int, over_ms: float | None) -> float | None:
    return count / over_ms * 1000 if over_ms and count > 0 else None


def _gaps(times: Sequence[float]) -> Gaps | None:
    gaps = sorted((after - before) * 1000 for before, after in itertools.pairwise(times))
    if not gaps:
        return None
    return Gaps(p50=percentile(gaps, 50), p99=percentile(gaps, 99), max=gaps[-1])
