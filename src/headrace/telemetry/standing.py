"""How a pool stands, as metrics: read when they are asked for, and kept nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from headrace.core.model import State
from headrace.core.status import DeviceStatus, ModelStatus, PoolStatus

_OF_MODEL: tuple[tuple[str, str, Callable[[ModelStatus], float]], ...] = (
    ("headrace_requests_running", "Requests that hold a slot.", lambda one: one.running),
    ("headrace_requests_queued", "Requests that wait for a slot.", lambda one: one.queued),
    ("headrace_slots", "Requests that can run at once.", lambda one: one.max_running or 0),
    ("headrace_queue_places", "Requests that may wait.", lambda one: one.max_queued),
)
_COUNTED: tuple[tuple[str, str, Callable[[ModelStatus], float]], ...] = (
    ("headrace_model_restarts_total", "Workers that died.", lambda one: one.restarts),
    (
        "headrace_model_evictions_total",
        "How often a worker had to make room for another model.",
        lambda one: one.evictions,
    ),
    (
        "headrace_model_continuations_total",
        "Answers that went on after their worker had died.",
        lambda one: one.continuations,
    ),
)
_OF_DEVICE: tuple[tuple[str, str, Callable[[DeviceStatus], float]], ...] = (
    ("headrace_device_memory_bytes", "Memory that a device has.", lambda one: one.total),
    ("headrace_device_memory_budget_bytes", "Memory that models may take.", lambda one: one.budget),
    (
        "headrace_device_memory_booked_bytes",
        "Memory that models have booked.",
        lambda one: one.booked,
    ),
    (
        "headrace_device_memory_free_bytes",
        "Memory that nobody uses, as the machine tells it.",
        lambda one: one.free,
    ),
)


def standing(status: PoolStatus) -> Iterator[Metric]:
    """Yield what a pool tells of itself, with a series for each model, state and device."""
    for name, told, read in _OF_MODEL:
        yield _gauge(name, told, ("model",), (((one.id,), read(one)) for one in status.models))
    for name, told, read in _COUNTED:
        counted = CounterMetricFamily(name, told, labels=("model",))
        for one in status.models:
            counted.add_metric((one.id,), read(one))
        yield counted
    yield _gauge(
        "headrace_model_state",
        "1 for the state that a model is in.",
        ("model", "state"),
        (
            ((one.id, state), float(one.state == state))
            for one in status.models
            for state in get_args(State)
        ),
    )
    yield _gauge(
        "headrace_model_memory_bytes",
        "Memory that a model holds.",
        ("model", "device"),
        (
            ((one.id, device), amount)
            for one in status.models
            for device, amount in one.memory.items()
        ),
    )
    for name, told, read in _OF_DEVICE:
        yield _gauge(name, told, ("device",), (((one.name,), read(one)) for one in status.devices))


def _gauge(
    name: str,
    told: str,
    labels: tuple[str, ...],
    values: Iterator[tuple[tuple[str, ...], float]],
) -> Metric:
    gauge = GaugeMetricFamily(name, told, labels=labels)
    for key, value in values:
        gauge.add_metric(key, value)
    return gauge
