"""/admin/traces and /admin/usage: what is kept of requests that have ended."""

from __future__ import annotations

import asyncio
from typing import Annotated, cast, get_args

import msgspec
from msgspec import Meta
from msgspec.structs import asdict, replace

from headrace.api.exchange import Exchange, Service
from headrace.api.overview import observer
from headrace.api.query import query
from headrace.core.errors import InvalidRequest
from headrace.core.record import (
    Amounts,
    RequestRecord,
    TraceFilter,
    UsageFilter,
    UsageGroup,
    UsageRow,
)

MAX_TRACES = 500
MAX_SKIPPED = 100_000
_GROUPS: tuple[UsageGroup, ...] = get_args(UsageGroup)
_DAY = r"^(\d{4}-\d{2}-\d{2})?$"
# Reading uses a thread and a core: however many clients want to, one at a time does.
_READING = asyncio.Semaphore(1)


class TraceQuery(TraceFilter, frozen=True, kw_only=True):
    """Filters of traces, and which of the matching ones, newest first."""

    limit: Annotated[int, Meta(ge=1, le=MAX_TRACES)] = 50
    skip: Annotated[int, Meta(ge=0, le=MAX_SKIPPED)] = 0


class TraceList(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that have ended, newest first, without their steps, parameters and content."""

    data: list[RequestRecord]
    has_more: bool


class UsageQuery(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`by` is some of day, model, key, operation and priority; days are YYYY-MM-DD, UTC."""

    by: str = "day,model"
    since: Annotated[str, Meta(pattern=_DAY)] = ""
    until: Annotated[str, Meta(pattern=_DAY)] = ""
    model: str | None = None
    key: str | None = None


class UsageReport(msgspec.Struct, frozen=True, kw_only=True):
    """The usage of each group, in order, and their sum."""

    by: list[UsageGroup]
    rows: list[UsageRow]
    total: Amounts


async def traces(service: Service, exchange: Exchange) -> None:
    """List requests that have ended, newest first, as `headrace trace ls` does."""
    fields = asdict(query(exchange.scope, TraceQuery))
    skip, limit = fields.pop("skip"), fields.pop("limit")
    async with _READING:
        records = await asyncio.to_thread(
            observer(service).traces, TraceFilter(**fields), skip, limit + 1
        )
    await exchange.answer(
        TraceList(data=[*map(_bare, records[:limit])], has_more=len(records) > limit)
    )


async def trace(service: Service, exchange: Exchange) -> None:
    """Show a request that has ended: its figures, parameters, steps and, if kept, its content."""
    name: str = exchange.scope["path_params"]["id"]
    async with _READING:
        record = await asyncio.to_thread(observer(service).trace, name)
    await exchange.answer(record)


async def usage(service: Service, exchange: Exchange) -> None:
    """Show requests, tokens, seconds and joules by day, model, key, operation or priority."""
    given = query(exchange.scope, UsageQuery)
    by = _groups(given.by)
    wanted = UsageFilter(since=given.since, until=given.until, model=given.model, key=given.key)
    async with _READING:
        rows = await asyncio.to_thread(observer(service).usage, by, wanted)
    total = Amounts()
    for row in rows:
        total.add(row.amounts)
    await exchange.answer(UsageReport(by=by, rows=[*rows], total=total))


def _groups(text: str) -> list[UsageGroup]:
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= set(_GROUPS) or len(set(names)) < len(names):
        raise InvalidRequest(
            f"by: expected some of {', '.join(_GROUPS)}, each once, separated by commas.",
            param="by",
        )
    return cast("list[UsageGroup]", names)


def _bare(record: RequestRecord) -> RequestRecord:
    return replace(record, spans=(), parameters={}, content=None)
