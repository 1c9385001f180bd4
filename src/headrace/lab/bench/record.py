"""The figures of a load, from its requests, and the record of a run, from its loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from headrace import roofline
from headrace.core.errors import ConfigError
from headrace.core.measurement import Curve, Point
from headrace.core.model import ModelFile
from headrace.engines.measured import machine_id
from headrace.lab.bench.answer import Row
from headrace.lab.bench.settings import Load, Settings
from headrace.lab.figures import Summary, ratio, summary

SCHEMA = 1
_SERVER = ("queue_ms", "time_to_first_token_ms", "time_per_output_token_ms", "total_ms")


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one load. Latencies are of the requests that succeeded, in milliseconds.

    `seconds` are from the first request to the end of the last. `sent` counts all requests but
    those that were `cut` when the run was stopped; `throttled` are the failures with 429.
    Tokens/s count successful requests only. `gap_ms` are all times between two chunks with text.
    `server` are the figures of a Headrace service for the same requests. `goodput` is the share of
    all requests that succeeded within the `slo`. `running` is the mean number of concurrent
    requests. `drafted_tokens` are those of speculation in all answers, `accepted_tokens` those that
    the model kept. `client_busy` is the share of one core that the client used. `of_limit` is the
    share of the output tokens/s that the machine's memory allows.
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
    drafted_tokens: int = 0
    accepted_tokens: int = 0
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
    """The bytes that are read for each token, and the bandwidth of the memory in bytes/s."""

    weights: int
    cache_per_token: int | None = None
    bandwidth: float

    def tokens_per_s(self, streams: float, tokens: float) -> float:
        """Return the most output tokens/s of `streams` at once, with `tokens` in each cache."""
        file = ModelFile(
            path="", format="none", size=self.weights, kv_bytes_per_token=self.cache_per_token
        )
        return roofline.limit(file, max(1, round(streams)), tokens, self.bandwidth) or 0.0


def level(
    load: Load,
    rows: Sequence[Row],
    seconds: float,
    *,
    slo: dict[str, float],
    cut: int = 0,
    client_busy: float = 0.0,
) -> Level:
    """Return the figures of a load that took `seconds`."""
    good = [row for row in rows if not row.fault]
    errors = Counter(row.fault for row in rows if row.fault)
    tokens = sum(row.completion_tokens for row in good)
    prompts = [row.prompt_tokens for row in good if row.prompt_tokens is not None]
    counted = bool(good) and len(prompts) == len(good)
    return Level(
        load=load,
        seconds=seconds,
        sent=len(rows),
        ok=len(good),
        failed=len(rows) - len(good),
        throttled=errors["http 429"],
        cut=cut,
        errors=dict(errors.most_common()),
        examples={row.fault: row.detail for row in reversed(rows) if row.fault},
        requests_per_s=ratio(len(good), seconds),
        output_tokens_per_s=ratio(tokens, seconds),
        total_tokens_per_s=ratio(tokens + sum(prompts), seconds) if counted else None,
        prompt_tokens=ratio(sum(prompts), len(prompts)) if counted else None,
        completion_tokens=ratio(tokens, len(good)),
        drafted_tokens=sum(row.drafted_tokens for row in good),
        accepted_tokens=sum(row.accepted_tokens for row in good),
        cached_tokens=ratio(sum(row.cached_tokens for row in good), len(good)),
        short=sum(row.completion_tokens < row.wanted_tokens for row in good),
        counted_by=_counted_by(good),
        running=ratio(sum(row.total_ms - row.late_ms for row in rows) / 1e3, seconds),
        client_busy=client_busy,
        ttft_ms=summary(row.ttft_ms for row in good),
        inter_token_ms=summary(row.inter_token_ms for row in good),
        gap_ms=summary(gap for row in good for gap in row.gaps_ms),
        total_ms=summary(row.total_ms for row in good),
        late_ms=summary(row.late_ms for row in rows) if load.loop == "open" else None,
        server=_server(good),
        goodput=ratio(sum(_within(row, slo) for row in good), len(rows)) if slo else None,
        rows=tuple(rows),
    )


def of_limit(level: Level, limit: Limit) -> Level:
    """Return the level with its share of the limit."""
    tokens = (level.prompt_tokens or 0) + level.completion_tokens / 2
    allowed = limit.tokens_per_s(level.running, tokens)
    return msgspec.structs.replace(level, of_limit=ratio(level.output_tokens_per_s, allowed))


def curve(run: Run) -> Curve:
    """Return the figures of a run as points to be plotted."""
    own = f"{run.settings.model}, a server of its own" if run.own_server else run.url
    return Curve(
        kind="bench",
        model=run.settings.model,
        title=own,
        time=run.began,
        machine=machine_id(),
        points=tuple(map(_point, run.levels)),
    )


def _point(level: Level) -> Point:
    load, first, between = level.load, level.ttft_ms, level.inter_token_ms
    unit = "requests/s" if load.loop == "open" else "client" if load.value == 1 else "clients"
    return Point(
        load=f"{load.value:g} {unit}",
        tokens_per_s=level.output_tokens_per_s,
        first_token_p50_ms=first and first.p50,
        first_token_p99_ms=first and first.p99,
        between_p50_ms=between and between.p50,
        between_p99_ms=between and between.p99,
    )


def without_rows(run: Run) -> Run:
    """Return the run without its single requests, which can be many."""
    levels = tuple(msgspec.structs.replace(level, rows=None) for level in run.levels)
    return msgspec.structs.replace(run, levels=levels)


def read(path: Path) -> Run:
    """Read the record of a run.

    Raises:
        ConfigError: the file is not one.
    """
    try:
        run = msgspec.json.decode(path.read_bytes(), type=Run)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is no record of `headrace bench`: {error}.") from None
    if run.schema != SCHEMA:
        raise ConfigError(f"{path} has schema {run.schema}; this is {SCHEMA}.")
    return run


def _server(good: Sequence[Row]) -> dict[str, Summary]:
    figures = {name: summary(row.metrics.get(name) for row in good) for name in _SERVER}
    return {name: values for name, values in figures.items() if values is not None}


def _counted_by(good: Sequence[Row]) -> str:
    exact = sum(row.usage for row in good)
    return "usage" if good and exact == len(good) else "chunks" if not exact else "usage and chunks"


def _within(row: Row, slo: dict[str, float]) -> bool:
    # An answer of one token has no time between tokens; that is within the limit.
    values = {name: getattr(row, name) for name in slo}
    return all(value is None or value <= slo[name] for name, value in values.items())
