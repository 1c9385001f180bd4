"""What `headrace top` shows, as lines that are no wider than the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len
from rich.text import Text

from headrace.cli import terminal
from headrace.cli.ps import span
from headrace.core.record import Activity, Rates, RunningRequest
from headrace.core.status import DeviceStatus, ModelStatus, PoolStatus

if TYPE_CHECKING:
    from headrace.cli.top import Sight, Sort

_GAP = 2
_WIDEST, _BAR = 48, 20
_UNKNOWN = "This service does not tell what runs."
_STYLES = {
    "ready": "green",
    "loading": "yellow",
    "draining": "yellow",
    "failed": "red",
    "queued": "yellow",
}


class Column(NamedTuple):
    """Cells below a head. Of too many columns the highest `rank` goes first, and 0 never does.

    Words can be shortened, to no less than `least` while there are columns to leave out.
    """

    head: str
    cells: Sequence[str]
    rank: int = 0
    is_number: bool = True
    least: int = 8


def lines(
    sight: Sight, title: str, width: int, height: int | None = None, *, sort: Sort = "slowest"
) -> list[Text]:
    """Draw what was seen; with a `height`, what does not fit into it is only counted."""
    status = sight.status or PoolStatus(models=(), devices=())
    activity = sight.activity or Activity()
    # What is loaded comes first; else the order stays, and no row jumps about.
    models = sorted(status.models, key=lambda one: not (one.memory or one.state == "ready"))
    running = sorted(activity.running, key=lambda one: (one.model * (sort == "model"), one.since))
    rates = {one.model: one for one in activity.rates}
    above = [Text(f"headrace top  {_clean(title)}", "bold")]
    above += [Text(_clean(sight.error), "red")] if sight.error else []
    above += [*_packed(_totals(status, activity.rates), width), Text()]
    above += [*_table(_devices(status.devices), width), Text()]
    first, second = _table(_models(models, rates), width), [Text(_UNKNOWN)]
    if sight.activity is not None:
        second = _table(_running(running, sight.time), width)
    if height is not None:
        left = max(0, height - len(above) - 1)
        first = _cut(first, max(left - len(second), left // 2))
        second = _cut(second, left - len(first))
    drawn = [*above, *first, Text(), *second][:height]
    for line in drawn:
        line.truncate(max(1, width), overflow="ellipsis")
    return drawn


def _totals(status: PoolStatus, rates: Sequence[Rates]) -> list[str]:
    failed = sum(one.failed for one in rates)
    return [
        f"{_number(sum(one.completion_tokens_per_second for one in rates))} tokens/s out",
        f"{_number(sum(one.prompt_tokens_per_second for one in rates))} in",
        f"{sum(one.running for one in status.models)} running",
        f"{sum(one.queued for one in status.models)} queued",
        f"{sum(one.requests for one in rates)} requests and {failed} errors in a minute",
    ]


def _devices(devices: Sequence[DeviceStatus]) -> list[Column]:
    return [
        Column("DEVICE", [one.name for one in devices], is_number=False),
        Column("USE", [_bar(one.booked, one.budget) for one in devices], 3, is_number=False),
        Column("BOOKED", [terminal.size(one.booked) or "-" for one in devices]),
        Column("BUDGET", [terminal.size(one.budget) or "-" for one in devices], 1),
        Column("FREE", [terminal.size(one.free) or "-" for one in devices], 2),
    ]


def _models(models: Sequence[ModelStatus], rates: dict[str, Rates]) -> list[Column]:
    def figures(get: Callable[[Rates], str]) -> list[str]:
        return [get(rates[one.id]) if one.id in rates else "-" for one in models]

    return [
        Column("MODEL", [one.id for one in models], is_number=False),
        Column("STATE", [_state(one) for one in models], is_number=False),
        Column("RUN", [f"{one.running}/{one.max_running or '-'}" for one in models], 1),
        Column("QUEUE", [str(one.queued) for one in models], 2),
        Column("OUT/S", figures(lambda one: _number(one.completion_tokens_per_second))),
        Column("IN/S", figures(lambda one: _number(one.prompt_tokens_per_second)), 7),
        Column("TTFT", figures(lambda one: _ms(one.time_to_first_token_p50_ms)), 3),
        Column("P99", figures(lambda one: _ms(one.time_to_first_token_p99_ms)), 6),
        Column("TPOT", figures(lambda one: _ms(one.time_per_output_token_p50_ms)), 5),
        Column("MEMORY", [_memory(one) for one in models], 4),
    ]


def _running(requests: Sequence[RunningRequest], now: float) -> list[Column]:
    ages = [max(0.0, now - one.since) for one in requests]
    pairs = list(zip(requests, ages, strict=True))
    return [
        Column("REQUEST", [one.id for one in requests], is_number=False, least=24),
        Column("MODEL", [one.model for one in requests], 2, is_number=False),
        Column("CLIENT", [one.client or "-" for one in requests], 5, is_number=False),
        Column("PHASE", [one.phase for one in requests], is_number=False),
        Column("AGE", [span(age) for age in ages]),
        Column("TTFT", [_ms(one.time_to_first_token_ms) for one in requests], 4),
        Column("TOKENS", [str(one.completion_tokens) for one in requests], 1),
        Column("TOKENS/S", [_speed(one, age) for one, age in pairs], 3),
    ]


def _table(columns: Sequence[Column], width: int) -> list[Text]:
    """Lay out columns: leave out those that have no room, then shorten what is words."""
    shown = [one._replace(cells=[one.head, *map(_clean, one.cells)]) for one in columns]
    while sum(_GAP + _needed(one, one.least) for one in shown) > width + _GAP:
        last = max(shown, key=lambda one: one.rank)
        if not last.rank:
            break
        shown.remove(last)
    widths = [_needed(one, _WIDEST) for one in shown]
    words = [place for place, one in enumerate(shown) if not one.is_number]
    while sum(widths) + _GAP * (len(widths) - 1) > width:
        widest = max(words, key=widths.__getitem__)
        if widths[widest] == 1:
            break
        widths[widest] -= 1
    cells = (
        [_cell(cell, size, is_number=one.is_number) for cell in one.cells]
        for one, size in zip(shown, widths, strict=True)
    )
    drawn = [Text(" " * _GAP).join(row) for row in zip(*cells, strict=True)]
    drawn[0].stylize("bold")
    return drawn


def _needed(column: Column, most: int) -> int:
    longest = max(map(cell_len, column.cells))
    return longest if column.is_number else min(longest, most)


def _cell(text: str, width: int, *, is_number: bool) -> Text:
    cell = Text(text, "" if is_number else _STYLES.get(text.partition(" ")[0], ""))
    cell.truncate(width, overflow="ellipsis")
    cell.align("right" if is_number else "left", width)
    return cell


def _cut(rows: list[Text], count: int) -> list[Text]:
    if len(rows) <= count:
        return rows
    kept = rows[: max(0, count - 1)]
    return [*kept, Text(f"... {len(rows) - len(kept)} more", "dim")][:count]


def _packed(parts: Iterable[str], width: int) -> list[Text]:
    """Put parts beside one another, as many on each line as it can hold."""
    packed: list[str] = []
    for part in parts:
        if packed and len(packed[-1]) + 3 + len(part) <= width:
            packed[-1] += f"   {part}"
        else:
            packed.append(part)
    return list(map(Text, packed))


def _clean(text: str) -> str:
    """Return text on one line, without what moves the cursor or turns the writing round."""
    return "".join(one for one in " ".join(text.split()) if one.isprintable())


def _state(model: ModelStatus) -> str:
    share = f" {100 * model.done // model.total}%" if model.progress and model.total else ""
    return f"{model.state}{share}" if model.enabled else "disabled"


def _memory(model: ModelStatus) -> str:
    """Return what it takes of what was estimated."""
    estimated = model.estimated and f"~{terminal.size(sum(model.estimated.devices.values()))}"
    measured = terminal.size(sum(model.memory.values())) if model.memory else None
    return " of ".join(part for part in (measured, estimated) if part) or "-"


def _bar(part: int, whole: int) -> str:
    full = min(_BAR, round(_BAR * part / whole)) if whole > 0 else 0
    return "█" * full + "░" * (_BAR - full)


def _speed(request: RunningRequest, age: float) -> str:
    if request.time_to_first_token_ms is None:
        return "-"
    seconds = age - request.time_to_first_token_ms / 1000
    return _number(request.completion_tokens / seconds) if seconds > 0 else "-"


def _number(value: float) -> str:
    return f"{value:.1f}" if 0 < value < 10 else f"{value:.0f}"


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    if value >= 60_000:
        return span(value / 1000)
    return f"{value / 1000:.2f}s" if value >= 1000 else f"{_number(value)}ms"
