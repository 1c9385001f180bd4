"""The limits of a key as headers, by the names that the clients of each API read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from headrace.api.exchange import Call
from headrace.api.problems import ANTHROPIC, Dialect, Headers
from headrace.core.keys import Account, KeyStore, Usage

_KINDS = ("requests", "tokens")
_FIELDS = ("limit", "remaining", "reset")
NAMES = tuple(
    f"x-ratelimit-{name}-{kind}".encode() for kind, name in itertools.product(_KINDS, _FIELDS)
)
"""OpenAI's names, as they are sent."""

_MINUTE_S = 60


def writer(keys: KeyStore | None, call: Call, dialect: Dialect) -> Callable[[], Headers]:
    """Return what returns the headers at the start of an answer: none without limits."""
    if keys is None:
        return tuple

    def write() -> Headers:
        account = keys.account(call.client) if call.client else None
        if account is None or not account.key.limits.any:
            return ()
        return tuple(_headers(account, keys.now(), is_anthropic=dialect is ANTHROPIC))

    return write


def _headers(account: Account, now: float, *, is_anthropic: bool) -> Iterator[tuple[bytes, bytes]]:
    limits = account.key.limits
    usage = account.counts.at(now).usage(limits, now)
    for kind in _KINDS:
        rows = [row for row in usage if row.limit.startswith(kind)]
        if not rows:
            continue
        # Of the minute and the day, the one that will be reached first.
        row = min(rows, key=lambda row: row.left)
        for field, value in zip(_FIELDS, _values(row, now, is_anthropic=is_anthropic), strict=True):
            name = (
                f"anthropic-ratelimit-{kind}-{field}"
                if is_anthropic
                else f"x-ratelimit-{field}-{kind}"
            )
            yield name.encode(), value.encode()


def _values(row: Usage, now: float, *, is_anthropic: bool) -> tuple[str, str, str]:
    if is_anthropic:
        reset = datetime.fromtimestamp(now + row.reset_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    else:
        reset = _duration(row.reset_s)
    return str(row.value), str(row.left), reset


def _duration(seconds: float) -> str:
    """Return a duration as OpenAI writes it: 17ms, 1s, 6m0s, 23h59m12s."""
    if seconds < 1:
        return f"{max(int(seconds * 1000), 0)}ms"
    minutes, rest = divmod(int(seconds), _MINUTE_S)
    hours, minutes = divmod(minutes, _MINUTE_S)
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
