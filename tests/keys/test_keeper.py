"""Keys in a database, by the Keeper of a service: SQLite, and PostgreSQL with `-m postgres`."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace
from tests.keys.postgres import Postgres

from headrace.core.errors import (
    ConfigError,
    DatabaseDown,
    RateLimited,
    Unauthorized,
    UnknownKey,
)
from headrace.core.keys import Counts, KeyChange, Limits, NewKey, digest_of
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.record import Outcome, RequestRecord
from headrace.core.values import masked
from headrace.keys import database
from headrace.keys.book import KeyBook, Settlement
from headrace.keys.database import SqliteDatabase, open_database
from headrace.keys.keeper import Keeper, WhenDown

DAY = 86400
NOON = 20_000 * DAY + 43_200.0


@asynccontextmanager
async def keeper(url: str, when_down: WhenDown = "refuse") -> AsyncIterator[Keeper]:
    made = Keeper(url, Path("/nonexistent"), when_down)
    await made.start()
    try:
        yield made
    finally:
        await made.aclose()


async def key_of(made: Keeper, **limits: int) -> str:
    _, key = await made.create(NewKey(name="k", limits=Limits(**limits)))
    return key.id


async def granted(keepers: Sequence[Keeper], id: str, number: int, tokens: int = 0) -> int:
    """How many of so many requests, which race, are granted."""

    async def reserve(index: int) -> bool:
        try:
            await keepers[index % len(keepers)].reserve(id, f"{id}-{index}", tokens, tokens)
        except RateLimited:
            return False
        return True

    return sum(await asyncio.gather(*map(reserve, range(number))))


def ended(id: str, used: int, outcome: Outcome = "ok") -> RequestRecord:
    return RequestRecord(
        id=id,
        trace_id="",
        time=0,
        operation="chat",
        model="m",
        outcome=outcome,
        metrics=InferenceMetrics(started_at=0, usage=Usage(completion_tokens=used)),
    )


async def settled(made: Keeper, id: str, **counts: int) -> None:
    """Wait until the database has these counts."""
    async with asyncio.timeout(20):
        while True:
            account = next(each for each in await made.list() if each.key.id == id)
            if all(getattr(account.counts, name) == value for name, value in counts.items()):
                return
            await asyncio.sleep(0.02)


async def test_a_key_is_kept_as_a_hash(url: str, tmp_path: Path) -> None:
    """Issue 16.1 Keys, "kept hashed in SQLite": the key itself is nowhere."""
    async with keeper(url) as made:
        assert made.required
        plain, key = await made.create(NewKey(name="laptop", models=("m",)))
        account = await made.find(digest_of(plain.encode()))
        assert account is not None
        assert account.key == key
        assert await made.find(digest_of(b"other")) is None
        changed = await made.change(key.id, KeyChange(name="desk", limits=Limits(concurrent=1)))
        assert (changed.name, changed.models, changed.limits.concurrent) == ("desk", ("m",), 1)
        revoked = await made.revoke(key.id)
        assert revoked.revoked
        assert await made.find(digest_of(plain.encode())) is None
        with pytest.raises(UnknownKey):
            await made.change(key.id, KeyChange(name="again"))
        with pytest.raises(UnknownKey):
            await made.revoke("none")
        with pytest.raises(Unauthorized):
            await made.reserve(key.id, "r", 0, 0)
    files = [path.read_bytes() for path in tmp_path.glob("keys*")]
    assert not any(plain.encode() in content for content in files)


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [
        ({"requests_per_minute": 10}, 0),
        ({"requests_per_day": 10}, 0),
        ({"tokens_per_minute": 105}, 10),
        ({"tokens_per_day": 105}, 10),
        ({"concurrent": 10}, 0),
        ({"requests_per_day": 10, "requests_per_minute": 50, "tokens_per_day": 10_000}, 10),
    ],
    ids=str,
)
async def test_races_at_the_limit(
    url: str, limits: dict[str, int], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 16, shown 5: of 100 requests that race at two services, just the limit is served."""
    stop_the_clock(monkeypatch)
    async with keeper(url) as first, keeper(url) as second:
        id = await key_of(first, **limits)
        await second.list()
        assert await granted((first, second), id, 100, tokens) == 10
        await settled(first, id, running=10, day_tokens=10 * tokens)


async def test_many_first_uses_at_another_service(url: str) -> None:
    """A key that was just created elsewhere is known to all requests that race with it."""
    async with keeper(url) as first, keeper(url) as second:
        plain, _ = await first.create(NewKey(name="k"))
        digest = digest_of(plain.encode())
        accounts = await asyncio.gather(*(second.find(digest) for _ in range(20)))
        assert None not in accounts
        assert await second.find(digest_of(b"wrong")) is None


async def test_a_hundred_keys(url: str) -> None:
    """Issue 16, shown 5: 100 keys, each with three requests and a limit of two."""
    async with keeper(url) as made:
        ids = [await key_of(made, requests_per_day=2) for _ in range(100)]
        assert sum(await asyncio.gather(*(granted((made,), id, 3) for id in ids))) == 200
        assert len({each.key.id for each in await made.list()}) == 100


async def test_tokens_are_reserved_and_settled(url: str) -> None:
    """Issue 16.1 Keys: a reservation is the bound; what was used stays charged."""
    async with keeper(url) as made:
        id = await key_of(made, tokens_per_day=100)
        assert await made.reserve(id, "a", 10, 60) == 60
        assert await made.reserve(id, "b", 10, 60) == 40, "what is left"
        with pytest.raises(RateLimited) as caught:
            await made.reserve(id, "c", 10, 10)
        assert 0 < (caught.value.retry_after_s or 0) <= DAY
        made.record(ended("a", 5))
        await settled(made, id, day_tokens=45, day_requests=2, running=1)
        assert await made.reserve(id, "c", 55, 55) == 55
        made.record(ended("c", 0, "error"))
        made.record(ended("b", 30, "cancelled"))
        await settled(made, id, day_tokens=45, day_requests=3, running=0)
        with pytest.raises(RateLimited, match="may take 101 tokens"):
            await made.reserve(id, "d", 101, 101)
        with pytest.raises(RateLimited, match="100 tokens per day"):
            await made.reserve(id, "d", 56, 56)


def stop_the_clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of both databases, which can be set."""
    clock = [NOON]
    for kind in (SqliteDatabase, database.PostgresDatabase):
        monkeypatch.setattr(kind, "now", lambda _: clock[0])
    return clock


async def test_the_clock_goes_back_and_forth(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 16, shown 5 (clock): in no minute and no day more than the limit."""
    clock = stop_the_clock(monkeypatch)
    async with keeper(url) as made:
        id = await key_of(made, requests_per_minute=3, requests_per_day=5)
        assert await granted((made,), id, 9) == 3
        clock[0] -= 120
        assert await granted((made,), id, 9) == 0, "it was set back: that minute is still counted"
        clock[0] += 180
        assert await granted((made,), id, 9) == 2, "of the day"
        clock[0] += DAY
        assert await granted((made,), id, 9) == 3
        clock[0] -= DAY - 3600
        assert await granted((made,), id, 9) == 0, "far back: charged to the present minute"
        clock[0] += 60
        assert await granted((made,), id, 9) == 2, "of the later day"
        clock[0] += 400 * DAY
        assert await granted((made,), id, 9) == 3
        clock[0] -= 400 * DAY
        assert await granted((made,), id, 9) == 0
        clock[0] += 60
        assert await granted((made,), id, 9) == 2, "the key works again"


PROGRAM = """
import asyncio, sys
from pathlib import Path
from headrace.keys.keeper import Keeper
async def main():
    keeper = Keeper(sys.argv[1], Path("/nonexistent"))
    await keeper.start()
    for number in range(2):
        await keeper.reserve(sys.argv[2], str(number), 10, 10)
    print("reserved", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_a_service_that_is_killed(url: str) -> None:
    """Issue 16, shown 5 (restart): its requests stay charged, its places are free again."""
    async with keeper(url) as made:
        id = await key_of(made, concurrent=2, tokens_per_day=100)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM, url, id), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"reserved\n"
        assert await granted((made,), id, 1) == 0
        process.kill()
        await process.wait()
        async with keeper(url) as later:
            await settled(later, id, running=0, day_requests=2, day_tokens=20)
            assert await granted((later,), id, 9) == 2


async def test_python_and_sql_count_alike(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is granted without the database is what the statement grants, for any counts."""
    chance = random.Random(16)
    clock = stop_the_clock(monkeypatch)
    book = KeyBook(open_database(url, Path("/nonexistent")))
    for _ in range(60):
        drawn = [chance.choice((None, chance.randrange(1, 9))) for _ in range(5)]
        limits = Limits(**dict(zip(Limits.__struct_fields__, drawn, strict=True)))
        _, key = book.create(NewKey(name="k", limits=limits))
        counts = Counts()
        for _ in range(8):
            clock[0] += chance.choice((0, 0, 30, -50, 90, 3600, DAY, -DAY, -3 * DAY))
            tokens = chance.randrange(4)
            before = counts.at(clock[0])
            try:
                before.check(limits, tokens, clock[0])
                counts = before.charged(1, tokens, 1)
            except RateLimited as error:
                with pytest.raises(RateLimited) as caught:
                    book.reserve("s", key.id, tokens, tokens, clock[0])
                assert (caught.value.message, caught.value.retry_after_s) == (
                    error.message,
                    error.retry_after_s,
                )
                minute, day = min(counts.minute, before.minute), min(counts.day, before.day)
                counts = replace(counts, minute=minute, day=day)
                continue
            assert book.reserve("s", key.id, tokens, tokens, clock[0])[0].counts == counts
            if chance.random() < 0.5:
                book.settle("s", Settlement(key.id, counts.minute, counts.day, 0, -tokens, 1))
                counts = counts.charged(0, -tokens, -1)
    book.close()


@pytest.mark.parametrize("when_down", ["refuse", "cached"])
async def test_a_locked_file(
    when_down: WhenDown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 16, shown 5 (the database gone), for SQLite: as configured, and nothing is lost."""
    monkeypatch.setattr(database, "_BUSY_S", 0.01)
    path = tmp_path / "keys.sqlite3"
    async with keeper(str(path), when_down) as made:
        plain, key = await made.create(NewKey(name="k", limits=Limits(requests_per_day=4)))
        await made.reserve(key.id, "a", 7, 7)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        await _is_down(made, when_down, key.id, digest_of(plain.encode()))
        made.record(ended("a", 7))
        other.execute("ROLLBACK")
        other.close()
        await made._look()
        expected = 4 if when_down == "cached" else 1
        await settled(made, key.id, day_requests=expected, day_tokens=7, running=0)


async def _is_down(made: Keeper, when_down: WhenDown, id: str, digest: str) -> None:
    """A key is refused with a 503, or served up to its limit by what is known."""
    if when_down == "refuse":
        with pytest.raises(DatabaseDown) as caught:
            await made.reserve(id, "b", 0, 0)
        assert caught.value.retry_after_s
        with pytest.raises(DatabaseDown):
            await made.find(digest)
        return
    assert await granted((made,), id, 9) == 3
    for index in range(3):
        made.record(ended(f"{id}-{index}", 0))
    assert await made.find(digest) is not None
    with pytest.raises(DatabaseDown):
        await made.find(digest_of(b"new"))


@pytest.mark.postgres
@pytest.mark.parametrize("when_down", ["refuse", "cached"])
async def test_the_server_is_gone_and_back(when_down: WhenDown, server: Postgres) -> None:
    """Issue 16, shown 5: PostgreSQL is killed; new requests as configured; all is written later."""
    url = server.new()
    async with keeper(url, when_down) as made:
        plain, key = await made.create(NewKey(name="k", limits=Limits(requests_per_day=4)))
        await made.reserve(key.id, "a", 7, 7)
        server.stop()
        await _is_down(made, when_down, key.id, digest_of(plain.encode()))
        made.record(ended("a", 5))
        async with keeper(url) as late:
            assert late.required
            with pytest.raises(DatabaseDown):
                await late.find(digest_of(plain.encode()))
        server.start()
        await made._look()
        expected = (4, 5) if when_down == "cached" else (1, 5)
        await settled(made, key.id, day_requests=expected[0], day_tokens=expected[1], running=0)


async def test_the_first_key_by_another_process(tmp_path: Path) -> None:
    """A service without a file of keys finds one that is made, at its first use."""
    made = Keeper("", tmp_path)
    await made.start()
    assert not made.required
    assert await made.find(digest_of(b"none")) is None
    assert not (tmp_path / database.FILE).exists()
    book = KeyBook(open_database("", tmp_path))
    plain, _ = book.create(NewKey(name="k"))
    book.close()
    began = time.monotonic()
    assert await made.find(digest_of(plain.encode())) is not None
    assert time.monotonic() - began < 10
    assert made.required
    await made.aclose()


def test_what_is_no_database(tmp_path: Path) -> None:
    """An address of another kind, a file of a newer version, and a folder."""
    with pytest.raises(ConfigError, match="mysql is not supported"):
        open_database("mysql://host/x", tmp_path)
    book = KeyBook(open_database("", tmp_path))
    book.database.run("UPDATE headrace_meta SET value = 99 WHERE name = 'version'")
    book.close()
    with pytest.raises(ConfigError, match="newer Headrace"):
        KeyBook(open_database("", tmp_path))
    with pytest.raises(DatabaseDown):
        open_database(str(tmp_path), tmp_path)


def test_that_no_password_is_shown() -> None:
    """`headrace config show` prints an address without its password."""
    hidden = masked("server.database", "postgresql://me:secret@db:5432/x?password=secret&a=b")
    assert hidden == "postgresql://me:…@db:5432/x?password=…&a=b"
    assert masked("base_url", "http://localhost:8080/v1@x") == "http://localhost:8080/v1@x"
