"""Gauges, and counters of the pool's own, that are read at each scrape of the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, get_args

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from headrace.core.model import State
from headrace.core.record import RunningRequest
from headrace.core.status import NodeState, PoolStatus

_MODEL, _DEVICE = ("model",), ("device",)
_HOLDING = frozenset({"prefill", "decode"})
"""The phases of a request in which the engine keeps its tokens."""

_Series = Iterator[tuple[tuple[str, ...], float]]


def _by_model(field: str) -> Callable[[PoolStatus], _Series]:
    return lambda status: (
        ((model.id,), float(getattr(model, field) or 0)) for model in status.models
    )


def _by_device(field: str) -> Callable[[PoolStatus], _Series]:
    return lambda status: (
        ((device.name,), float(getattr(device, field))) for device in status.devices
    )


def _states(status: PoolStatus) -> _Series:
    for model in status.models:
        for state in get_args(State):
            yield (model.id, state), float(model.state == state)


def _memory(status: PoolStatus) -> _Series:
    for model in status.models:
        for device, amount in model.memory.items():
            yield (model.id, device), amount


def _drafting(status: PoolStatus) -> _Series:
    for model in status.models:
        states = [each.drafting for each in model.replicas if each.drafting is not None]
        if states:
            yield (model.id,), float(sum(states))


def _nodes(status: PoolStatus) -> _Series:
    for state in get_args(NodeState):
        yield (state,), float(sum(node.state == state for node in status.nodes))


class _State(NamedTuple):
    """A metric that is read from the pool: a counter if its name ends in `_total`, or a gauge."""

    name: str
    help: str
    read: Callable[[PoolStatus], _Series]
    labels: tuple[str, ...] = _MODEL


_STATES = (
    _State("headrace_cluster_nodes", "Nodes of the cluster by state.", _nodes, ("state",)),
    _State("headrace_requests_running", "Requests that hold a slot.", _by_model("running")),
    _State("headrace_requests_queued", "Requests that wait for a slot.", _by_model("queued")),
    _State("headrace_slots", "Requests that can run at once.", _by_model("max_running")),
    _State(
        "headrace_queue_places",
        "More requests that may wait, without those of batches.",
        _by_model("places"),
    ),
    *(
        _State(f"headrace_model_{field}_total", help, _by_model(field))
        for field, help in (
            ("restarts", "Workers that died."),
            ("evictions", "How often a worker had to make room for another model."),
            ("continuations", "Answers that went on after their worker had died."),
        )
    ),
    _State(
        "headrace_model_state", "1 for the state that a model is in.", _states, ("model", "state")
    ),
    _State(
        "headrace_model_memory_bytes", "Memory that a model holds.", _memory, ("model", "device")
    ),
    _State("headrace_workers_drafting", "Workers whose engine drafts tokens now.", _drafting),
    *(
        _State(f"headrace_device_memory_{part}bytes", help, _by_device(field), _DEVICE)
        for part, field, help in (
            ("", "total", "Memory that a device has."),
            ("budget_", "budget", "Memory that models may take."),
            ("booked_", "booked", "Memory that models have booked."),
            ("free_", "free", "Memory that no process uses, as the machine reports it."),
        )
    ),
)


def gauges(status: PoolStatus, running: Iterable[RunningRequest] = ()) -> Iterator[Metric]:
    """Yield the metrics of a pool, with a series for each model, state and device."""
    yield _cache_usage(status, running)
    for state in _STATES if status.nodes else _STATES[1:]:
        family = CounterMetricFamily if state.name.endswith("_total") else GaugeMetricFamily
        metric = family(state.name, state.help, labels=state.labels)
        for labels, value in state.read(status):
            metric.add_metric(labels, value)
        yield metric


def _cache_usage(status: PoolStatus, running: Iterable[RunningRequest]) -> Metric:
    """Return the share of each model's cache that running requests hold.

    A model has room for `context_length` tokens in each slot.
    """
    held = Counter[str]()
    for request in running:
        if request.phase in _HOLDING:
            held[request.base or request.model] += request.prompt_tokens + request.completion_tokens
    metric = GaugeMetricFamily(
        "headrace_kv_cache_usage_ratio",
        "Tokens of running requests, by those that all slots have room for: 0 to 1.",
        labels=_MODEL,
    )
    for model in status.models:
        capacity = (model.context_length or 0) * (model.max_running or 0)
        share = min(1.0, held[model.id] / capacity) if capacity else 0.0
        metric.add_metric((model.id,), share)
    return metric
