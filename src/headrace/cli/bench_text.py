"""The tables of `headrace bench`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from headrace.cli import terminal

if TYPE_CHECKING:
    from headrace.lab.bench.record import Level, Run, Summary

_HEADS = (
    *("LOAD", "OK", "FAILED", "REQ/S", "TOKENS/S", "PROMPT", "ANSWER", "TTFT P50", "P90", "P99"),
    *("BETWEEN P50", "P99", "TOTAL P50", "P99"),
)


def show(run: Run) -> None:
    """Print a table of the loads, the failures, and notes on them."""
    settings = run.settings
    kind = "requests at once" if settings.loads[0].loop == "closed" else "requests/s"
    service = "its own server" if run.own_server else run.url
    print(f"{settings.model} at {service}, by {kind}; prompts {run.prompts}; times in ms")
    heads, rows = [*_HEADS], [_row(level) for level in run.levels]
    for head, values in _optional(run):
        heads.append(head)
        rows = [[*row, value] for row, value in zip(rows, values, strict=True)]
    terminal.columns(heads, rows)
    for level in run.levels:
        for fault, count in level.errors.items():
            print(
                f"{level.load}: {count} times {fault}: {terminal.printable(level.examples[fault])}"
            )
        if level.cut:
            print(f"{level.load}: {level.cut} requests were cut when it was stopped.")
    for line in run.notes:
        print(line)
    if run.limit is not None:
        print(f"LIMIT is what {run.limit.bandwidth / 1e9:.1f} GB/s of memory allow.")


def _row(level: Level) -> list[Any]:
    return [
        *(str(level.load), level.ok, level.failed, f"{level.requests_per_s:.2f}"),
        f"{level.output_tokens_per_s:.1f}",
        *(_number(level.prompt_tokens), _number(level.completion_tokens)),
        *_of(level.ttft_ms, "p50", "p90", "p99"),
        *_of(level.inter_token_ms, "p50", "p99"),
        *_of(level.total_ms, "p50", "p99"),
    ]


def _optional(run: Run) -> Iterator[tuple[str, list[str | None]]]:
    """Yield the columns that only some runs have."""
    levels = run.levels
    if any(level.server for level in levels):
        summaries = [level.server.get("time_to_first_token_ms") for level in levels]
        yield "SERVER'S TTFT", [_of(summary, "p50")[0] for summary in summaries]
    if any(level.late_ms for level in levels):
        yield "LATE P99", [_of(level.late_ms, "p99")[0] for level in levels]
    if any(level.drafted_tokens for level in levels):
        yield "ACCEPTED", [_percent(_accepted(level)) for level in levels]
    if run.settings.slo:
        yield "WITHIN SLO", [_percent(level.goodput) for level in levels]
    if run.limit is not None:
        yield "OF LIMIT", [_percent(level.of_limit) for level in levels]


def _accepted(level: Level) -> float | None:
    """Return the share of the drafted tokens that the model kept."""
    return level.accepted_tokens / level.drafted_tokens if level.drafted_tokens else None


def _of(summary: Summary | None, *names: str) -> list[str | None]:
    return [None if summary is None else f"{getattr(summary, name):.1f}" for name in names]


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.0f}"


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


def show_beside(runs: dict[str, Run]) -> None:
    """Print the loads of several runs, each compared with that of the first."""
    terminal.columns(("LOAD", "RUN", *_COMPARED), list(_compared(runs)))
    print(f"In brackets: times as much as {next(iter(runs))}.")


def _compared(runs: dict[str, Run]) -> Iterator[list[str | None]]:
    first = {str(level.load): level for level in next(iter(runs.values())).levels}
    every = dict.fromkeys(str(level.load) for run in runs.values() for level in run.levels)
    for load in every:
        for name, run in runs.items():
            for level in run.levels:
                if str(level.load) == load:
                    base = first.get(load)
                    yield [load, name, *(_beside(level, base, get) for get in _COMPARED.values())]


def _beside(level: Level, base: Level | None, get: Callable[[Level], float | None]) -> str | None:
    value, before = get(level), get(base) if base is not None else None
    if value is None:
        return None
    return f"{value:.1f}" if not before else f"{value:.1f} ({value / before:.2f})"


_COMPARED: dict[str, Callable[[Level], float | None]] = {
    "TOKENS/S": lambda level: level.output_tokens_per_s,
    "REQ/S": lambda level: level.requests_per_s,
    "FAILED": lambda level: level.failed,
    "TTFT P50": lambda level: level.ttft_ms and level.ttft_ms.p50,
    "P99": lambda level: level.ttft_ms and level.ttft_ms.p99,
    "BETWEEN P50": lambda level: level.inter_token_ms and level.inter_token_ms.p50,
    "P99 ": lambda level: level.inter_token_ms and level.inter_token_ms.p99,
}
