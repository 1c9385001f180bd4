"""One batch of a service, from its validation to its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

from headrace.api.batch.journal import Journal
from headrace.api.batch.lines import (
    Answer,
    Fault,
    Item,
    LineError,
    Tally,
    ahead,
    encode,
    key_of,
    read,
)
from headrace.api.batch.local import ask
from headrace.api.batch.objects import (
    Faults,
    FileObject,
    KeptBatch,
    KeptFile,
    RequestCounts,
    State,
    usage_of,
)
from headrace.api.batch.store import NoRoom, Store
from headrace.api.batch.work import Reply, Work, finished
from headrace.api.exchange import Call, Service

MAX_LINES = 50_000
"""Requests of a batch, as in OpenAI's API."""

_GUESSED_SLOTS = 8
_LOOK_EVERY_S = 1.0
_COMMITTED = 256
_DATABASE_S = 2.0
_log = logging.getLogger("headrace.api")

_UNANSWERED: dict[State, LineError] = {
    "expired": LineError("batch_expired", "The time of the batch ended before this request."),
    "cancelled": LineError("batch_cancelled", "The batch was cancelled before this request."),
}


class Revoked(Exception):
    """The key of a batch is not known any more."""


def _is_known(owner: str, service: Service) -> bool:
    settings, keys = service.settings, service.keys
    hashes = (*settings.api_keys, *settings.admin_keys)
    if any(key.startswith(f"sha256:{owner}") for key in hashes):
        return True
    account = keys.account(owner) if keys is not None else None
    return account is not None and account.key.revoked is None


class Run:
    """Runs a batch from where it is; an end of the process leaves it there, to be run again."""

    def __init__(self, store: Store, service: Service, kept: KeptBatch) -> None:
        self._store = store
        self._service = service
        self._id = kept.batch.id
        self._done = set[bytes]()
        self._tally = Tally()
        self._journals: dict[bool, Journal] = {}
        self._working: asyncio.Task[None] | None = None
        self._slots, self._looked = 1, 0.0

    @property
    def _kept(self) -> KeptBatch:
        return self._store.batches[self._id]

    def cancel(self) -> None:
        """Stop the requests that run, as the batch is cancelled."""
        if self._working is not None:
            self._working.cancel()

    async def run(self) -> None:
        """Bring the batch to its end, and keep that."""
        try:
            if self._kept.batch.in_progress_at is None and not await self._validate():
                return
            await finished(asyncio.to_thread(self._open))
            await self._finish(await self._work())
        except NoRoom as error:
            await self.fail(Fault("storage_full", str(error)))
        except Revoked as error:
            await self.fail(Fault("invalid_api_key", str(error)))
        except OSError as error:
            _log.error("%s cannot go on: %s", self._id, error)
            message = f"A file of the batch cannot be read or written: {error.strerror}."
            await self.fail(Fault("disk_error", message))
        finally:
            for journal in self._journals.values():
                journal.close()

    async def _validate(self) -> bool:
        faults, total, model = await asyncio.to_thread(self._check)
        if faults:
            await self.fail(*faults)
        else:
            counts, is_cancelled = RequestCounts(total), self._kept.batch.status == "cancelling"
            status: State = "cancelling" if is_cancelled else "in_progress"
            kept = self._kept.change(status, request_counts=counts, model=model)
            await self._store.save_batch(kept)
        return not faults

    def _check(self) -> tuple[tuple[Fault, ...], int, str]:
        faults, total, model = list[Fault](), 0, ""
        batch = self._kept.batch
        for item in read(self._store.path(batch.input_file_id), faults, batch.endpoint):
            total += 1
            model = model or item.model
            if total > MAX_LINES:
                message = f"A batch has at most {MAX_LINES} requests."
                faults.append(Fault("too_many_requests", message))
                break
        if not (total or faults):
            faults.append(Fault("empty_file", "The file has no requests."))
        return tuple(faults), total, model

    def _open(self) -> None:
        """Open the files of answers, and read what has been answered."""
        kept = self._kept
        for has_failed, file_id in ((False, kept.answers_id), (True, kept.errors_id)):
            self._journals[has_failed] = Journal(self._store.path(file_id), self._take)
        self._grown()

    def _take(self, answer: Answer) -> None:
        self._done.add(key_of(answer.custom_id))
        self._tally.add(answer)

    def _grown(self) -> None:
        for journal in self._journals.values():
            self._store.growing[journal.path.stem] = (self._kept.owner, journal.size)

    def _items(self) -> Iterator[Item]:
        batch = self._kept.batch
        items = read(self._store.path(batch.input_file_id), endpoint=batch.endpoint)
        return (item for item in items if key_of(item.custom_id) not in self._done)

    async def _work(self) -> State:
        """Send the requests that have no answer; return how the batch ends."""
        batch = self._kept.batch
        if batch.status != "in_progress":
            return "cancelled" if batch.status == "cancelling" else "completed"
        work = Work(self._send, self._commit, self._limit)
        self._working = asyncio.create_task(work.run(ahead(self._items())))
        try:
            await asyncio.wait({self._working}, timeout=max(0.0, batch.expires_at - time.time()))
            if not self._working.done():
                return "expired"
            if self._working.cancelled():
                return "cancelled"
            self._working.result()
            return "completed"
        finally:
            self._working.cancel()
            await asyncio.wait({self._working})

    async def _send(self, item: Item) -> Reply:
        kept = self._kept
        if kept.owner and not _is_known(kept.owner, self._service):
            if (keys := self._service.keys) is not None and not keys.known:
                return Reply(503, "", b"", _DATABASE_S)
            raise Revoked("The key of this batch is not known any more.")
        call = Call(client=kept.owner, is_admin=kept.is_admin, batch=True)
        return await ask(self._service, item.url, item.body, call)

    async def _commit(self, answers: Sequence[Answer]) -> None:
        settings = self._service.settings
        most, shared = settings.max_batch_bytes, settings.has_keys
        size = sum(len(encode(answer)) for answer in answers)
        if self._store.room(self._kept.owner, most, shared=shared) < size:
            raise NoRoom("There is no room for the answers: delete files, or raise the limit.")
        for has_failed, journal in self._journals.items():
            if kind := [answer for answer in answers if answer.has_failed is has_failed]:
                await asyncio.to_thread(journal.commit, kind)
                for answer in kind:
                    self._take(answer)
        self._grown()
        self._store.batches[self._id] = self._kept.change(**self._figures())

    def _figures(self) -> dict[str, Any]:
        tally, total = self._tally, self._kept.batch.request_counts.total
        counts = RequestCounts(total, tally.completed, tally.failed)
        return {"request_counts": counts, "usage": usage_of(tally)}

    def _limit(self) -> int:
        """Return how many requests the model runs at a time."""
        if (now := time.monotonic()) - self._looked > _LOOK_EVERY_S:
            self._looked, name = now, self._kept.batch.model
            served = self._service.backend.models()
            infos = [info for info in served if not name or name in (info.id, *info.aliases)]
            self._slots = next((i.max_running for i in infos if i.max_running), _GUESSED_SLOTS)
        return self._slots

    async def _finish(self, status: State) -> None:
        if (error := _UNANSWERED.get(status)) is not None:
            ids = await asyncio.to_thread(lambda: [item.custom_id for item in self._items()])
            left = [Answer(custom_id=id, error=error) for id in ids]
            for start in range(0, len(left), _COMMITTED):
                await finished(self._commit(left[start : start + _COMMITTED]))
        if status == "completed":
            await self._store.save_batch(self._kept.change("finalizing"))
        named = {
            "output_file_id": await self._keep(has_failed=False),
            "error_file_id": await self._keep(has_failed=True),
        }
        kept = self._kept.change(status, **named, **self._figures())
        await self._store.save_batch(kept)
        counts, seconds = kept.batch.request_counts, time.time() - kept.batch.created_at
        _log.info(
            "%s is %s after %.0f s: %d requests, %d answered, %d failed.",
            *(self._id, status, seconds, counts.total, counts.completed, counts.failed),
        )

    async def _keep(self, *, has_failed: bool) -> str | None:
        """Make a file of answers visible; return its id, or None if there is nothing in it."""
        kept, journal = self._kept, self._journals[has_failed]
        file_id = journal.path.stem
        if not journal.size:
            await self._store.delete_file(file_id)
            return None
        now = int(time.time())
        name = f"{self._id}_{'error' if has_failed else 'output'}.jsonl"
        file = FileObject(
            id=file_id,
            bytes=journal.size,
            created_at=now,
            expires_at=now + kept.lifetime_s,
            filename=name,
            purpose="batch_output",
        )
        await self._store.save_file(KeptFile(owner=kept.owner, file=file))
        return file_id

    async def fail(self, *faults: Fault) -> None:
        """End the batch; what has been answered is kept.

        If that cannot be written, the batch goes on when the service is started again.
        """
        _log.warning("%s has failed: %s", self._id, faults[0].message)
        self._store.batches[self._id] = self._kept.change("failed", errors=Faults(faults))
        try:
            ids = [await self._keep(has_failed=failed) for failed in self._journals]
            named = dict(zip(("output_file_id", "error_file_id"), ids, strict=False))
            await self._store.save_batch(self._kept.change(**named))
        except OSError as error:
            _log.error("The end of %s cannot be written: %s", self._id, error)
