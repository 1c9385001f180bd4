"""API keys that are kept in a database: what each may do, its limits, and what it has used.

A minute and a day are those of the clock, in UTC, as their number since 1970.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple, Protocol

import msgspec
from msgspec import UNSET, Meta, UnsetType
from msgspec.structs import replace

from headrace.core.errors import RateLimited

Scope = Literal["inference", "admin"]
"""What a key may do: use models, or also manage them, and keys."""

MAX_KEYS = 10_000
"""Keys of a database that are not revoked."""

MAX_ALLOWED = 256
"""Names of models that a key may be limited to."""

MINUTE_S, DAY_S = 60, 86400
MINUTES_AHEAD, DAYS_AHEAD = 5, 1
"""How far a counted minute or day may be ahead of the clock, which was set back, and still counts.
Beyond it the clock was wrong before, and what was counted is charged to the present."""

_ID_DIGITS = 16
_MOST = (1 << 53) - 1

Limit = Annotated[int, Meta(ge=1, le=_MOST)]
KeyName = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]
Models = Annotated[
    tuple[Annotated[str, Meta(min_length=1, max_length=512)], ...], Meta(max_length=MAX_ALLOWED)
]


class Limits(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """The limits of a key; None is without limit. `concurrent` is of requests that run or wait."""

    requests_per_minute: Limit | None = None
    requests_per_day: Limit | None = None
    tokens_per_minute: Limit | None = None
    tokens_per_day: Limit | None = None
    concurrent: Limit | None = None

    @property
    def any(self) -> bool:
        """Whether there is a limit."""
        return any(getattr(self, name) is not None for name in self.__struct_fields__)

    @property
    def of_tokens(self) -> bool:
        """Whether tokens are limited."""
        return self.tokens_per_minute is not None or self.tokens_per_day is not None


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """A key, without itself. Times are Unix seconds; `revoked` is None while it may be used.

    `id` is the beginning of the SHA-256 of the key. `models` are those that it may use, by name or
    alias; none are all.
    """

    id: str
    name: str
    scope: Scope = "inference"
    limits: Limits = Limits()
    models: tuple[str, ...] = ()
    created: int
    last_used: int | None = None
    revoked: int | None = None


class NewKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key to be created."""

    name: KeyName
    scope: Scope = "inference"
    limits: Limits = Limits()
    models: Models = ()


class KeyChange(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A change of a key; `limits` and `models` replace what there was, what is left out stays."""

    name: KeyName | UnsetType = UNSET
    limits: Limits | UnsetType = UNSET
    models: Models | UnsetType = UNSET


class Usage(NamedTuple):
    """What is used of a limit: its name, value, what is left, and when it begins again."""

    limit: str
    value: int
    left: int
    reset_s: float


class Counts(msgspec.Struct, frozen=True):
    """What a key has used in a minute and in a day, and how many of its requests run.

    Tokens include those that are reserved for requests that run.
    """

    minute: int = 0
    minute_requests: int = 0
    minute_tokens: int = 0
    day: int = 0
    day_requests: int = 0
    day_tokens: int = 0
    running: int = 0

    def at(self, now: float) -> Counts:
        """Return the counts at a time: those of a minute or day that is over are 0."""
        minute, day = int(now // MINUTE_S), int(now // DAY_S)
        counts = self
        if minute > counts.minute:
            counts = replace(counts, minute_requests=0, minute_tokens=0)
        if day > counts.day:
            counts = replace(counts, day_requests=0, day_tokens=0)
        return replace(
            counts,
            minute=_window(self.minute, minute, MINUTES_AHEAD),
            day=_window(self.day, day, DAYS_AHEAD),
        )

    def charged(self, requests: int, tokens: int, running: int = 0) -> Counts:
        """Return the counts with more requests and tokens."""
        return Counts(
            self.minute,
            self.minute_requests + requests,
            self.minute_tokens + tokens,
            self.day,
            self.day_requests + requests,
            self.day_tokens + tokens,
            self.running + running,
        )

    def usage(self, limits: Limits, now: float) -> Sequence[Usage]:
        """Return what is used of each limit of requests and tokens, those of requests first."""
        minute_s = (self.minute + 1) * MINUTE_S - now
        day_s = (self.day + 1) * DAY_S - now
        rows = (
            ("requests_per_minute", self.minute_requests, minute_s),
            ("requests_per_day", self.day_requests, day_s),
            ("tokens_per_minute", self.minute_tokens, minute_s),
            ("tokens_per_day", self.day_tokens, day_s),
        )
        return [
            Usage(name, value, max(value - used, 0), wait_s)
            for name, used, wait_s in rows
            if (value := getattr(limits, name)) is not None
        ]

    def tokens_left(self, limits: Limits, now: float) -> int:
        """Return how many tokens are left by all limits; a large number without one."""
        rows = self.usage(limits, now)
        return min((row.left for row in rows if row.limit.startswith("tokens")), default=_MOST)

    def check(self, limits: Limits, tokens: int, now: float) -> None:
        """Check that one more request with so many tokens is within the limits.

        Raises:
            RateLimited: it is not; `retry_after_s` is when it may be.
        """
        if limits.concurrent is not None and self.running >= limits.concurrent:
            raise _limited("concurrent", limits.concurrent, 1.0)
        for row in self.usage(limits, now):
            needed = 1 if row.limit.startswith("requests") else tokens
            if needed > row.value:
                raise RateLimited(
                    f"The request may take {needed} tokens, and the limit of this key "
                    f"({row.limit}) is {row.value}: shorten it, or lower max_tokens.",
                    detail=row.limit,
                )
            if needed > row.left:
                raise _limited(row.limit, row.value, row.reset_s)


class Account(msgspec.Struct):
    """A key as it is known here, with its latest counts."""

    key: Key
    counts: Counts = Counts()

    @property
    def is_free(self) -> bool:
        """Whether neither limits nor models are to be checked."""
        return not (self.key.models or self.key.limits.any)

    def allows(self, names: Sequence[str]) -> bool:
        """Whether a model with these names may be used."""
        return not self.key.models or any(name in self.key.models for name in names)


class KeyStore(Protocol):
    """The keys of a database, as the API uses them.

    Every method raises DatabaseDown if the database is needed and cannot be reached.
    """

    @property
    def required(self) -> bool:
        """Whether requests need a key: the database has some, or its address was configured."""
        ...

    @property
    def known(self) -> bool:
        """Whether the keys have been read."""
        ...

    def account(self, id: str) -> Account | None:
        """Return a key by its id, as it is known here, without waiting; None if there is none."""
        ...

    async def find(self, digest: str) -> Account | None:
        """Return the key with this SHA-256 (hex); None if there is none, or it was revoked."""
        ...

    async def reserve(self, id: str, request: str, least: int, most: int) -> int:
        """Charge a request with tokens, as many of `most` as are left; return how many.

        What the request really takes is settled when its record comes.

        Raises:
            RateLimited: not even `least` are left, or another limit is reached.
            Unauthorized: the key was revoked.
        """
        ...

    def now(self) -> float:
        """Return Unix seconds by the clock that counts."""
        ...

    async def list(self) -> Sequence[Account]:
        """Return all keys, also those that were revoked, oldest first."""
        ...

    async def create(self, new: NewKey, by: str) -> tuple[str, Key]:
        """Create a key; return it in plain, which is kept nowhere, and what is kept.

        `by` is the id of the key that does so, for the log; empty without keys.
        """
        ...

    async def change(self, id: str, change: KeyChange, by: str) -> Key:
        """Change a key.

        Raises:
            UnknownKey: there is none, or it was revoked.
        """
        ...

    async def revoke(self, id: str, by: str) -> Key:
        """Revoke a key for good. Requests that run come to their end.

        Raises:
            UnknownKey: there is none.
        """
        ...


def new_key() -> tuple[str, str]:
    """Return an unguessable key, and its SHA-256."""
    key = f"hr-{secrets.token_urlsafe(32)}"
    return key, digest_of(key.encode())


def digest_of(key: bytes) -> str:
    """Return the SHA-256 of a key in hex."""
    return hashlib.sha256(key).hexdigest()


def id_of(digest: str) -> str:
    """Return the id of the key with this SHA-256."""
    return digest[:_ID_DIGITS]


def _window(counted: int, now: int, ahead: int) -> int:
    return counted if 0 <= counted - now <= ahead else now


def _limited(limit: str, value: int, wait_s: float) -> RateLimited:
    name = limit.replace("_", " ")
    if limit == "concurrent":
        name = "concurrent requests"
    if value == 1:
        name = name.replace("requests", "request").replace("tokens", "token")
    return RateLimited(
        f"The limit of this key is reached: {value} {name}.",
        detail=limit,
        retry_after_s=max(wait_s, 0.001),
    )
