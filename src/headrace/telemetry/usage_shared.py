"""Usage in the PostgreSQL of the keys, which several services share."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.errors import ConfigError, DatabaseDown
from headrace.core.private import private_folder, write_atomically
from headrace.core.record import Amounts, UsageFilter, UsageRow
from headrace.keys.book import KeyBook
from headrace.keys.database import is_postgres, open_database
from headrace.telemetry.usage import COUNTS, FILE, GROUPS, KEY, Key, Usage, read, row_of, rows_of

_log = logging.getLogger("headrace.telemetry")

FOLDER = "usage-spool"
"""Its name in the home directory: what the database does not have yet, a file for each write."""

_REMEMBERED_S = 30 * 86400
_COLUMNS = (*KEY, *COUNTS, "seconds", "joules")
_ADDED = ", ".join(
    f"{name} = headrace_usage.{name} + excluded.{name}" for name in (*COUNTS, "seconds")
)
_ADD = f"""INSERT INTO headrace_usage ({", ".join(_COLUMNS)})
VALUES ({", ".join(f":{name}" for name in _COLUMNS)})
ON CONFLICT ({", ".join(KEY)}) DO UPDATE SET {_ADDED}, joules =
CASE WHEN excluded.joules IS NULL THEN headrace_usage.joules
ELSE coalesce(headrace_usage.joules, 0) + excluded.joules END"""  # noqa: S608 - of constants
_NEW = "INSERT INTO headrace_batches VALUES (:id, :now) ON CONFLICT DO NOTHING RETURNING id"
_OLD = "DELETE FROM headrace_batches WHERE written < :before"
_SUMS = ", ".join(f"CAST(sum({name}) AS BIGINT)" for name in COUNTS)


class SharedUsage(Usage):
    """Usage that is written to a file first, and from there to the database, just once.

    Each file has an id that the database keeps, so that it is not added again if the answer to
    the first time was lost.
    """

    def __init__(self, url: str, home: Path) -> None:
        self._url, self._home = url, home
        self._folder = home / FOLDER
        self._book: KeyBook | None = None
        self._is_behind = False
        super().__init__(self._folder)
        if self._folder.is_dir():
            self._counted_event.set()

    def close(self) -> None:
        """Write the rest, as far as the database answers; what is left waits for the next start."""
        super().close()
        if self._book is not None:
            self._book.close()

    def _add(self, counted: Mapping[Key, Amounts]) -> None:
        """Write counts to a file of their own.

        Raises:
            OSError: it cannot be written.
        """
        rows = [row_of(key, amounts) for key, amounts in counted.items()]
        path = private_folder(self._folder) / f"{secrets.token_hex(12)}.json"
        write_atomically(path, msgspec.json.encode(rows))

    def _write(self) -> bool:
        is_kept = super()._write()
        try:
            for path in sorted(self._folder.glob("*.json")):
                self._send(path)
        except (DatabaseDown, ConfigError, OSError) as error:
            self._fell_behind(error)
            return False
        if self._is_behind:
            self._is_behind = False
            _log.info("headrace.usage.sent", extra={"data": {"path": str(self._folder)}})
        return is_kept

    def _send(self, path: Path) -> None:
        if self._book is None:
            self._book = KeyBook(open_database(self._url, self._home))
        database = self._book.database
        now = int(database.now())
        with database.transaction():
            if database.run(_NEW, {"id": path.stem, "now": now}):
                for row in msgspec.json.decode(path.read_bytes(), type=list[list[Any]]):
                    database.run(_ADD, dict(zip(_COLUMNS, row, strict=True)))
            database.run(_OLD, {"before": now - _REMEMBERED_S})
        path.unlink()

    def _fell_behind(self, error: Exception) -> None:
        if self._book is not None:
            self._book.close()
            self._book = None
        # Tried again later, whether there are requests or not.
        self._counted_event.set()
        if not self._is_behind:
            self._is_behind = True
            reason = getattr(error, "detail", None) or str(error)
            data = {"path": str(self._folder), "reason": reason}
            _log.warning("headrace.usage.not_sent", extra={"data": data})


def read_usage(
    database: str, home: Path, by: Sequence[str], wanted: UsageFilter
) -> Sequence[UsageRow]:
    """Return the usage of each group, in order, from where this configuration keeps it.

    Raises:
        ConfigError, DatabaseDown: the database cannot be read.
    """
    if is_postgres(database):
        return read_shared(database, home, by, wanted)
    return read(home / FILE, by, wanted)


def read_shared(
    url: str, home: Path, by: Sequence[str], wanted: UsageFilter
) -> tuple[UsageRow, ...]:
    """Return the usage of each group, of all services, in order.

    Raises:
        ConfigError: the address is malformed, or a library is missing.
        DatabaseDown: the database does not answer.
    """
    columns = ", ".join(GROUPS[group] for group in by)
    conditions = "day >= :since AND day <= :until"
    conditions += " AND model = :model" if wanted.model is not None else ""
    conditions += " AND client = :key" if wanted.key is not None else ""
    given = msgspec.structs.asdict(wanted) | {"until": wanted.until or "9"}
    # Names come from this module; values are parameters.
    query = (
        f"SELECT {columns}, {_SUMS}, sum(seconds), sum(joules) FROM headrace_usage "  # noqa: S608
        f"WHERE {conditions} GROUP BY {columns} ORDER BY {columns}"
    )
    with closing(KeyBook(open_database(url, home))) as book:
        rows = book.database.run(query, {name: v for name, v in given.items() if v is not None})
    return rows_of(by, rows)
