"""The state of one running request, and the figures and spans made of it at its end."""

from __future__ import annotations

import time

from headrace.core.errors import GenerationFailed, HeadraceError, WorkerDied
from headrace.core.events import Delta, Event, Finish, Progress, ToolCallDelta
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.model import ModelInfo
from headrace.core.record import Outcome, Phase, RunningRequest
from headrace.core.request import AnyRequest
from headrace.telemetry import names
from headrace.telemetry.spans import Span, Trace, Tracing, error_type, was_refused


class Running:
    """The state of one request. Times are monotonic seconds."""

    __slots__ = (
        *("admitted_at", "chunks", "error", "first_at", "finish", "info", "loaded_at"),
        *("loading_at", "phase", "prompt_tokens", "request", "root", "answers", "tokens", "trace"),
        *("visible_at", "waited"),
    )

    def __init__(
        self, request: AnyRequest, info: ModelInfo | None, root: Span, *, captures: bool
    ) -> None:
        self.request = request
        self.info = info
        self.root = root
        self.trace: Trace = root.trace
        self.phase: Phase = "queued"
        self.waited = False
        self.chunks = self.tokens = self.prompt_tokens = 0
        self.loading_at: float | None = None
        self.loaded_at: float | None = None
        self.admitted_at: float | None = None
        self.first_at: float | None = None
        self.visible_at: float | None = None
        self.answers: dict[int, list[str]] | None = {} if captures else None
        self.finish: Finish | None = None
        self.error: BaseException | None = None

    def saw(self, event: Event) -> None:
        """Record an event. This is called for every token: most deltas are only counted."""
        if type(event) is Delta:
            self.chunks += 1
            self.tokens += len(event.token_ids)
            if self.visible_at is None:
                self._first_output(event)
            if self.answers is not None:
                self.answers.setdefault(event.index, []).append(event.text)
        elif isinstance(event, Progress):
            self._progressed(event)
        elif isinstance(event, Finish):
            self.finish = event
        elif isinstance(event, ToolCallDelta):
            self.visible_at = self.visible_at or time.monotonic()
            if self.answers is not None:
                head = f"\n{event.name} " if event.name else ""
                self.answers.setdefault(event.index, []).append(head + event.arguments)

    def _first_output(self, delta: Delta) -> None:
        """Record a delta that may be the first with tokens or text."""
        now = time.monotonic()
        if self.first_at is None:
            self.first_at, self.phase = now, "decode"
            self._is_loaded(now)
        if delta.text or delta.reasoning:
            self.visible_at = now

    def _progressed(self, event: Progress) -> None:
        """Record progress before the first token."""
        now, self.waited = time.monotonic(), True
        if event.stage != "loading":
            self._is_loaded(now)
        elif self.admitted_at is None:  # otherwise a second load after a crash
            self.loading_at = self.loading_at or now
        if event.stage == "prefill":
            self.admitted_at = self.admitted_at or now
            self.prompt_tokens = event.total
        if self.first_at is None:
            self.phase = event.stage

    def _is_loaded(self, now: float) -> None:
        if self.loading_at is not None and self.loaded_at is None:
            self.loaded_at = now

    @property
    def model(self) -> str:
        """The name of the served model, or the requested name."""
        return self.request.model if self.info is None else self.info.id

    @property
    def failure(self) -> BaseException | None:
        """Why the answer is incomplete; None if it has a Finish."""
        if self.finish is not None:
            return None
        return self.error or GenerationFailed("The stream ended without a Finish.")

    @property
    def outcome(self) -> Outcome:
        """How the request has ended."""
        if (failure := self.failure) is None:
            return "ok"
        if was_refused(failure):
            return "refused"
        return "error" if error_type(failure) else "cancelled"

    def snapshot(self) -> RunningRequest:
        """Return the current state."""
        return RunningRequest(
            id=self.request.id,
            model=self.model,
            base=self.info.base if self.info else None,
            operation=self.request.operation,
            client=self.request.client,
            since=self.trace.unix_ns(self.trace.began) / 1e9,
            phase=self.phase,
            time_to_first_token_ms=_ms(self.request.received, self.visible_at),
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self._completion_tokens,
        )

    @property
    def _completion_tokens(self) -> int:
        # Upstreams send no token ids: each delta counts as one token.
        return self.tokens or self.chunks

    @property
    def engine_metrics(self) -> InferenceMetrics | None:
        """The figures of the engine, if it has reported any."""
        if self.finish is not None:
            return self.finish.metrics
        # A worker that has died reports nothing; the events of all attempts are known here.
        if isinstance(self.error, HeadraceError) and not isinstance(self.error, WorkerDied):
            return self.error.metrics
        return None

    def metrics(self, ended: float) -> InferenceMetrics:
        """Return the figures of the engine, or else those computed from the events."""
        if self.engine_metrics is not None:
            return self.engine_metrics
        request = self.request
        until = self.loaded_at or ended
        load_ms = request.load_ms + (_ms(self.loading_at, until) or 0.0)
        waited = _ms(request.received, self.admitted_at)
        return InferenceMetrics(
            started_at=self.trace.unix_ns(self.trace.began) / 1e9,
            queue_ms=None if waited is None else max(0.0, waited - load_ms),
            load_ms=load_ms,
            time_to_first_token_ms=_ms(request.received, self.visible_at),
            prefill_ms=_ms(self.admitted_at, self.first_at),
            total_ms=(ended - request.received) * 1000,
            chunks=self.chunks,
            usage=Usage(
                prompt_tokens=self.prompt_tokens, completion_tokens=self._completion_tokens
            ),
            engine=self.info.engine if self.info else "",
            worker=self.info.id if self.info else "",
            model=self.info.id if self.info else "",
            outcome="cancelled" if self.outcome == "cancelled" else "error",
        )


def add_spans(run: Running, metrics: InferenceMetrics, tracing: Tracing, ended: float) -> None:
    """Add the child spans whose times are known only at the end."""
    began, attempts = run.trace.began, run.trace.attempts
    loaded = began + metrics.load_ms / 1000
    admitted = run.admitted_at
    if metrics.queue_ms is not None:
        admitted = loaded + metrics.queue_ms / 1000
    elif admitted is None and attempts:
        admitted = attempts[0].began
    if metrics.load_ms > 0:
        load = tracing.loads.get(run.model)
        _step(tracing, run.root, names.LOAD, began, min(loaded, ended), [load] if load else [])
    if admitted is not None or run.waited:
        # A request that was refused at once has not waited.
        _step(tracing, run.root, names.QUEUE, loaded, ended if admitted is None else admitted)
    if admitted is None or not (run.chunks or run.admitted_at or metrics.prefill_ms):
        return
    above, is_first = run.root, True
    if attempts:
        # Times from events, not from the engine, are those of the first attempt.
        above = attempts[-1 if run.engine_metrics else 0]
        is_first = above is attempts[0]
    over = above.ended or ended
    start = max(above.began, admitted) if is_first else above.began
    first = over
    if metrics.prefill_ms is not None:
        first = min(over, start + metrics.prefill_ms / 1000)
    elif run.first_at is not None and is_first:
        first = run.first_at
    _step(tracing, above, names.PREFILL, start, first)
    if run.first_at is not None:
        _step(tracing, above, names.DECODE, first, over)


def _step(
    tracing: Tracing,
    above: Span,
    name: str,
    began: float,
    ended: float,
    links: list[Span] | None = None,
) -> None:
    if ended > began:
        tracing.span(above.trace, name, above, began, links=links or ()).end(ended)


def _ms(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start) * 1000
