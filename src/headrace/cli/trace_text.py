"""How records of requests are shown: in rows and columns, and one in full."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast

import msgspec

from headrace.cli import terminal
from headrace.cli.ps import span
from headrace.core.metrics import DeviceUse, InferenceMetrics
from headrace.core.record import RequestRecord

if TYPE_CHECKING:
    from headrace.cli.trace_replay import Replayed
    from headrace.telemetry.trace_read import ModelStats

Row = Sequence[Any]

HEADS = ("ID", "TIME", "MODEL", "KEY", "TOKENS", "TTFT", "TOK/S", "TOTAL", "STATUS")

_TEXTS = {"ID", "TIME", "MODEL", "KEY", "STATUS", "FIGURE", "DAY", "OPERATION"}
_SHORT_ID = 12
_LONGEST_NAME = 48
_FIGURES = {
    "queue_ms": "queue",
    "time_to_first_token_ms": "ttft",
    "time_per_output_token_ms": "per token",
    "tokens_per_second": "tokens/s",
    "total_ms": "total",
}


def table(heads: Sequence[str], rows: Iterable[Row]) -> Iterator[str]:
    """Yield the lines of aligned columns, figures to the right; None is a dash."""
    lines = [list(map(_cell, row)) for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (
            cell.ljust(width) if head in _TEXTS else cell.rjust(width)
            for head, cell, width in zip(heads, line, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()


def _cell(value: object) -> str:
    return "-" if value is None else terminal.printable(" ".join(str(value).split()))


def row(record: RequestRecord) -> Row:
    """Return what `HEADS` names."""
    metrics = record.metrics
    # The ids of several prompts in one request differ in their ends alone.
    name = record.id if "." in record.id else record.id[:_SHORT_ID]
    return (
        name,
        datetime.fromtimestamp(record.time).astimezone().strftime("%m-%d %H:%M:%S"),
        _short(record.model),
        record.client[:8] or None,
        tokens(metrics),
        took(metrics.time_to_first_token_ms),
        rate(metrics.decode_tokens_per_second),
        took(metrics.total_ms),
        f"{record.outcome} {record.error}",
    )


def counts(one: ModelStats, outcomes: Iterable[str]) -> Row:
    """Return the name of a model, its requests, how many ended in each way, and its tokens."""
    ended = (one.outcomes.get(name, 0) for name in outcomes)
    return _short(one.model), one.requests, *ended, one.prompt_tokens, one.completion_tokens


def percentiles(one: ModelStats) -> Iterator[Row]:
    """Yield a row for each figure of a model."""
    for name, of in one.figures.items():
        shown = rate if name == "tokens_per_second" else took
        values = map(shown, (of.p50, of.p90, of.p99))
        yield _short(one.model), _FIGURES[name], of.count, *values


def _short(model: str) -> str | None:
    # What was asked for and is not there may have any length.
    return (model if len(model) <= _LONGEST_NAME else f"{model[: _LONGEST_NAME - 3]}...") or None


def facts(record: RequestRecord) -> list[tuple[str, Any]]:
    """Return what there is to say of a request, by name, but for its content."""
    when = datetime.fromtimestamp(record.time).astimezone()
    metrics, usage = record.metrics, record.metrics.usage
    said = {
        "id": record.id,
        "trace": record.trace_id,
        "time": when.isoformat(" ", "milliseconds"),
        "operation": record.operation,
        "model": record.model,
        "key": record.client,
        "status": f"{record.outcome} {record.error}".rstrip(),
        "message": record.message,
        "finish": ", ".join(record.finish_reasons),
        "engine": metrics.engine,
        "worker": metrics.worker,
        "prompt": f"{usage.prompt_tokens} tokens, {usage.cached_tokens} cached",
        "completion": f"{usage.completion_tokens} tokens",
        "reasoning": usage.reasoning_tokens and f"{usage.reasoning_tokens} tokens of it",
        **_durations(metrics),
        "continued": metrics.continuations and f"{metrics.continuations}, {metrics.continued}",
        **{one.name: _use(one) for one in metrics.devices},
        **{f"  {name}": _plain(value) for name, value in record.parameters.items()},
    }
    return [(name, _cell(fact)) for name, fact in said.items() if fact not in (None, "", 0)]


def _durations(metrics: InferenceMetrics) -> dict[str, str | None]:
    gaps = metrics.inter_token_ms
    return {
        "queue": took(metrics.queue_ms),
        "load": took(metrics.load_ms or None),
        "ttft": took(metrics.time_to_first_token_ms),
        "prefill": _with_rate(metrics.prefill_ms, metrics.prefill_tokens_per_second),
        "per token": _with_rate(metrics.time_per_output_token_ms, metrics.decode_tokens_per_second),
        "gaps": gaps and f"p50 {took(gaps.p50)}, p99 {took(gaps.p99)}, max {took(gaps.max)}",
        "total": took(metrics.total_ms),
    }


def _use(device: DeviceUse) -> str:
    mean, peak = terminal.size(device.worker_mean), terminal.size(device.worker_peak)
    said = f"memory {mean}, peak {peak}"
    if device.busy_mean is not None and device.busy_peak is not None:
        said += f"; busy {device.busy_mean:.0%}, peak {device.busy_peak:.0%}"
    return said if device.joules is None else f"{said}; {device.joules:.1f} J"


def asked(content: Any) -> str:
    """Return what was asked, as one reads it: the turns of a conversation, or as it is."""
    turns = cast("list[Any]", content) if isinstance(content, list) else [content]
    return terminal.printable("\n".join(map(_turn, turns)))


def _turn(one: Any) -> str:
    if isinstance(one, dict) and "role" in one:
        turn = cast("dict[str, Any]", one)
        return f"{turn['role']}: {turn.get('content', '')}"
    return _plain(one)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def tokens(metrics: InferenceMetrics) -> str:
    """Return how many tokens were asked and answered: `120+64`."""
    return f"{metrics.usage.prompt_tokens}+{metrics.usage.completion_tokens}"


def took(ms: float | None) -> str | None:
    """Return a duration in three digits, or as people say it."""
    if ms is None:
        return None
    if ms < 1000:
        return f"{ms:.3g} ms" if ms < 99.5 else f"{ms:.0f} ms"
    return f"{ms / 1000:.3g} s" if ms < 99_950 else span(ms / 1000)


def rate(value: float | None) -> str | None:
    """Return tokens per second."""
    return None if value is None else f"{value:.1f}"


def _with_rate(ms: float | None, per_second: float | None) -> str | None:
    speed = f", {rate(per_second)} tokens/s" if per_second is not None else ""
    return None if ms is None else f"{took(ms)}{speed}"


def comparison(record: RequestRecord, done: Replayed) -> list[Row]:
    """Return rows of a figure, what it was and what it is now."""
    then, now = record.metrics, done.metrics
    speeds = then.decode_tokens_per_second, now.decode_tokens_per_second
    firsts = then.time_to_first_token_ms, now.time_to_first_token_ms
    return [
        ("model", record.model, done.model),
        ("ttft", *map(took, firsts)),
        ("tokens/s", *map(rate, speeds)),
        ("total", took(then.total_ms), took(now.total_ms)),
        ("tokens", tokens(then), tokens(now)),
        ("finish", *(", ".join(one.finish_reasons) or None for one in (record, done))),
    ]
