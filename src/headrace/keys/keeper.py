"""Keeper: the keys of a service, which it knows, and their counts, which the database keeps."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec

from headrace.core.errors import DatabaseDown, HeadraceError, Unauthorized
from headrace.core.keys import Account, Counts, Key, KeyChange, NewKey
from headrace.core.record import RequestRecord
from headrace.keys.book import KeyBook, Settlement
from headrace.keys.database import open_database, sqlite_path
from headrace.keys.services import Services

T = TypeVar("T")
WhenDown = Literal["refuse", "cached"]

_log = logging.getLogger("headrace.keys")
_EVERY_S = 2.0
_ANSWER_S = 10.0
_LOOK_AGAIN_S = 1.0


class _Reservation(NamedTuple):
    id: str
    minute: int
    day: int
    tokens: int
    least: int
    is_local: bool


class Keeper:
    """A KeyStore, and a Sink that settles what requests have really used.

    All statements run in one thread, in their order. If the database does not answer, requests
    are refused, or go by what is known here (`cached`), and what they use is written later.
    `url` is empty for the default file, which is created with the first key. `on_read` is called
    when the keys have been read.
    """

    def __init__(self, url: str, home: Path, when_down: WhenDown = "refuse") -> None:
        self._url, self._home = url, home
        self._path = sqlite_path(url, home)
        self._when_down = when_down
        self._services = Services()
        self._thread = ThreadPoolExecutor(1, "keys")
        self._book: KeyBook | None = None
        self._down: DatabaseDown | None = None
        self._by_digest: dict[str, Account] = {}
        self._by_id: dict[str, Account] = {}
        self._changes = -1
        self._looked = float("-inf")
        self._looking: asyncio.Task[None] | None = None
        self._reserved: dict[str, deque[_Reservation]] = {}
        self._pending: deque[Settlement] = deque()
        self._flushing: asyncio.Task[None] | None = None
        self._used: dict[str, float] = {}
        self.on_read: Callable[[], object] = lambda: None

    def __repr__(self) -> str:
        """Describe how many keys there are, and whether the database answers."""
        state = "down" if self._down else "well"
        return f"<Keeper {len(self._by_id)} keys, {state}, {len(self._pending)} to be settled>"

    # Life.

    async def start(self) -> None:
        """Read the keys; if the database does not answer, go on without.

        Raises:
            ConfigError: a newer Headrace made the database, or a library is missing.
        """
        with suppress(DatabaseDown):
            await self._look()

    async def run(self) -> None:
        """Follow changes of other processes, until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                await self._look()
            except HeadraceError as error:
                _log.debug("The keys could not be read: %s", error.message)

    async def aclose(self) -> None:
        """Write what is left, as far as the database answers. Idempotent."""
        with suppress(DatabaseDown):
            if self._is_there():
                await self._flush()
                await self._call(self._services.end)
                await self._call(KeyBook.close)
        self._thread.shutdown(wait=False)

    # KeyStore.

    @property
    def required(self) -> bool:
        """Whether requests need a key: there are some, or a database was configured."""
        return bool(self._url or self._by_id)

    @property
    def known(self) -> bool:
        """Whether the keys have been read, or there are none."""
        return self._changes >= 0 or not self._is_there()

    def now(self) -> float:
        """Return Unix seconds, by the clock of the database if it is known."""
        book = self._book
        return time.time() if book is None else book.database.now()

    def account(self, id: str) -> Account | None:
        """Return a key as it is known here."""
        return self._by_id.get(id)

    async def find(self, digest: str) -> Account | None:
        """Return the key with this SHA-256, unless it was revoked."""
        if self._down is not None and self._when_down == "refuse":
            raise self._down_now()
        account = self._by_digest.get(digest)
        if account is None and self._is_there():
            await self._look_for_new()
            account = self._by_digest.get(digest)
        if account is None or account.key.revoked is not None:
            return None
        if account.is_free:
            self._used[account.key.id] = self.now()
        return account

    async def reserve(self, id: str, request: str, least: int, most: int) -> int:
        """Charge a request with as many of `most` tokens as are left, but `least`."""
        account = self._by_id.get(id)
        if account is None:
            raise Unauthorized("This API key is not known here.")
        try:
            reservation = await self._reserve(account, least, most)
        except DatabaseDown:
            if self._when_down == "refuse":
                raise
            reservation = self._reserve_here(account, least, most)
        self._reserved.setdefault(request, deque()).append(reservation)
        return reservation.tokens

    def record(self, record: RequestRecord) -> None:
        """Settle what a request has used."""
        if (reservation := self._taken(record.id)) is not None:
            self._settle(reservation, _used(record, reservation))

    async def list(self) -> Sequence[Account]:
        """Return all keys, oldest first."""
        if self._is_there():
            await self._read()
        return tuple(self._by_id.values())

    async def create(self, new: NewKey, by: str = "") -> tuple[str, Key]:
        """Create a key; return it in plain, and what is kept."""
        plain, key = await self._call(lambda book: book.create(new))
        await self._read(by)
        return plain, key

    async def change(self, id: str, change: KeyChange, by: str = "") -> Key:
        """Change a key."""
        key = await self._call(lambda book: book.change(id, change))
        await self._read(by)
        return key

    async def revoke(self, id: str, by: str = "") -> Key:
        """Revoke a key."""
        key = await self._call(lambda book: book.revoke(id))
        await self._read(by)
        return key

    # The thread.

    def _is_there(self) -> bool:
        return self._path is None or self._book is not None or self._path.exists()

    async def _call(self, work: Callable[[KeyBook], T], *, again: bool = False) -> T:
        """Run `work` in the thread; `again` also if the database did not answer before."""
        if self._down is not None and not again:
            raise self._down_now()
        running = asyncio.get_running_loop().run_in_executor(self._thread, self._work, work)
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await asyncio.shield(running)
        except TimeoutError:
            error = DatabaseDown("The database of the keys is too slow.", retry_after_s=2)
            self._went_down(error)
            raise error from None
        except DatabaseDown as error:
            self._went_down(error)
            raise

    def _work(self, work: Callable[[KeyBook], T]) -> T:
        try:
            if self._book is None:
                self._book = KeyBook(open_database(self._url, self._home))
            return work(self._book)
        except DatabaseDown:
            if self._book is not None:
                self._book.close()
                self._book = None
            raise

    def _down_now(self) -> DatabaseDown:
        return DatabaseDown("The database of the keys does not answer.", retry_after_s=_EVERY_S)

    def _went_down(self, error: DatabaseDown) -> None:
        if self._down is None:
            data = {"reason": error.detail or error.message, "way": self._when_down}
            _log.error("headrace.keys.down", extra={"data": data})
        self._down = error
        self._services.forget()

    # Looking.

    async def _look(self) -> None:
        """Show that this service lives, and read what others have changed."""
        if not self._is_there():
            return
        was_down = self._down is not None
        used, self._used = self._used, {}
        changes = await self._call(lambda book: self._services.look(book, used), again=True)
        if was_down:
            self._down = None
            _log.warning("headrace.keys.back", extra={"data": {"unsettled": len(self._pending)}})
            await self._flush()
            await self._call(partial(self._services.renew, running=self._running()))
        if was_down or changes != self._changes:
            await self._read()
            self._changes = changes

    async def _look_for_new(self) -> None:
        """Read the keys again for one that is not known, but not for each of many wrong ones."""
        if self._down is not None:
            raise self._down_now()
        looking, now = self._looking, time.monotonic()
        if looking is None or (looking.done() and now >= self._looked + _LOOK_AGAIN_S):
            self._looked = now
            looking = self._looking = asyncio.ensure_future(self._read())
        if not looking.done():
            await asyncio.shield(looking)

    async def _read(self, by: str = "another process") -> None:
        accounts = await self._call(lambda book: book.accounts())
        before = {id: account.key for id, account in self._by_id.items()}
        self._by_digest = accounts
        self._by_id = {account.key.id: account for account in accounts.values()}
        if self._changes >= 0 or by != "another process":
            _audit(before, self._by_id, by)
        self.on_read()

    # Reservations.

    async def _reserve(self, account: Account, least: int, most: int) -> _Reservation:
        now, limits, id = self.now(), account.key.limits, account.key.id
        left = account.counts.at(now).tokens_left(limits, now)
        wanted = max(least, min(most, left))
        work = partial(self._services.reserve, id=id, least=least, most=wanted, now=now)
        asking = asyncio.ensure_future(self._call(work))
        try:
            latest, tokens = await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.add_done_callback(partial(self._unwanted, least))
            raise
        self._update(latest)
        return _reservation(latest, least, tokens)

    def _unwanted(self, least: int, asking: asyncio.Future[tuple[Account, int]]) -> None:
        """Take back a reservation whose request has gone."""
        if not asking.cancelled() and asking.exception() is None:
            latest, tokens = asking.result()
            self._settle(_reservation(latest, least, tokens), 0, requests=-1)

    def _reserve_here(self, account: Account, least: int, most: int) -> _Reservation:
        """Reserve by what is known here, to be written later."""
        now, limits = self.now(), account.key.limits
        account.counts = counts = account.counts.at(now)
        counts.check(limits, least, now)
        tokens = min(most, counts.tokens_left(limits, now))
        account.counts = counts.charged(1, tokens, 1)
        reservation = _reservation(account, least, tokens)._replace(is_local=True)
        id, minute, day = reservation[:3]
        self._pending.append(Settlement(id, minute, day, requests=1, tokens=tokens))
        return reservation

    def _update(self, latest: Account) -> None:
        if (known := self._by_id.get(latest.key.id)) is not None:
            known.counts, known.key = latest.counts, latest.key

    def _taken(self, request: str) -> _Reservation | None:
        reservations = self._reserved.get(request)
        if not reservations:
            return None
        reservation = reservations.popleft()
        if not reservations:
            del self._reserved[request]
        return reservation

    def _settle(self, reservation: _Reservation, used: int, requests: int = 0) -> None:
        id, minute, day, tokens, _, is_local = reservation
        settlement = Settlement(id, minute, day, requests, used - tokens, int(not is_local))
        self._pending.append(settlement)
        if self._down is not None or is_local:
            self._apply(settlement._replace(ended=1))
        if self._down is None and self._flushing is None:
            self._flushing = asyncio.ensure_future(self._flush())

    async def _flush(self) -> None:
        """Write all settlements, in order; the rest stays if the database does not answer."""
        try:
            while self._pending and self._down is None:
                settlement = self._pending.popleft()
                try:
                    await self._call(partial(self._services.settle, settlement=settlement))
                    self._apply(settlement)
                except DatabaseDown:
                    # It may have been written: rather count something twice than not at all.
                    if settlement.requests > 0:
                        self._pending.appendleft(settlement)
        finally:
            self._flushing = None

    def _running(self) -> dict[str, int]:
        """Return how many requests of each key hold a place in the database."""
        open_now = (item for items in self._reserved.values() for item in items)
        return dict(Counter(item.id for item in open_now if not item.is_local))

    def _apply(self, settlement: Settlement) -> None:
        """Correct the counts that are known here."""
        account = self._by_id.get(settlement.id)
        if account is None:
            return
        _, minute, day, requests, tokens, ended = settlement
        counts = account.counts
        account.counts = Counts(
            counts.minute,
            counts.minute_requests + (requests if counts.minute == minute else 0),
            counts.minute_tokens + (tokens if counts.minute == minute else 0),
            counts.day,
            counts.day_requests + (requests if counts.day == day else 0),
            counts.day_tokens + (tokens if counts.day == day else 0),
            max(counts.running - ended, 0),
        )


def _reservation(account: Account, least: int, tokens: int) -> _Reservation:
    counts = account.counts
    return _Reservation(account.key.id, counts.minute, counts.day, tokens, least, is_local=False)


def _used(record: RequestRecord, reservation: _Reservation) -> int:
    """Return the tokens that a request has taken.

    One that ended early may not have reported its prompt: then it counts as was estimated.
    """
    if record.outcome == "refused":
        return 0
    usage = record.metrics.usage
    prompt = usage.prompt_tokens
    if not prompt and usage.completion_tokens and record.outcome != "ok":
        prompt = reservation.least
    return prompt + usage.completion_tokens


def _audit(before: Mapping[str, Key], after: Mapping[str, Account], by: str) -> None:
    """Log which keys were created, changed and revoked, and by which key."""
    for id, account in after.items():
        key, known = account.key, before.get(id)
        if known is not None and known.revoked is None and key.revoked is not None:
            event = "revoked"
        elif known is None:
            event = "created"
        elif _settings(known) != _settings(key):
            event = "changed"
        else:
            continue
        data = {"key": id, "name": key.name, "scope": key.scope, "by": by or "local"}
        data |= {"limits": msgspec.to_builtins(key.limits), "models": list(key.models)}
        _log.info(f"headrace.keys.{event}", extra={"data": data})


def _settings(key: Key) -> tuple[object, ...]:
    return key.name, key.limits, key.models
