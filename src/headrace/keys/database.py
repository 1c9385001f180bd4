"""The two databases: SQLite and PostgreSQL, with the same statements."""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import urlsplit

from headrace.core.errors import ConfigError, DatabaseDown
from headrace.core.install import install_command
from headrace.core.private import private_folder

if TYPE_CHECKING:
    import psycopg

Values = Mapping[str, Any]
Rows = list[tuple[Any, ...]]

FILE = "keys.sqlite3"
"""The name of the default database in the home directory."""

_BUSY_S = 2.0
_CONNECT_S = 3
_STATEMENT_MS = 5000
_LOCK = 0x68656164
_NAMED = re.compile(r"(?<!:):(\w+)")


class Database(Protocol):
    """A connection. Each method raises DatabaseDown if the database does not answer."""

    name: str
    """Where it is, without a password."""

    def run(self, statement: str, values: Values | None = None) -> Rows:
        """Run a statement with `:name` for values; return its rows."""
        ...

    def run_both(self, first: str, second: str, values: Values) -> Rows:
        """Run `first`, which returns rows, and `second` for each of them, or neither.

        `second` refers to the row of `first` as the table `granted`.
        """
        ...

    def transaction(self) -> AbstractContextManager[None]:
        """Return a context in which all statements are done, or none."""
        ...

    def has_table(self, name: str) -> bool:
        """Whether there is such a table."""
        ...

    def lock(self) -> None:
        """Keep other processes from creating tables, until the end of the transaction."""
        ...

    def now(self) -> float:
        """Return Unix seconds of the database, without a round trip."""
        ...

    def synchronise(self) -> None:
        """Compare the clocks, for `now`."""
        ...

    def close(self) -> None:
        """Close the connection. Idempotent."""
        ...


def is_postgres(url: str) -> bool:
    """Whether an address is that of PostgreSQL."""
    return url.startswith(("postgresql://", "postgres://"))


def sqlite_path(url: str, home: Path) -> Path | None:
    """Return the file of an address; None if it is one of PostgreSQL.

    Raises:
        ConfigError: it is neither.
    """
    if is_postgres(url):
        return None
    if "://" in url and not url.startswith("sqlite:///"):
        scheme = url.partition("://")[0]
        raise ConfigError(
            f"server.database: {scheme} is not supported; "
            "it is the path of an SQLite file, or postgresql://HOST/NAME",
            param="server.database",
        )
    return (home / (url.removeprefix("sqlite:///") or FILE)).expanduser()


def open_database(url: str, home: Path) -> Database:
    """Connect; an SQLite file is created if there is none.

    Raises:
        ConfigError: the address is malformed, or a library is missing.
        DatabaseDown: it does not answer.
    """
    path = sqlite_path(url, home)
    return PostgresDatabase(url) if path is None else SqliteDatabase(path)


class SqliteDatabase:
    """A file in WAL mode: a change that was made survives the end of the process by any means.

    The last changes may be lost in a power cut, as they are not flushed to the disk one by one.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            private_folder(path.parent)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
        except (sqlite3.Error, OSError) as error:
            raise _down(self.name, error) from error

    def run(self, statement: str, values: Values | None = None) -> Rows:
        """Run a statement."""
        try:
            return self._connection.execute(statement, values or {}).fetchall()
        except sqlite3.Error as error:
            raise _down(self.name, error) from error

    def run_both(self, first: str, second: str, values: Values) -> Rows:
        """Run two statements in a transaction."""
        with self.transaction():
            rows = self.run(first, values)
            for _ in rows:
                # The row is there already: no table of its own is needed.
                self.run(second.replace("FROM granted", "WHERE 1"), values)
        return rows

    @contextmanager
    def transaction(self) -> Generator[None]:
        """Do all statements, or none; other processes wait."""
        self.run("BEGIN IMMEDIATE")
        try:
            yield
            self.run("COMMIT")
        except BaseException:
            with suppress(DatabaseDown):
                self.run("ROLLBACK")
            raise

    def has_table(self, name: str) -> bool:
        """Whether there is such a table."""
        values = {"name": name}
        return bool(self.run("SELECT 1 FROM sqlite_master WHERE name = :name", values))

    def lock(self) -> None:
        """Do nothing: each transaction keeps others from writing."""

    def now(self) -> float:
        """Return the time of this machine."""
        return time.time()

    def synchronise(self) -> None:
        """Do nothing: it is the same clock."""

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


class PostgresDatabase:
    """A connection to PostgreSQL, where each statement is a round trip.

    Time is the database's: services with different clocks count the same minutes.
    """

    def __init__(self, url: str) -> None:
        self.name = _without_password(url)
        driver = _driver()
        options: dict[str, Any] = {
            "connect_timeout": _CONNECT_S,
            "application_name": "headrace",
            "options": f"-c statement_timeout={_STATEMENT_MS}",
            "tcp_user_timeout": _STATEMENT_MS,
        }
        try:
            self._connection = cast(
                "psycopg.Connection[tuple[Any, ...]]",
                driver.connect(url, autocommit=True, **options),
            )
        except driver.Error as error:
            raise _down(self.name, error) from None
        self._driver = driver
        self._ahead = 0.0
        self.synchronise()

    def run(self, statement: str, values: Values | None = None) -> Rows:
        """Run a statement."""
        try:
            text = _NAMED.sub(r"%(\1)s", statement)
            cursor = self._connection.execute(cast("Any", text), values or {})
            return cursor.fetchall() if cursor.description else []
        except self._driver.Error as error:
            raise _down(self.name, error) from None

    def run_both(self, first: str, second: str, values: Values) -> Rows:
        """Run two statements as one."""
        return self.run(f"WITH granted AS ({first}), added AS ({second}) TABLE granted", values)

    @contextmanager
    def transaction(self) -> Generator[None]:
        """Do all statements, or none."""
        try:
            with self._connection.transaction():
                yield
        except self._driver.Error as error:
            raise _down(self.name, error) from None

    def has_table(self, name: str) -> bool:
        """Whether there is such a table."""
        return self.run("SELECT to_regclass(:name)", {"name": name}) != [(None,)]

    def lock(self) -> None:
        """Wait for other processes that create tables."""
        self.run("SELECT pg_advisory_xact_lock(:number)", {"number": _LOCK})

    def now(self) -> float:
        """Return the time of the database."""
        return time.monotonic() + self._ahead

    def synchronise(self) -> None:
        """Read the time of the database."""
        before = time.monotonic()
        ((now,),) = self.run("SELECT extract(epoch FROM clock_timestamp())::float8")
        self._ahead = float(now) - (before + time.monotonic()) / 2

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _driver() -> Any:
    try:
        import psycopg
    except ImportError:
        raise ConfigError(
            f"server.database: PostgreSQL needs psycopg: {install_command('postgres')}",
            param="server.database",
        ) from None
    return psycopg


def _down(name: str, error: Exception) -> DatabaseDown:
    # The driver's texts can contain the address with its password.
    detail = f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return DatabaseDown("The database of the keys does not answer.", detail=detail, retry_after_s=2)


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{place}{parts.path}"
