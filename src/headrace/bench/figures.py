"""Folds the requests of a load into its figures, and the loads of a run into its record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from headrace.bench.answer import Row
from headrace.bench.settings import Load, Settings
from headrace.core.model import ModelFile
from headrace.tune import limits

SCHEMA = 1
_SERVER = ("queue_ms", "time_to_first_token_ms", "time_per_output_token_ms", "total_ms")


class Summary(msgspec.Struct, frozen=True):
    """How values are spread; percentiles by nearest rank."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one load. Latencies are of the requests that went well, in milliseconds.

    `seconds` go from the first request to the end of the last. `sent` counts all requests but
    those that were `cut` by the one who stopped the run; `throttled` are the failures with 429.
    Tokens/s count what well requests got. `gap_ms` are all times between two chunks with text.
    `server` are figures that a Headrace told of the same requests. `goodput` is the share of all
    requests that went well within the `slo`. `running` is how many ran at once, on average.
    `client_busy` is the share of one core that the client itself took. `of_limit` is the share
    of the output tokens/s that the machine's memory allows.
    """

    load: Load
    seconds: float
    sent: int
    ok: int
    failed: int
    throttled: int
    cut: int = 0
    errors: dict[str, int] = {}
    examples: dict[str, str] = {}
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float | None
    prompt_tokens: float | None
    completion_tokens: float
    cached_tokens: float
    short: int
    counted_by: str
    running: float
    client_busy: float = 0.0
    ttft_ms: Summary | None = None
    inter_token_ms: Summary | None = None
    gap_ms: Summary | None = None
    total_ms: Summary | None = None
    late_ms: Summary | None = None
    server: dict[str, Summary] = {}
    goodput: float | None = None
    of_limit: float | None = None
    rows: tuple[Row, ...] | None = None


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One run of `headrace bench`, as its JSON. `machine` is the client's."""

    schema: int = SCHEMA
    headrace: str
    began: str
    url: str
    own_server: bool
    settings: Settings
    prompts: str
    machine: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    limit: Limit | None = None
    levels: tuple[Level, ...] = ()


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """What is read for each token, in bytes, and the bytes/s that the memory can be read with."""

    weights: int
    cache_per_token: int | None = None
    bandwidth: float

    def tokens_per_s(self, streams: float, tokens: float) -> float:
        """Return the most output tokens/s for `streams` at once, with so many tokens each."""
        file = ModelFile(
            path="", format="none", size=self.weights, kv_bytes_per_token=self.cache_per_token
        )
        return limits.limit(file, max(1, round(streams)), tokens, self.bandwidth) or 0.0


def summary(values: Iterable[float | None]) -> Summary | None:
    """Fold values; None where there are none."""
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        return None
    p50, p90, p99 = (_percentile(ordered, percent) for percent in (50, 90, 99))
    return Summary(sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


def level(
    load: Load,
    rows: Sequence[Row],
    seconds: float,
    *,
    slo: dict[str, float],
    cut: int = 0,
    client_busy: float = 0.0,
) -> Level:
    """Fold the rows of a load that took so many seconds."""
    well = [row for row in rows if not row.fault]
    errors = Counter(row.fault for row in rows if row.fault)
    tokens = sum(row.completion_tokens for row in well)
    prompts = [row.prompt_tokens for row in well if row.prompt_tokens is not None]
    told = bool(well) and len(prompts) == len(well)
    return Level(
        load=load,
        seconds=seconds,
        sent=len(rows),
        ok=len(well),
        failed=len(rows) - len(well),
        throttled=errors["http 429"],
        cut=cut,
        errors=dict(errors.most_common()),
        examples={row.fault: row.detail for row in reversed(rows) if row.fault},
        requests_per_s=_ratio(len(well), seconds),
        output_tokens_per_s=_ratio(tokens, seconds),
        total_tokens_per_s=_ratio(tokens + sum(prompts), seconds) if told else None,
        prompt_tokens=_ratio(sum(prompts), len(prompts)) if told else None,
        completion_tokens=_ratio(tokens, len(well)),
        cached_tokens=_ratio(sum(row.cached_tokens for row in well), len(well)),
        short=sum(row.completion_tokens < row.wanted_tokens for row in well),
        counted_by=_counted_by(well),
        running=_ratio(sum(row.total_ms - row.late_ms for row in rows) / 1e3, seconds),
        client_busy=client_busy,
        ttft_ms=summary(row.ttft_ms for row in well),
        inter_token_ms=summary(row.inter_token_ms for row in well),
        gap_ms=summary(gap for row in well for gap in row.gaps_ms),
        total_ms=summary(row.total_ms for row in well),
        late_ms=summary(row.late_ms for row in rows) if load.loop == "open" else None,
        server=_server(well),
        goodput=_ratio(sum(_within(row, slo) for row in well), len(rows)) if slo else None,
        rows=tuple(rows),
    )


def of_limit(one: Level, limit: Limit) -> Level:
    """Add what share of the limit was reached."""
    tokens = (one.prompt_tokens or 0) + one.completion_tokens / 2
    most = limit.tokens_per_s(one.running, tokens)
    return msgspec.structs.replace(one, of_limit=_ratio(one.output_tokens_per_s, most))


def _server(well: Sequence[Row]) -> dict[str, Summary]:
    found = {name: summary(row.metrics.get(name) for row in well) for name in _SERVER}
    return {name: one for name, one in found.items() if one is not None}


def _counted_by(well: Sequence[Row]) -> str:
    told = sum(row.usage for row in well)
    return "usage" if well and told == len(well) else "chunks" if not told else "usage and chunks"


def _within(row: Row, slo: dict[str, float]) -> bool:
    # An answer of one token has no time between tokens, and so none that is too long.
    found = {name: getattr(row, name) for name in slo}
    return all(value is None or value <= slo[name] for name, value in found.items())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _percentile(ordered: Sequence[float], percent: int) -> float:
    # Nearest rank: the smallest value that at least `percent` % of the values do not exceed.
    return ordered[-(-len(ordered) * percent // 100) - 1]
