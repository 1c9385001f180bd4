"""Counts what requests cost, and tells it as Prometheus reads it.

Imported only where something is served: its library is not needed for a look.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import chain
from typing import cast

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from headrace import __version__
from headrace.core.errors import kinds
from headrace.core.record import Call, RequestRecord
from headrace.core.status import PoolEvent, PoolStatus
from headrace.telemetry import names
from headrace.telemetry.standing import standing

OTHER = "_other"
"""The model of all requests for models that are not served."""

# Of OpenTelemetry's conventions for GenAI, as the names of the three histograms.
_DURATION_S = tuple(0.01 * 2**step for step in range(14))
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
_PER_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
# Ours.
_WAIT_S = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LOAD_S = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)

_METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS"})
_REASONS = frozenset(kind.__name__ for kind in kinds())
_GEN_AI = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
_MODEL = ("model",)
_open_metrics = cast("Callable[[Collector], bytes]", openmetrics.generate_latest)  # pyright: ignore[reportUnknownMemberType] - it says nothing of its types
_LAG_EVERY_S = 0.25
_LOOK_WITHIN_S = 5


class Instruments:
    """A Sink that counts; what the pool itself keeps is read when it is asked for.

    `models` holds the names that are served now: no other gets a series of its own, and what is
    not served any more has none left. All is called on the event loop but `exposition`.
    """

    def __init__(
        self, status: Callable[[], PoolStatus], models: Callable[[], Container[str]]
    ) -> None:
        self._status = status
        self._models = models
        self._named: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._registry = CollectorRegistry()
        self._of_model: list[tuple[Counter | Histogram, tuple[str, ...]]] = []
        self._about_requests()
        self._about_tokens()
        self._about_the_service()

    def _about_requests(self) -> None:
        self._duration = self._histogram(
            "gen_ai_server_request_duration_seconds",
            "From a request's arrival to its end, however it ended.",
            _DURATION_S,
            (*_GEN_AI, "error_type"),
        )
        self._first_token = self._histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From a request's arrival to the first text of its answer; successful requests only.",
            _FIRST_TOKEN_S,
            _GEN_AI,
        )
        self._per_token = self._histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Time for each token after the first; successful requests only.",
            _PER_TOKEN_S,
            _GEN_AI,
        )
        self._queue = self._histogram(
            "headrace_request_queue_seconds",
            "How long requests waited for their turn, loading not counted.",
            _WAIT_S,
        )
        self._load_wait = self._histogram(
            "headrace_request_load_wait_seconds",
            "How long requests waited for their model to load; those that did.",
            _WAIT_S,
        )
        self._rejected = self._counter(
            "headrace_requests_rejected_total",
            "Requests that were refused, by the name of the error.",
            ("model", "reason"),
        )

    def _about_tokens(self) -> None:
        self._prompt = self._counter(
            "headrace_prompt_tokens_total", "Tokens of prompts, the cached ones included."
        )
        self._cached = self._counter(
            "headrace_prompt_cached_tokens_total", "Tokens of prompts that the engine's cache had."
        )
        self._completion = self._counter(
            "headrace_completion_tokens_total", "Tokens that were written."
        )
        self._reasoning = self._counter(
            "headrace_reasoning_tokens_total", "Tokens that were written while thinking."
        )
        self._prompts = self._counter(
            "headrace_prefix_cache_queries_total",
            "Requests whose prompt was looked up in the engine's cache.",
        )
        self._hits = self._counter(
            "headrace_prefix_cache_hits_total",
            "Requests of whose prompt the engine's cache had a beginning.",
        )

    def _about_the_service(self) -> None:
        self._loads = self._histogram(
            "headrace_model_load_seconds", "How long models took to load.", _LOAD_S
        )
        self._failed_loads = self._counter(
            "headrace_model_load_failures_total", "Loads that failed."
        )
        self._calls = Counter(
            "headrace_http_requests_total",
            "HTTP requests by route (- is none of ours), method and class of status.",
            ("route", "method", "status"),
            registry=self._registry,
        )
        self._call_seconds = Histogram(
            "headrace_http_request_duration_seconds",
            "From the head of an HTTP request to the end of its answer.",
            ("route",),
            buckets=_WAIT_S,
            registry=self._registry,
        )
        self._lag = Histogram(
            "headrace_event_loop_lag_seconds",
            "How much later than it should the service's event loop came to its next task.",
            buckets=_LAG_S,
            registry=self._registry,
        )
        build = Info("headrace_build", "What is running.", registry=self._registry)
        build.info({"version": __version__, "python": platform.python_version()})
        ProcessCollector(registry=self._registry)

    def record(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        model, metrics, usage = self._label(record.model), record.metrics, record.metrics.usage
        labels = (record.operation, _provider(record), model)
        _observe(self._duration, (*labels, _reason(record)), metrics.total_ms)
        if record.outcome == "ok":
            _observe(self._first_token, labels, metrics.time_to_first_token_ms)
            _observe(self._per_token, labels, metrics.time_per_output_token_ms)
        elif record.outcome == "refused":
            self._rejected.labels(model, _reason(record)).inc()
        _observe(self._queue, (model,), metrics.queue_ms)
        _observe(self._load_wait, (model,), metrics.load_ms or None)
        for counter, count in (
            (self._prompt, usage.prompt_tokens),
            (self._cached, usage.cached_tokens),
            (self._completion, usage.completion_tokens),
            (self._reasoning, usage.reasoning_tokens),
            (self._prompts, usage.prompt_tokens > 0),
            (self._hits, usage.cached_tokens > 0),
        ):
            if count > 0:
                counter.labels(model).inc(count)

    def called(self, call: Call) -> None:
        """Count an HTTP request that has ended."""
        method = call.method if call.method in _METHODS else "other"
        status = f"{call.status // 100}xx" if call.status else "none"
        self._calls.labels(call.route, method, status).inc()
        self._call_seconds.labels(call.route).observe(call.seconds)

    def happened(self, event: PoolEvent) -> None:
        """Count what happens in the pool and is kept nowhere."""
        if event.kind == "ready":
            _observe(self._loads, (self._label(event.model),), event.data.get("ms"))
        elif event.kind == "load_failed":
            self._failed_loads.labels(self._label(event.model)).inc()

    async def watch_loop(self) -> None:
        """Measure how late the running event loop is, until cancelled."""
        self._loop = loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_EVERY_S
            await asyncio.sleep(_LAG_EVERY_S)
            self._lag.observe(max(0.0, loop.time() - due))

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Return all figures, and their content type: OpenMetrics for those who accept it.

        May be called on any thread; while `watch_loop` runs, the pool is looked at on its loop.
        """
        exposed = _Exposed(self._registry, self._looked())
        if "application/openmetrics-text" in accept:
            return _open_metrics(exposed), openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(exposed), CONTENT_TYPE_PLAIN_0_0_4

    def _looked(self) -> PoolStatus:
        loop = self._loop
        if loop is None or loop.is_closed() or loop is _running_loop():
            return self._look()

        async def look() -> PoolStatus:
            return self._look()

        return asyncio.run_coroutine_threadsafe(look(), loop).result(_LOOK_WITHIN_S)

    def _look(self) -> PoolStatus:
        """Read the pool; give each model its series, and take those of the removed ones."""
        status = self._status()
        served = {model.id for model in status.models}
        for metric, labels in self._of_model:
            name = "model" if "model" in labels else "gen_ai_request_model"
            for gone in self._named - served:
                metric.remove_by_labels({name: gone})
            if labels == _MODEL:
                # From 0 on: a rate has to see the first step.
                for model in served:
                    metric.labels(model)
        self._named = served
        return status

    def _label(self, model: str) -> str:
        if model not in self._models():
            return OTHER
        self._named.add(model)
        return model

    def _counter(self, name: str, told: str, labels: tuple[str, ...] = _MODEL) -> Counter:
        metric = Counter(name, told, labels, registry=self._registry)
        self._of_model.append((metric, labels))
        return metric

    def _histogram(
        self, name: str, told: str, buckets: Sequence[float], labels: tuple[str, ...] = _MODEL
    ) -> Histogram:
        metric = Histogram(name, told, labels, buckets=buckets, registry=self._registry)
        self._of_model.append((metric, labels))
        return metric


class _Exposed:
    """What is counted and what stands, without the moments at which series began."""

    def __init__(self, registry: CollectorRegistry, status: PoolStatus) -> None:
        self._registry = registry
        self._status = status

    def collect(self) -> Iterator[Metric]:
        for metric in chain(self._registry.collect(), standing(self._status)):
            metric.samples = [one for one in metric.samples if not one.name.endswith("_created")]
            yield metric


def _observe(histogram: Histogram, labels: tuple[str, ...], ms: float | None) -> None:
    if ms is not None:
        histogram.labels(*labels).observe(ms / 1000)


def _provider(record: RequestRecord) -> str:
    return str(record.spans[0].attributes[names.PROVIDER]) if record.spans else names.HERE


def _reason(record: RequestRecord) -> str:
    """Name the class of an error; nothing for what ended well."""
    if record.outcome in {"ok", "cancelled"}:
        return "" if record.outcome == "ok" else "cancelled"
    return record.error if record.error in _REASONS else "_OTHER"


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
