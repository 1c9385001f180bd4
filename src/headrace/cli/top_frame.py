"""What `headrace top` shows: a snapshot of a service as lines no wider than the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import msgspec

from headrace.cli import terminal
from headrace.cli.pool import requests_of, state
from headrace.cli.terminal import Column, flat, size, span
from headrace.core.record import Activity, Rates, RunningRequest
from headrace.core.status import DeviceStatus, ModelStatus, PoolStatus

Sort = Literal["slowest", "model"]
StyledLine = list[tuple[str, str]]
"""A line on the screen: its parts, each a text and its style for rich."""

_BAR = 20
_HEIGHTS = "▁▂▃▄▅▆▇█"
_UNKNOWN = "This service does not report its requests."
_STYLES = {
    "ready": "green",
    "loading": "yellow",
    "draining": "yellow",
    "failed": "red",
    "queued": "yellow",
    "decode": "green",
}


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The state of a service at a time (Unix seconds, of this machine), or an error.

    `activity` is None if the service does not observe its requests.
    """

    time: float
    status: PoolStatus | None = None
    activity: Activity | None = None
    error: str | None = None


def lines(
    snapshot: Snapshot,
    title: str,
    width: int,
    height: int | None = None,
    *,
    sort: Sort = "slowest",
    history: Iterable[float] = (),
) -> list[StyledLine]:
    """Draw a snapshot; with a `height`, rows that do not fit are only counted.

    `history` are earlier tokens/s of all models, the latest last.
    """
    status = snapshot.status or PoolStatus(models=(), devices=())
    activity = snapshot.activity or Activity()
    # Loaded models come first; otherwise the order is stable.
    models = sorted(status.models, key=lambda model: not (model.memory or model.state == "ready"))
    running = sorted(
        activity.running, key=lambda request: (request.model * (sort == "model"), request.since)
    )
    above: list[StyledLine] = [[(f"headrace top  {flat(title)}", "bold")]]
    above += [[(flat(snapshot.error), "red")]] if snapshot.error else []
    totals = terminal.packed(_totals(status, activity.rates), width, gap="   ")
    above += [[(line, "")] for line in totals]
    above += [*([(part, "cyan")] for part in [sparkline(history, width)] if part), []]
    above += [*_drawn(_devices(status.devices), width), []]
    first = _drawn(_models(models, {rates.model: rates for rates in activity.rates}), width)
    second: list[StyledLine] = [[(_UNKNOWN, "")]]
    if snapshot.activity is not None:
        second = _drawn(_running(running, snapshot.time), width)
    if height is not None:
        left = max(0, height - len(above) - 1)
        first = _cut(first, max(left - len(second), left // 2))
        second = _cut(second, left - len(first))
    return [_shortened(line, max(1, width)) for line in [*above, *first, [], *second][:height]]


def sparkline(values: Iterable[float], width: int) -> str:
    """Return the last values as bars from zero to the largest; "" if there are fewer than two."""
    kept = [*values][-max(1, width) :]
    if len(kept) < 2:
        return ""
    top = max(kept) or 1.0
    return "".join(_HEIGHTS[round((len(_HEIGHTS) - 1) * value / top)] for value in kept)


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _totals(status: PoolStatus, rates: Sequence[Rates]) -> list[str]:
    failed = sum(model.failed for model in rates)
    return [
        f"{_number(sum(model.completion_tokens_per_second for model in rates))} tokens/s out",
        f"{_number(sum(model.prompt_tokens_per_second for model in rates))} in",
        f"{sum(model.running for model in status.models)} running",
        f"{sum(model.queued for model in status.models)} queued",
        f"{_counted(sum(model.requests for model in rates), 'request')}"
        f" and {_counted(failed, 'error')} in a minute",
    ]


def _devices(devices: Sequence[DeviceStatus]) -> list[Column]:
    return [
        Column("DEVICE", [device.name for device in devices], is_number=False),
        Column("USE", [_bar(device) for device in devices], is_number=False, rank=3),
        Column("BOOKED", [size(device.booked) or "-" for device in devices]),
        Column("BUDGET", [size(device.budget) or "-" for device in devices], rank=1),
        Column("FREE", [size(device.free) or "-" for device in devices], rank=2),
    ]


def _models(models: Sequence[ModelStatus], rates: dict[str, Rates]) -> list[Column]:
    def figures(get: Callable[[Rates], str]) -> list[str]:
        return [get(rates[model.id]) if model.id in rates else "-" for model in models]

    return [
        Column("MODEL", [model.id for model in models], is_number=False),
        Column("STATE", [state(model) for model in models], is_number=False),
        Column("RUN", [requests_of(model) for model in models], rank=1),
        Column("QUEUE", [str(model.queued) for model in models], rank=2),
        Column("OUT/S", figures(lambda rate: _number(rate.completion_tokens_per_second))),
        Column("IN/S", figures(lambda rate: _number(rate.prompt_tokens_per_second)), rank=7),
        Column("TTFT", figures(lambda rate: _ms(rate.time_to_first_token_p50_ms)), rank=3),
        Column("P99", figures(lambda rate: _ms(rate.time_to_first_token_p99_ms)), rank=6),
        Column("TPOT", figures(lambda rate: _ms(rate.time_per_output_token_p50_ms)), rank=5),
        Column("MEMORY", [_memory(model) for model in models], rank=4),
    ]


def _running(requests: Sequence[RunningRequest], now: float) -> list[Column]:
    ages = [max(0.0, now - request.since) for request in requests]
    speeds = list(map(_speed, requests, ages))
    firsts = [_ms(request.time_to_first_token_ms) for request in requests]
    return [
        Column("REQUEST", [request.id for request in requests], is_number=False, least=24),
        Column("MODEL", [request.model for request in requests], is_number=False, rank=2),
        Column("CLIENT", [request.client or "-" for request in requests], is_number=False, rank=5),
        Column("PHASE", [request.phase for request in requests], is_number=False),
        Column("AGE", [span(age) for age in ages]),
        Column("TTFT", firsts, rank=4),
        Column("TOKENS", [str(request.completion_tokens) for request in requests], rank=1),
        Column("TOKENS/S", speeds, rank=3),
    ]


def _drawn(columns: Sequence[Column], width: int) -> list[StyledLine]:
    heads, *rows = terminal.table(columns, width)
    frame: list[StyledLine] = [[(terminal.GAP.join(heads), "bold")]]
    for row in rows:
        cells = [(cell, _style(cell)) for cell in row]
        frame.append([part for cell in cells for part in (cell, (terminal.GAP, ""))][:-1])
    return frame


def _style(cell: str) -> str:
    return "cyan" if cell[:1] in "█░" and cell else _STYLES.get(cell.partition(" ")[0], "")


def _shortened(line: StyledLine, width: int) -> StyledLine:
    kept: StyledLine = []
    for text, style in line:
        kept.append((terminal.shortened(text, width), style))
        width -= terminal.cells(kept[-1][0])
    return kept


def _cut(rows: list[StyledLine], count: int) -> list[StyledLine]:
    if len(rows) <= count:
        return rows
    kept = rows[: max(0, count - 1)]
    return [*kept, [(f"... {len(rows) - len(kept)} more", "dim")]][:count]


def _memory(model: ModelStatus) -> str:
    """Return the measured memory and the estimate, both of all loaded replicas."""
    loaded = max(1, sum(bool(replica.memory) for replica in model.replicas))
    estimated = model.estimated and f"~{size(loaded * sum(model.estimated.devices.values()))}"
    measured = size(sum(model.memory.values())) if model.memory else None
    return " of ".join(part for part in (measured, estimated) if part) or "-"


def _bar(device: DeviceStatus) -> str:
    share = _BAR * device.booked / device.budget if device.budget > 0 else 0
    full = min(_BAR, round(share))
    return "█" * full + "░" * (_BAR - full)


def _speed(request: RunningRequest, age: float) -> str:
    if request.time_to_first_token_ms is None:
        return "-"
    elapsed = age - request.time_to_first_token_ms / 1000
    return _number(request.completion_tokens / elapsed) if elapsed > 0 else "-"


def _number(value: float) -> str:
    return f"{value:.1f}" if 0 < value < 10 else f"{value:.0f}"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 60_000:
        return span(value / 1000)
    return f"{value / 1000:.2f}s" if value >= 1000 else f"{_number(value)}ms"
