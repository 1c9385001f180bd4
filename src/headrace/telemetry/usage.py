"""Usage by day, key, model, operation and priority, in a database that services share."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.errors import ConfigError
from headrace.core.private import private_folder
from headrace.core.record import Amounts, RequestRecord, UsageFilter, UsageRow

log = logging.getLogger("headrace.telemetry")

FILE = "usage.sqlite3"
"""Its name in the home directory."""

NO_KEY = "-"
"""The key of requests without one."""

OTHER = "_other"
"""The model of all requests for models that are not served."""

COUNTS = (
    *("requests", "failed", "refused", "cancelled"),
    *("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens"),
)
_COLUMNS = {"key": "client"}
GROUPS = {
    name: _COLUMNS.get(name, name) for name in ("day", "model", "key", "operation", "priority")
}
"""What usage can be grouped by, and the columns for it."""

_LIVE, _BATCH = "live", "batch"
_VERSION = 2
_OLD_KEY = ("day", "client", "model", "operation")
KEY = (*_OLD_KEY, "priority")
"""The columns whose values together are unique."""

_TABLE = f"""CREATE TABLE usage ({", ".join(f"{name} TEXT NOT NULL" for name in KEY)},
{", ".join(f"{name} INTEGER NOT NULL" for name in COUNTS)}, seconds REAL NOT NULL, joules REAL,
PRIMARY KEY ({", ".join(KEY)})) WITHOUT ROWID"""
_ADDED = ", ".join(f"{name} = {name} + excluded.{name}" for name in (*COUNTS, "seconds"))
_MARKS = ", ".join("?" * (len(KEY) + len(COUNTS) + 2))
# A sum of unknown values is unknown; otherwise unknown values add nothing.
_ADD = f"""INSERT INTO usage VALUES ({_MARKS}) ON CONFLICT DO UPDATE SET {_ADDED}, joules =
CASE WHEN excluded.joules IS NULL THEN joules ELSE coalesce(joules, 0) + excluded.joules END"""  # noqa: S608 - of constants
# The first version did not have the priority.
_UPDATE = (
    "ALTER TABLE usage RENAME TO old",
    _TABLE,
    f"INSERT INTO usage SELECT {', '.join(_OLD_KEY)}, '{_LIVE}', "  # noqa: S608 - of constants
    f"{', '.join(COUNTS)}, seconds, joules FROM old",
    "DROP TABLE old",
)
_SUMS = ", ".join(f"sum({name})" for name in (*COUNTS, "seconds", "joules"))
_ALL = UsageFilter()
_BUSY_S = 1.0
_LONGEST_PAUSE_S = 30.0
_MOST_ROWS = 10_000

_DAY_S = 86400
_FIRST_DAY = date(1970, 1, 1).toordinal()

Key = tuple[int, str, str, str, str]
"""Day as a number since 1970, id of the key, model, operation, priority."""


class Usage:
    """A Sink that counts in memory; a thread adds the counts to the file every two seconds.

    If the file cannot be written, that is logged once and tried again; until then requests are
    counted in memory, up to a limit. Counts that a killed process has not written are lost.
    """

    def __init__(self, path: Path, *, every_s: float = 2.0) -> None:
        self._path = path
        self._every_s = every_s
        self._lock = threading.Lock()
        self._counted: dict[Key, Amounts] = {}
        self._counted_event, self._stop = threading.Event(), threading.Event()
        self._failing = False
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        """Describe the file, whether it can be written, and how much is not written yet."""
        state = "failing" if self._failing else "well"
        return f"<Usage {self._path}, {state}, {len(self._counted)} rows not written>"

    def record(self, record: RequestRecord) -> None:
        """Count a request that has ended, without waiting."""
        key, amounts = _key_of(record), _amounts(record)
        with self._lock:
            self._count(key, amounts)
        self._counted_event.set()

    def close(self) -> None:
        """Write the rest, and end the thread. Idempotent; takes some seconds at most."""
        self._stop.set()
        self._counted_event.set()
        self._thread.join()

    def _count(self, key: Key, amounts: Amounts) -> None:
        if (known := self._counted.get(key)) is not None:
            known.add(amounts)
        elif len(self._counted) < _MOST_ROWS:
            self._counted[key] = amounts
        else:
            self._lost += amounts.requests

    def _run(self) -> None:
        pause = self._every_s
        while not self._stop.is_set():
            self._counted_event.wait()
            self._stop.wait(pause)
            self._counted_event.clear()
            pause = self._every_s if self._write() else min(_LONGEST_PAUSE_S, 2 * pause)
        self._write()

    def _write(self) -> bool:
        with self._lock:
            taken, self._counted = self._counted, {}
        try:
            if taken:
                self._add(taken)
        except (sqlite3.Error, OSError, ConfigError) as error:
            self._put_back(taken, error)
            return False
        if taken and self._failing:
            data = {"path": str(self._path), "lost": self._lost}
            log.info("headrace.usage.writes_again", extra={"data": data})
            self._failing, self._lost = False, 0
        return True

    def _add(self, counted: Mapping[Key, Amounts]) -> None:
        add(self._path, counted)

    def _put_back(self, taken: Mapping[Key, Amounts], error: Exception) -> None:
        with self._lock:
            newer, self._counted = self._counted, dict(taken)
            for key, amounts in newer.items():
                self._count(key, amounts)
        self._counted_event.set()
        if not self._failing:
            self._failing = True
            data = {"path": str(self._path), "reason": str(error)}
            log.warning("headrace.usage.not_written", extra={"data": data})


def add(path: Path, counted: Mapping[Key, Amounts]) -> None:
    """Add counts to the file, in one transaction.

    Raises:
        ConfigError: the file was made by a newer Headrace.
        sqlite3.Error: it cannot be written, or is not a database.
        OSError: it cannot be created.
    """
    private_folder(path.parent)
    # The usage of keys is private to the owner. SQLite creates its other files with the same mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    with closing(sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)) as database:
        _open(database, path)
        rows = [row_of(key, amounts) for key, amounts in counted.items()]
        with _transaction(database):
            database.executemany(_ADD, rows)


def read(path: Path, by: Sequence[str], wanted: UsageFilter = _ALL) -> tuple[UsageRow, ...]:
    """Return the usage of each group, in order, without a lock.

    Raises:
        ConfigError: the file is not a usage database, or cannot be read.
    """
    if not path.exists():
        return ()
    tests: dict[str, Any] = {"day >= ?": wanted.since, "day <= ?": wanted.until or "9"}
    tests |= {"model = ?": wanted.model, "client = ?": wanted.key}
    conditions = {test: value for test, value in tests.items() if value is not None}
    try:
        with _reading(path) as database:
            version = _check(database, path)
            columns = ", ".join(_column(group, version) for group in by)
            # Names come from this module; values are parameters.
            query = f"SELECT {columns}, {_SUMS} FROM usage WHERE {' AND '.join(conditions)}"  # noqa: S608
            query += f" GROUP BY {columns} ORDER BY {columns}"
            rows = database.execute(query, tuple(conditions.values())).fetchall() if version else []
    except sqlite3.Error as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
    return rows_of(by, rows)


def total(rows: Sequence[UsageRow]) -> Amounts:
    """Return the sum of all rows."""
    amounts = Amounts()
    for row in rows:
        amounts.add(row.amounts)
    return amounts


def rows_of(by: Sequence[str], rows: Sequence[Sequence[Any]]) -> tuple[UsageRow, ...]:
    """Return rows of a database: the groups, and the sums in the order of Amounts."""
    return tuple(_parse_row(by, row) for row in rows)


def _column(group: str, version: int) -> str:
    return f"'{_LIVE}'" if group == "priority" and version == 1 else GROUPS[group]


def _parse_row(by: Sequence[str], row: Sequence[Any]) -> UsageRow:
    names = (*COUNTS, "seconds", "joules")
    amounts = Amounts(**dict(zip(names, row[len(by) :], strict=True)))
    return UsageRow(group=dict(zip(by, row, strict=False)), amounts=amounts)


@contextmanager
def _reading(path: Path) -> Generator[sqlite3.Connection]:
    uri = f"{path.resolve().as_uri()}?mode=ro"
    # If the folder is not writable either, no process writes there.
    is_still = not (os.access(path.parent, os.W_OK) or Path(f"{path}-wal").exists())
    uri += "&immutable=1" if is_still else ""
    with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_S)) as database:
        yield database


def _open(database: sqlite3.Connection, path: Path) -> None:
    database.execute("PRAGMA synchronous = NORMAL")
    if _check(database, path) == _VERSION:
        return
    # Readers and the writer do not wait for each other.
    database.execute("PRAGMA journal_mode = WAL")
    with _transaction(database):
        version = _check(database, path)  # another process may have been first
        for statement in (_TABLE,) if not version else _UPDATE if version < _VERSION else ():
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {_VERSION}")


def _check(database: sqlite3.Connection, path: Path) -> int:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version > _VERSION:
        raise ConfigError(f"{path} was made by a newer Headrace.")
    return int(version)


@contextmanager
def _transaction(database: sqlite3.Connection) -> Generator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            database.execute("ROLLBACK")
        raise


def _key_of(record: RequestRecord) -> Key:
    # Clients can send any name: unknown models share one row.
    model = OTHER if record.error == "UnknownModel" else record.model
    priority = _BATCH if record.batch else _LIVE
    return int(record.time // _DAY_S), record.client or NO_KEY, model, record.operation, priority


def row_of(key: Key, amounts: Amounts) -> tuple[Any, ...]:
    """Return the values of a row, in the order of the columns."""
    day, *rest = key
    return str(date.fromordinal(_FIRST_DAY + day)), *rest, *msgspec.structs.astuple(amounts)


def _amounts(record: RequestRecord) -> Amounts:
    metrics, usage = record.metrics, record.metrics.usage
    joules = [device.joules for device in metrics.devices if device.joules is not None]
    engine_ms = 0.0
    if metrics.queue_ms is not None:
        engine_ms = max(0.0, metrics.total_ms - metrics.queue_ms - metrics.load_ms)
    return Amounts(
        requests=1,
        failed=int(record.outcome == "error"),
        refused=int(record.outcome == "refused"),
        cancelled=int(record.outcome == "cancelled"),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        seconds=engine_ms / 1000,
        joules=sum(joules) if joules else None,
    )
