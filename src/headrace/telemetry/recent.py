"""Rates of each model over the last minute, in bounded memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from headrace.core.metrics import percentile
from headrace.core.record import Activity, Rates, RequestRecord, RunningRequest

_SPEED_S = 5.0
"""Tokens per second are those of the last 5 s, so that they follow changes quickly."""
_SAMPLES = 8192
"""Of each kind and model; beyond it the oldest are dropped and the window becomes shorter."""
_MODELS = 1024
_NO_MODEL = "-"


class _Ended(NamedTuple):
    at: float
    failed: bool
    first_ms: float | None
    each_ms: float | None


class _Span(NamedTuple):
    """Tokens spread evenly between two times (monotonic seconds)."""

    begin: float
    at: float
    tokens: int


class _Progress(NamedTuple):
    """The tokens of a running request that have been counted, and the time."""

    at: float
    prompt: int = 0
    completion: int = 0


class _Model:
    """The samples of one model, oldest first, and when the last was added."""

    def __init__(self) -> None:
        self.at = 0.0
        self.ended = deque[_Ended](maxlen=_SAMPLES)
        self.prompt = deque[_Span](maxlen=_SAMPLES)
        self.completion = deque[_Span](maxlen=_SAMPLES)

    def advance(self, old: _Progress, new: _Progress, first: float | None) -> None:
        """Add new tokens: of the prompt before the first token, of the answer after it."""
        read_until, written_since = new.at, old.at
        if first is not None and old.at < first <= new.at:
            read_until = written_since = first
        if new.prompt > old.prompt:
            self.prompt.append(_Span(old.at, read_until, new.prompt - old.prompt))
        if new.completion > old.completion:
            tokens = new.completion - old.completion
            self.completion.append(_Span(written_since, new.at, tokens))

    def drop(self, now: float, window_s: float) -> None:
        """Drop samples before the window."""
        windows = (self.ended, window_s), (self.prompt, _SPEED_S), (self.completion, _SPEED_S)
        for samples, seconds in windows:
            while samples and samples[0].at <= now - seconds:
                samples.popleft()

    def rates(self, name: str, window_s: float, now: float) -> Rates:
        """Return the rates of the window."""
        self.drop(now, window_s)
        is_full = len(self.ended) == _SAMPLES
        first = _percentiles(ended.first_ms for ended in self.ended)
        each = _percentiles(ended.each_ms for ended in self.ended)
        return Rates(
            model=name,
            window_s=now - self.ended[0].at if is_full else window_s,
            requests=len(self.ended),
            failed=sum(ended.failed for ended in self.ended),
            prompt_tokens_per_second=_speed(self.prompt, now),
            completion_tokens_per_second=_speed(self.completion, now),
            time_to_first_token_p50_ms=first[0],
            time_to_first_token_p99_ms=first[1],
            time_per_output_token_p50_ms=each[0],
            time_per_output_token_p99_ms=each[1],
        )


class Recent:
    """A Sink that keeps samples of the last `window_s` seconds, for the rates of each model.

    `running` returns the running requests: their new tokens are spread over the time since the
    last call of `activity`, those of a request that ended between two calls over its duration.
    `clock` is monotonic, `wall` Unix time. Not thread-safe.
    """

    def __init__(
        self,
        running: Callable[[], Sequence[RunningRequest]],
        window_s: float = 60.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._running = running
        self._window_s = window_s
        self._clock = clock
        self._wall = wall
        self._models: dict[str, _Model] = {}
        self._progress: dict[str, _Progress] = {}

    def record(self, record: RequestRecord) -> None:
        """Add a request that has just ended."""
        now, metrics, usage = self._clock(), record.metrics, record.metrics.usage
        began = now - metrics.total_ms / 1000
        first_ms, waited_ms = metrics.time_to_first_token_ms, metrics.queue_ms
        # Clients can send any number of names of models that are not served.
        model = self._model(_NO_MODEL if record.error == "UnknownModel" else record.model, now)
        failed = record.outcome == "error"
        # Requests of batches wait for others: their times are no latencies.
        shown = (None, None) if record.batch else (first_ms, metrics.time_per_output_token_ms)
        model.ended.append(_Ended(now, failed, *shown))
        # The prompt of a request that was refused in the queue was not processed.
        was_read = record.outcome == "ok" or waited_ms is not None or first_ms is not None
        admitted = began + (metrics.load_ms + (waited_ms or 0.0)) / 1000
        progress = self._progress.pop(record.id, None) or _Progress(min(admitted, now))
        new = _Progress(now, usage.prompt_tokens * was_read, usage.completion_tokens)
        model.advance(progress, new, _after(began, first_ms))

    def activity(self) -> Activity:
        """Return the running requests, oldest first, and the rates of each model."""
        running, now = self._running(), self._clock()
        self._count_running(running, now)
        since = now - self._window_s
        self._models = {name: model for name, model in self._models.items() if model.at > since}
        models = sorted(self._models.items())
        return Activity(
            running=tuple(sorted(running, key=lambda request: request.since)),
            rates=tuple(model.rates(name, self._window_s, now) for name, model in models),
        )

    def _count_running(self, running: Iterable[RunningRequest], now: float) -> None:
        """Add the new tokens of running requests since the last call."""
        before, self._progress = self._progress, {}
        ahead = self._wall() - now
        for request in running:
            began = min(request.since - ahead, now)
            first = _after(began, request.time_to_first_token_ms)
            prompt = 0 if first is None else request.prompt_tokens
            new = _Progress(now, prompt, request.completion_tokens)
            old = before.get(request.id) or _Progress(began)
            self._model(request.model, now).advance(old, new, first)
            self._progress[request.id] = new

    def _model(self, name: str, now: float) -> _Model:
        """Return a model's samples; of too many models, the one idle longest is dropped."""
        model = self._models.pop(name, None) or _Model()
        if len(self._models) >= _MODELS:
            del self._models[next(iter(self._models))]
        self._models[name] = model
        model.at = now
        model.drop(now, self._window_s)
        return model


def _after(began: float, ms: float | None) -> float | None:
    return None if ms is None else began + ms / 1000


def _speed(spans: Iterable[_Span], now: float) -> float:
    since = now - _SPEED_S
    parts = (
        tokens if begin >= since else tokens * (at - since) / (at - begin)
        for begin, at, tokens in spans
        if at > since
    )
    return sum(parts) / _SPEED_S


def _percentiles(values: Iterable[float | None]) -> tuple[float, float] | tuple[None, None]:
    known = sorted(value for value in values if value is not None)
    return (percentile(known, 50), percentile(known, 99)) if known else (None, None)
