"""How the figures of `headrace bench` are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from headrace.cli import terminal

if TYPE_CHECKING:
    from headrace.bench.figures import Level, Run, Summary

_HEADS = (
    *("LOAD", "OK", "FAILED", "REQ/S", "TOKENS/S", "PROMPT", "ANSWER", "TTFT P50", "P90", "P99"),
    *("BETWEEN P50", "P99", "TOTAL P50", "P99"),
)


def show(run: Run) -> None:
    """Print a table of the loads, what went wrong, and what one must know to read it."""
    settings = run.settings
    kind = "requests at once" if settings.loads[0].loop == "closed" else "requests/s"
    where = "its own server" if run.own_server else run.url
    print(f"{settings.model} at {where}, by {kind}; prompts {run.prompts}; times in ms")
    heads, rows = [*_HEADS], [_row(one) for one in run.levels]
    for head, values in _further(run):
        heads.append(head)
        rows = [[*row, value] for row, value in zip(rows, values, strict=True)]
    terminal.columns(heads, rows)
    for one in run.levels:
        for fault, count in one.errors.items():
            print(f"{one.load}: {count} times {fault}: {terminal.printable(one.examples[fault])}")
        if one.cut:
            print(f"{one.load}: {one.cut} requests were cut when it was stopped.")
    for line in run.notes:
        print(line)
    if run.limit is not None:
        print(f"LIMIT is what {run.limit.bandwidth / 1e9:.1f} GB/s of memory allow.")


def _row(one: Level) -> list[Any]:
    return [
        *(str(one.load), one.ok, one.failed, f"{one.requests_per_s:.2f}"),
        f"{one.output_tokens_per_s:.1f}",
        *(_number(one.prompt_tokens), _number(one.completion_tokens)),
        *_of(one.ttft_ms, "p50", "p90", "p99"),
        *_of(one.inter_token_ms, "p50", "p99"),
        *_of(one.total_ms, "p50", "p99"),
    ]


def _further(run: Run) -> Iterator[tuple[str, list[str | None]]]:
    """Yield the columns that not every run has."""
    levels = run.levels
    if any(one.server for one in levels):
        told = [one.server.get("time_to_first_token_ms") for one in levels]
        yield "SERVER'S TTFT", [_of(one, "p50")[0] for one in told]
    if any(one.late_ms for one in levels):
        yield "LATE P99", [_of(one.late_ms, "p99")[0] for one in levels]
    if run.settings.slo:
        yield "WITHIN SLO", [_percent(one.goodput) for one in levels]
    if run.limit is not None:
        yield "OF LIMIT", [_percent(one.of_limit) for one in levels]


def _of(found: Summary | None, *names: str) -> list[str | None]:
    return [None if found is None else f"{getattr(found, name):.1f}" for name in names]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


def show_beside(runs: dict[str, Run]) -> None:
    """Print the loads of several runs, each beside that of the first."""
    terminal.columns(("LOAD", "RUN", *_COMPARED), list(_compared(runs)))
    print(f"In brackets: times as much as {next(iter(runs))}.")


def _compared(runs: dict[str, Run]) -> Iterator[list[str | None]]:
    first = {str(one.load): one for one in next(iter(runs.values())).levels}
    every = dict.fromkeys(str(one.load) for run in runs.values() for one in run.levels)
    for load in every:
        for name, run in runs.items():
            for one in run.levels:
                if str(one.load) == load:
                    base = first.get(load)
                    yield [load, name, *(_beside(one, base, get) for get in _COMPARED.values())]


def _beside(one: Level, base: Level | None, get: Callable[[Level], float | None]) -> str | None:
    value, before = get(one), get(base) if base is not None else None
    if value is None:
        return None
    return f"{value:.1f}" if not before else f"{value:.1f} ({value / before:.2f})"


_COMPARED: dict[str, Callable[[Level], float | None]] = {
    "TOKENS/S": lambda one: one.output_tokens_per_s,
    "REQ/S": lambda one: one.requests_per_s,
    "FAILED": lambda one: one.failed,
    "TTFT P50": lambda one: one.ttft_ms and one.ttft_ms.p50,
    "P99": lambda one: one.ttft_ms and one.ttft_ms.p99,
    "BETWEEN P50": lambda one: one.inter_token_ms and one.inter_token_ms.p50,
    "P99 ": lambda one: one.inter_token_ms and one.inter_token_ms.p99,
}
