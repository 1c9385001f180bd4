"""KeyBook: the tables of the keys, their counts, and the services that count."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET
from msgspec.structs import asdict

from headrace.core.errors import (
    ConfigError,
    InvalidRequest,
    RateLimited,
    Unauthorized,
    UnknownKey,
)
from headrace.core.keys import (
    DAY_S,
    DAYS_AHEAD,
    MAX_KEYS,
    MINUTE_S,
    MINUTES_AHEAD,
    Account,
    Counts,
    Key,
    KeyChange,
    Limits,
    NewKey,
    id_of,
    new_key,
)
from headrace.keys.database import Database, SqliteDatabase

_log = logging.getLogger("headrace.keys")
_VERSION = 1
_TRIES = 3
_AHEAD = {"minute": MINUTES_AHEAD, "day": DAYS_AHEAD}
_LIMITS = Limits.__struct_fields__
_COUNTS = Counts.__struct_fields__
_KEY = ("id", "hash", "name", "scope", "models", "created", "last_used", "revoked")
_COLUMNS = ", ".join((*_KEY, *_LIMITS, *_COUNTS))
_TABLES = (
    "CREATE TABLE headrace_meta (name TEXT PRIMARY KEY, value BIGINT NOT NULL)",
    f"""CREATE TABLE headrace_keys (id TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL, scope TEXT NOT NULL, models TEXT NOT NULL, created BIGINT NOT NULL,
    last_used BIGINT, revoked BIGINT, {", ".join(f"{name} BIGINT" for name in _LIMITS)},
    {", ".join(f"{name} BIGINT NOT NULL DEFAULT 0" for name in _COUNTS)})""",
    "CREATE TABLE headrace_services (id TEXT PRIMARY KEY, beats BIGINT NOT NULL)",
    """CREATE TABLE headrace_holds (service TEXT NOT NULL, id TEXT NOT NULL,
    running BIGINT NOT NULL, PRIMARY KEY (service, id))""",
    """CREATE TABLE headrace_usage (day TEXT NOT NULL, client TEXT NOT NULL, model TEXT NOT NULL,
    operation TEXT NOT NULL, priority TEXT NOT NULL,
    requests BIGINT NOT NULL, failed BIGINT NOT NULL,
    refused BIGINT NOT NULL, cancelled BIGINT NOT NULL, prompt_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL, completion_tokens BIGINT NOT NULL,
    reasoning_tokens BIGINT NOT NULL, seconds DOUBLE PRECISION NOT NULL, joules DOUBLE PRECISION,
    PRIMARY KEY (day, client, model, operation, priority))""",
    "CREATE TABLE headrace_batches (id TEXT PRIMARY KEY, written BIGINT NOT NULL)",
    "INSERT INTO headrace_meta VALUES ('version', 1), ('changes', 0)",
)


def _since(counted: str, number: str) -> str:
    """Return what is counted in the minute or day of a parameter: 0 if that has just begun."""
    return f"(CASE WHEN :{number} > {number} THEN 0 ELSE {counted} END)"


def _within(limit: str, counted: str, number: str, more: str) -> str:
    return f"({limit} IS NULL OR {_since(counted, number)} + {more} <= {limit})"


def _window(number: str, ahead: int) -> str:
    is_valid = f"{number} BETWEEN :{number} AND :{number} + {ahead}"
    return f"CASE WHEN {is_valid} THEN {number} ELSE :{number} END"


def _reserving() -> str:
    changes = {
        "minute": _window("minute", MINUTES_AHEAD),
        "minute_requests": f"{_since('minute_requests', 'minute')} + 1",
        "minute_tokens": f"{_since('minute_tokens', 'minute')} + :tokens",
        "day": _window("day", DAYS_AHEAD),
        "day_requests": f"{_since('day_requests', 'day')} + 1",
        "day_tokens": f"{_since('day_tokens', 'day')} + :tokens",
        "running": "running + 1",
        "last_used": ":now",
    }
    conditions = (
        "id = :id AND revoked IS NULL AND (concurrent IS NULL OR running < concurrent)",
        _within("requests_per_minute", "minute_requests", "minute", "1"),
        _within("requests_per_day", "day_requests", "day", "1"),
        _within("tokens_per_minute", "minute_tokens", "minute", ":tokens"),
        _within("tokens_per_day", "day_tokens", "day", ":tokens"),
    )
    written = ", ".join(f"{name} = {value}" for name, value in changes.items())
    return (
        f"UPDATE headrace_keys SET {written} WHERE {' AND '.join(conditions)} "  # noqa: S608
        f"RETURNING {_COLUMNS}"
    )


def _settling() -> str:
    """Return what a settlement changes: nothing in a minute or day that is over."""
    changes = ["running = running - :ended"]
    for unit in ("minute", "day"):
        is_new = f":{unit} > {unit} AND :requests > 0"
        changes.append(f"{unit} = CASE WHEN {is_new} THEN :{unit} ELSE {unit} END")
        changes += [
            f"{unit}_{kind} = CASE WHEN {is_new} THEN :{kind} WHEN :{unit} = {unit} "
            f"THEN {unit}_{kind} + :{kind} ELSE {unit}_{kind} END"
            for kind in ("requests", "tokens")
        ]
    return ", ".join(changes)


# Statements are made of constants; what is variable is a parameter.
_RESERVE = _reserving()
_HOLD = """INSERT INTO headrace_holds (service, id, running) SELECT :service, :id, 1 FROM granted
ON CONFLICT (service, id) DO UPDATE SET running = headrace_holds.running + 1"""
_RELEASE = """UPDATE headrace_holds SET running = running - 1
WHERE service = :service AND id = :id AND running > 0 RETURNING running"""
_CHANGE_RUNNING = "UPDATE headrace_keys SET running = running + :running WHERE id = :id"
_BURY = "DELETE FROM headrace_holds WHERE service = :service RETURNING id, running"
_SERVICES = "SELECT id, beats FROM headrace_services"
_SELECT = f"SELECT {_COLUMNS} FROM headrace_keys"  # noqa: S608
_SETTLE = f"UPDATE headrace_keys SET {_settling()} WHERE id = :id"  # noqa: S608


_REWIND = f"""UPDATE headrace_keys SET {
    ", ".join(
        f"{unit} = CASE WHEN {unit} > :{unit} + {ahead} THEN :{unit} ELSE {unit} END"
        for unit, ahead in _AHEAD.items()
    )
} WHERE id = :id AND ({
    " OR ".join(f"{unit} > :{unit} + {ahead}" for unit, ahead in _AHEAD.items())
})"""  # noqa: S608


class Settlement(NamedTuple):
    """What is to be corrected after a request of a key; if it has `ended`, its place is free.

    `requests` and `tokens` are added to the minute and day in which they were charged.
    """

    id: str
    minute: int
    day: int
    requests: int = 0
    tokens: int = 0
    ended: int = 0  # or 1


class KeyBook:
    """The tables in a database; creates them, unless a newer Headrace has. All methods block.

    Raises:
        ConfigError: a newer Headrace made the tables.
        DatabaseDown: raised by all methods, if the database does not answer.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self._prepare()

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    # Keys.

    def changes(self) -> int:
        """Return a number that grows with each change of a key."""
        ((number,),) = self.database.run("SELECT value FROM headrace_meta WHERE name = 'changes'")
        return int(number)

    def accounts(self) -> dict[str, Account]:
        """Return all keys by their SHA-256, oldest first."""
        rows = self.database.run(f"{_SELECT} ORDER BY created, id")
        return {str(row[1]): _account(row) for row in rows}

    def create(self, new: NewKey) -> tuple[str, Key]:
        """Create a key; return it in plain, and what is kept of it.

        Raises:
            InvalidRequest: there are too many.
        """
        plain, digest = new_key()
        key = Key(
            id=id_of(digest),
            name=new.name,
            scope=new.scope,
            limits=new.limits,
            models=new.models,
            created=int(self.database.now()),
        )
        given = {**_settings(key.name, key.limits, key.models), "scope": key.scope}
        given |= {"id": key.id, "hash": digest, "created": key.created}
        names, marks = ", ".join(given), ", ".join(f":{name}" for name in given)
        with self.database.transaction():
            counted = self.database.run("SELECT count(*) FROM headrace_keys WHERE revoked IS NULL")
            if counted[0][0] >= MAX_KEYS:
                raise InvalidRequest(f"There are {MAX_KEYS} keys already; revoke some.")
            self.database.run(f"INSERT INTO headrace_keys ({names}) VALUES ({marks})", given)  # noqa: S608
            self._changed()
        return plain, key

    def change(self, id: str, change: KeyChange) -> Key:
        """Change a key.

        Raises:
            UnknownKey: there is none, or it was revoked.
        """
        given = {name: value for name, value in asdict(change).items() if value is not UNSET}
        with self.database.transaction():
            key = self._known(id)
            if key.revoked is not None:
                raise UnknownKey(f"The key {id} was revoked.", param="id")
            key = msgspec.structs.replace(key, **given)
            values = _settings(key.name, key.limits, key.models)
            written = ", ".join(f"{name} = :{name}" for name in values)
            self.database.run(
                f"UPDATE headrace_keys SET {written} WHERE id = :id",  # noqa: S608
                {**values, "id": id},
            )
            self._changed()
        return key

    def revoke(self, id: str) -> Key:
        """Revoke a key; one that is revoked stays as it is.

        Raises:
            UnknownKey: there is none.
        """
        now = int(self.database.now())
        with self.database.transaction():
            self.database.run(
                "UPDATE headrace_keys SET revoked = :now WHERE id = :id AND revoked IS NULL",
                {"id": id, "now": now},
            )
            key = self._known(id)
            self._changed()
        return key

    def used(self, times: Iterable[tuple[str, float]]) -> None:
        """Keep when keys without limits were used."""
        for id, time in times:
            self.database.run(
                "UPDATE headrace_keys SET last_used = :now WHERE id = :id",
                {"id": id, "now": int(time)},
            )

    # Counts.

    def reserve(
        self, service: str, id: str, least: int, most: int, now: float
    ) -> tuple[Account, int]:
        """Charge a request with as many of `most` tokens as are left; return the key and how many.

        A round trip, unless it is refused at first.

        Raises:
            RateLimited: not even `least` tokens are left, or another limit is reached.
            Unauthorized: the key was revoked.
        """
        values = {"service": service, "id": id, "now": int(now), **_numbers(now)}
        tokens = most
        for _ in range(_TRIES):
            rows = self.database.run_both(_RESERVE, _HOLD, {**values, "tokens": tokens})
            if rows:
                return _account(rows[0]), tokens
            account = self.account(id)
            if account is None or account.key.revoked is not None:
                raise Unauthorized("This API key is not known here.")
            # Else what is charged to the present would be charged to each later minute too.
            self.database.run(_REWIND, values)
            counts, limits = account.counts.at(now), account.key.limits
            counts.check(limits, least, now)
            # There is room for a smaller one, or it has come in between.
            tokens = max(least, min(most, counts.tokens_left(limits, now)))
        raise RateLimited("Too many requests of this key at a time.", retry_after_s=1)

    def account(self, id: str) -> Account | None:
        """Return a key by its id; None if there is none."""
        rows = self.database.run(f"{_SELECT} WHERE id = :id", {"id": id})
        return _account(rows[0]) if rows else None

    def settle(self, service: str, settlement: Settlement) -> None:
        """Correct what was charged."""
        values = {**settlement._asdict(), "service": service}
        with self.database.transaction():
            # A service that was taken for ended has none of its places any more.
            if settlement.ended and not self.database.run(_RELEASE, values):
                values["ended"] = 0
            self.database.run(_SETTLE, values)

    # Services.

    def beat(self, service: str) -> None:
        """Show that a service lives."""
        self.database.run(
            """INSERT INTO headrace_services VALUES (:service, 1)
            ON CONFLICT (id) DO UPDATE SET beats = headrace_services.beats + 1""",
            {"service": service},
        )

    def services(self) -> dict[str, int]:
        """Return the beats of all services."""
        return {str(id): int(n) for id, n in self.database.run(_SERVICES)}

    def bury(self, service: str) -> None:
        """Give back the places of a service that has ended."""
        values = {"service": service}
        with self.database.transaction():
            held = self.database.run(_BURY, values)
            self.database.run("DELETE FROM headrace_services WHERE id = :service", values)
            for id, running in held:
                self.database.run(_CHANGE_RUNNING, {"id": id, "running": -running})

    def hold(self, service: str, running: Mapping[str, int]) -> None:
        """Hold places for requests of a service that run already."""
        for id, number in running.items():
            values = {"service": service, "id": id, "running": number}
            with self.database.transaction():
                self.database.run(
                    "INSERT INTO headrace_holds VALUES (:service, :id, :running)", values
                )
                self.database.run(_CHANGE_RUNNING, values)

    # Tables.

    def _prepare(self) -> None:
        if self._version() is None:
            self._create()
        if (version := self._version() or 0) > _VERSION:
            raise ConfigError(
                f"{self.database.name} was made by a newer Headrace (version {version}).",
                param="server.database",
            )

    def _version(self) -> int | None:
        if not self.database.has_table("headrace_meta"):
            return None
        ((version,),) = self.database.run("SELECT value FROM headrace_meta WHERE name = 'version'")
        return int(version)

    def _create(self) -> None:
        with self.database.transaction():
            self.database.lock()
            if self._version() is None:  # another process may have been first
                for statement in _TABLES:
                    self.database.run(statement)

    def _known(self, id: str) -> Key:
        if (account := self.account(id)) is None:
            raise UnknownKey(f"There is no key {id}.", param="id")
        return account.key

    def _changed(self) -> None:
        self.database.run("UPDATE headrace_meta SET value = value + 1 WHERE name = 'changes'")


def has_keys(path: Path) -> bool:
    """Whether a file of keys has any, revoked ones too.

    Raises:
        DatabaseDown: it cannot be read.
    """
    book = KeyBook(SqliteDatabase(path))
    try:
        return bool(book.accounts())
    finally:
        book.close()


def _numbers(now: float) -> dict[str, int]:
    return {"minute": int(now // MINUTE_S), "day": int(now // DAY_S)}


def _settings(name: str, limits: Limits, models: Sequence[str]) -> dict[str, Any]:
    listed = msgspec.json.encode(models).decode()
    return {"name": name, "models": listed, **{key: getattr(limits, key) for key in _LIMITS}}


def _account(row: tuple[Any, ...]) -> Account:
    key = dict(zip(_KEY, row, strict=False))
    limits = Limits(**dict(zip(_LIMITS, row[len(_KEY) :], strict=False)))
    counts = Counts(*row[len(_KEY) + len(_LIMITS) :])
    models = msgspec.json.decode(key.pop("models"), type=tuple[str, ...])
    del key["hash"]
    return Account(Key(**key, limits=limits, models=models), counts)
