"""Metrics of requests and the pool, for Prometheus.

Imported only by the service: its library is not needed otherwise.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from headrace import __version__
from headrace.core.errors import kinds
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.record import Call, RequestRecord, RunningRequest
from headrace.core.status import PoolEvent, PoolStatus
from headrace.telemetry import names
from headrace.telemetry.gauges import gauges

OTHER = "_other"
"""The model of all requests for models that are not served."""
# As in OpenTelemetry's conventions for GenAI, like the names of the three histograms.
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
_open_metrics = cast("Callable[[Collector], bytes]", openmetrics.generate_latest)  # pyright: ignore[reportUnknownMemberType] - it has no types
_LAG_EVERY_S = 0.25
_READ_WITHIN_S = 5

_ALL, _OK, _WAITED = "", "successful requests only", "requests that waited only"
_BATCH = "requests of batches, which no other histogram of requests has"


class _Mirror(NamedTuple):
    """A histogram, in seconds, of a figure in milliseconds."""

    name: str
    figure: str
    buckets: tuple[float, ...]
    labels: tuple[str, ...] = _MODEL
    scope: str = _ALL

    @property
    def help(self) -> str:
        """The definition of the figure, and the requests that count."""
        text = InferenceMetrics.declared()[self.figure].help
        return f"{text.removesuffix('.')}; {self.scope}." if self.scope else text

    def milliseconds(self, record: RequestRecord) -> float | None:
        """Return the value of a request, or None if it does not count."""
        value = getattr(record.metrics, self.figure)
        is_elsewhere = record.batch is not (self.scope == _BATCH)
        fails = self.scope == _OK and record.outcome != "ok"
        return None if is_elsewhere or fails or (self.scope == _WAITED and not value) else value


_MIRRORS = (
    _Mirror(
        "gen_ai_server_request_duration_seconds", "total_ms", _DURATION_S, (*_GEN_AI, "error_type")
    ),
    _Mirror(
        "gen_ai_server_time_to_first_token_seconds",
        "time_to_first_token_ms",
        *(_FIRST_TOKEN_S, _GEN_AI, _OK),
    ),
    _Mirror(
        "headrace_request_time_to_first_content_seconds",
        "time_to_first_content_ms",
        *(_FIRST_TOKEN_S, _MODEL, _OK),
    ),
    _Mirror(
        "gen_ai_server_time_per_output_token_seconds",
        "time_per_output_token_ms",
        *(_PER_TOKEN_S, _GEN_AI, _OK),
    ),
    _Mirror("headrace_request_queue_seconds", "queue_ms", _WAIT_S),
    _Mirror("headrace_request_load_wait_seconds", "load_ms", _WAIT_S, scope=_WAITED),
    _Mirror("headrace_batch_request_duration_seconds", "total_ms", _DURATION_S, scope=_BATCH),
)
_TOKENS = {"cached_tokens": "prompt_cached_tokens"}
"""Counters of tokens whose names differ from the figure's."""


class Instruments:
    """A Sink that counts; the state of the pool is read at each scrape.

    `models` returns the served names: other names share one series, and the series of removed
    models are removed. `running` returns the running requests. All methods but `exposition` are
    called on the event loop.
    """

    def __init__(
        self,
        status: Callable[[], PoolStatus],
        models: Callable[[], Container[str]],
        running: Callable[[], Sequence[RunningRequest]] = tuple,
    ) -> None:
        self._status = status
        self._running = running
        self._models = models
        self._named: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._registry = CollectorRegistry()
        self._of_model: list[tuple[Counter | Histogram, tuple[str, ...]]] = []
        self._about_requests()
        self._about_the_service()

    def _about_requests(self) -> None:
        self._mirrors = [
            (mirror, self._histogram(mirror.name, mirror.help, mirror.buckets, mirror.labels))
            for mirror in _MIRRORS
        ]
        self._rejected = self._counter(
            "headrace_requests_rejected_total",
            "Requests that were refused, by the name of the error.",
            ("model", "reason"),
        )
        self._tokens = [
            (name, self._counter(f"headrace_{_TOKENS.get(name, name)}_total", figure.help))
            for name, figure in Usage.declared().items()
        ]
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
        self.lag = Histogram(
            "headrace_event_loop_lag_seconds",
            "How much later than it should the service's event loop came to its next task.",
            buckets=_LAG_S,
            registry=self._registry,
        )
        self._registered = Gauge(
            "headrace_dbgpt_registered",
            "Rows that a DB-GPT controller has of this worker; 0 while it cannot be reached.",
            ("controller",),
            registry=self._registry,
        )
        build = Info("headrace_build", "What is running.", registry=self._registry)
        build.info({"version": __version__, "python": platform.python_version()})
        ProcessCollector(registry=self._registry)

    def record(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        model, usage = self._label(record.model), record.metrics.usage
        gen_ai = dict(zip(_GEN_AI, (record.operation, _provider(record), model), strict=True))
        labels = {"model": model, **gen_ai, "error_type": _reason(record)}
        for mirror, histogram in self._mirrors:
            values = tuple(labels[name] for name in mirror.labels)
            _observe(histogram, values, mirror.milliseconds(record))
        if record.outcome == "refused":
            self._rejected.labels(model, _reason(record)).inc()
        _add(self._prompts, model, usage.prompt_tokens > 0)
        _add(self._hits, model, usage.cached_tokens > 0)
        for name, counter in self._tokens:
            _add(counter, model, getattr(usage, name))

    def called(self, call: Call) -> None:
        """Count an HTTP request that has ended."""
        method = call.method if call.method in _METHODS else "other"
        status = f"{call.status // 100}xx" if call.status else "none"
        self._calls.labels(call.route, method, status).inc()
        self._call_seconds.labels(call.route).observe(call.seconds)

    def watch_controller(self, url: str, count: Callable[[], float]) -> None:
        """Show the rows that a DB-GPT controller has of this worker."""
        self._registered.labels(url).set_function(count)

    def happened(self, event: PoolEvent) -> None:
        """Count an event of a kind that the pool does not count itself."""
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
            self.lag.observe(max(0.0, loop.time() - due))

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Return all metrics and the content type: OpenMetrics for clients that accept it.

        May be called on any thread; while `watch_loop` runs, the pool is read on its loop.
        """
        exposed = _Exposed(self._registry, *self._read_on_loop())
        if "application/openmetrics-text" in accept:
            return _open_metrics(exposed), openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(exposed), CONTENT_TYPE_PLAIN_0_0_4

    def _read_on_loop(self) -> tuple[PoolStatus, Sequence[RunningRequest]]:
        loop = self._loop
        if loop is None or loop.is_closed() or loop is _running_loop():
            return self._read()

        async def read() -> tuple[PoolStatus, Sequence[RunningRequest]]:
            return self._read()

        return asyncio.run_coroutine_threadsafe(read(), loop).result(_READ_WITHIN_S)

    def _read(self) -> tuple[PoolStatus, Sequence[RunningRequest]]:
        """Read the pool; add the series of new models and remove those of removed models."""
        status = self._status()
        names = self._models()
        served = {model.id for model in status.models} | {n for n in self._named if n in names}
        for metric, labels in self._of_model:
            name = "model" if "model" in labels else "gen_ai_request_model"
            for removed in self._named - served:
                metric.remove_by_labels({name: removed})
            if labels == _MODEL:
                # Starts at 0, so that a rate includes the first increment.
                for model in served:
                    metric.labels(model)
        self._named = served
        return status, self._running()

    def _label(self, model: str) -> str:
        if model not in self._models():
            return OTHER
        self._named.add(model)
        return model

    def _counter(self, name: str, help: str, labels: tuple[str, ...] = _MODEL) -> Counter:
        metric = Counter(name, help, labels, registry=self._registry)
        self._of_model.append((metric, labels))
        return metric

    def _histogram(
        self, name: str, help: str, buckets: Sequence[float], labels: tuple[str, ...] = _MODEL
    ) -> Histogram:
        metric = Histogram(name, help, labels, buckets=buckets, registry=self._registry)
        self._of_model.append((metric, labels))
        return metric


class _Exposed:
    """Counters and gauges, without the `_created` samples."""

    def __init__(
        self,
        registry: CollectorRegistry,
        status: PoolStatus,
        running: Sequence[RunningRequest],
    ) -> None:
        self._registry = registry
        self._status = status
        self._running = running

    def collect(self) -> Iterator[Metric]:
        for metric in chain(self._registry.collect(), gauges(self._status, self._running)):
            metric.samples = [
                sample for sample in metric.samples if not sample.name.endswith("_created")
            ]
            yield metric


def _observe(histogram: Histogram, labels: tuple[str, ...], ms: float | None) -> None:
    if ms is not None:
        histogram.labels(*labels).observe(ms / 1000)


def _add(counter: Counter, model: str, count: int) -> None:
    if count > 0:
        counter.labels(model).inc(count)


def _provider(record: RequestRecord) -> str:
    return str(record.spans[0].attributes[names.PROVIDER]) if record.spans else names.HERE


def _reason(record: RequestRecord) -> str:
    """Return the class name of an error; empty for a success."""
    if record.outcome in {"ok", "cancelled"}:
        return "" if record.outcome == "ok" else "cancelled"
    return record.error if record.error in _REASONS else "_OTHER"


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
