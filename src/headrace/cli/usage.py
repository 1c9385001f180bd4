"""`headrace usage`: what was used, by day, model and key."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli import terminal
from headrace.cli.common import Common
from headrace.cli.trace_text import table
from headrace.core.errors import ConfigError

if TYPE_CHECKING:
    from headrace.telemetry.usage import Amounts

_FIGURES = {
    "REQUESTS": "requests",
    "FAILED": "failed",
    "REFUSED": "refused",
    "CANCELLED": "cancelled",
    "PROMPT": "prompt_tokens",
    "CACHED": "cached_tokens",
    "COMPLETION": "completion_tokens",
    "REASONING": "reasoning_tokens",
    "SECONDS": "seconds",
    "JOULES": "joules",
}


def usage(
    common: Common,
    by: Annotated[
        str, typer.Option(metavar="WHAT,...", help="Any of day, model, key, operation.")
    ] = "day,model",
    since: Annotated[
        str, typer.Option(metavar="DAY", help="From 2026-01-31 on, or 7d: a week with today.")
    ] = "",
    until: Annotated[str, typer.Option(metavar="DAY", help="The last day of all.")] = "",
    model: Annotated[str | None, typer.Option(help="Of this model only.")] = None,
    key: Annotated[str | None, typer.Option(help="Of the key with this id; - is none.")] = None,
) -> None:
    """Tell tokens, requests, seconds of engines and joules; days are those of UTC.

    Whether a service runs or not; what it has counted in the last seconds may not be there yet.
    """
    from headrace.telemetry import usage as counted

    groups = _groups(by, counted.GROUPS)
    first, last = _day(since, "--since"), _day(until, "--until")
    path = common.settings().config.home / counted.FILE
    lines = counted.read(path, groups, since=first, until=last, model=model, key=key)
    total = counted.total(lines)
    if common.as_json:
        told = [line.group | _named(line.amounts) for line in lines]
        asked = {"since": first or None, "until": last or None, "by": groups}
        terminal.print_json({**asked, "rows": told, "total": _named(total)})
    else:
        heads = (*(name.upper() for name in groups), *_FIGURES)
        sums = ("total", *[""] * (len(groups) - 1), *_named(total).values())
        rows = [(*line.group.values(), *_named(line.amounts).values()) for line in lines]
        for line in table(heads, [_shown(row) for row in (*rows, sums)]):
            print(line)


def _groups(by: str, known: Collection[str]) -> list[str]:
    wanted = list(dict.fromkeys(word.strip().lower() for word in by.split(",") if word.strip()))
    if not wanted or set(wanted) - set(known):
        raise ConfigError(f"flag --by: {by!r} is not some of {', '.join(known)}.")
    return wanted


def _day(text: str, flag: str) -> str:
    """Return YYYY-MM-DD; `7d` is six days before today, so that today is the seventh."""
    if not text:
        return ""
    try:
        if days := re.fullmatch(r"([1-9]\d{0,5})d", text):
            return str(datetime.now(UTC).date() - timedelta(int(days[1]) - 1))
        return str(date.fromisoformat(text))
    except (ValueError, OverflowError):
        raise ConfigError(f"flag {flag}: {text!r} is no day like 2026-01-31, or 7d.") from None


def _named(amounts: Amounts) -> dict[str, Any]:
    found = {name: getattr(amounts, name) for name in _FIGURES.values()}
    known = amounts.joules is not None
    return found | {
        "seconds": round(amounts.seconds, 3),
        "joules": round(amounts.joules or 0.0, 1) if known else None,
    }


def _shown(row: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(f"{cell:.1f}" if isinstance(cell, float) else cell for cell in row)
