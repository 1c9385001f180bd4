"""/v1/files and /v1/batches. A client sees what its key has made, an admin all."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs

import msgspec

from headrace.api.batch.keeper import Batches
from headrace.api.batch.lines import ENDPOINTS
from headrace.api.batch.objects import (
    ACTIVE,
    Batch,
    BatchList,
    BatchRequest,
    FileDeleted,
    FileForm,
    FileList,
    FileObject,
    KeptBatch,
    KeptFile,
    Lifetime,
    new_id,
)
from headrace.api.batch.store import MAX_ACTIVE, MAX_FILES
from headrace.api.batch.upload import MAX_FILE, Upload, save
from headrace.api.batch.work import finished
from headrace.api.bodies import too_large
from headrace.api.exchange import Call, Exchange, Route, Service
from headrace.api.problems import Refused, refused
from headrace.core.errors import InvalidRequest

K = TypeVar("K", KeptFile, KeptBatch)
L = TypeVar("L", FileObject, Batch)

LIFETIME_S = 30 * 86400
"""How long files are kept, as in OpenAI's API."""

_log = logging.getLogger("headrace.api")
_PIECE = 256 << 10
_PAGES = ("after", "limit")
_MOST_FILES, _MOST_BATCHES = 10_000, 100
_DECODER = msgspec.json.Decoder(BatchRequest)


class BatchRoutes:
    """The handlers of the routes, over the batches of a service; without them, each refuses.

    `why` is the reason then.
    """

    def __init__(self, batches: Batches | None, why: str = "") -> None:
        self._batches = batches
        self._why = why

    def routes(self) -> tuple[Route, ...]:
        """Return the table of the routes."""
        listed = (*_PAGES, "order", "purpose")
        return (
            Route("POST", "/v1/files", self.upload, FileObject, FileForm, form=True),
            Route("GET", "/v1/files", self.list_files, FileList, optional=listed),
            Route("GET", "/v1/files/{id}", self.show_file, FileObject),
            Route("DELETE", "/v1/files/{id}", self.delete_file, FileDeleted),
            Route(
                "GET",
                "/v1/files/{id}/content",
                self.content,
                None,
                texts=("application/octet-stream",),
            ),
            Route("POST", "/v1/batches", self.create, Batch, BatchRequest),
            Route("GET", "/v1/batches", self.list_batches, BatchList, optional=_PAGES),
            Route("GET", "/v1/batches/{id}", self.show, Batch),
            Route("POST", "/v1/batches/{id}/cancel", self.cancel, Batch),
        )

    def _open(self, exchange: Exchange) -> Batches:
        if self._batches is None or not exchange.settings.max_batch_bytes:
            why = self._why or "Batches are switched off here: server.max_batch_bytes is 0."
            raise refused(403, why, "batches_off")
        return self._batches

    async def upload(self, service: Service, exchange: Exchange) -> None:
        """Keep a file of requests for a batch."""
        store = self._open(exchange).store
        owner, settings = exchange.call.client, exchange.settings
        if sum(kept.owner == owner for kept in store.files.values()) >= MAX_FILES:
            raise _full(f"There are {MAX_FILES} files already; delete some.")
        id, others = new_id("file-"), settings.has_keys
        path = store.folder / f"{id}.jsonl"

        def grow(size: int) -> None:
            if size > MAX_FILE:
                raise too_large(MAX_FILE)
            store.growing[id] = (owner, 0)
            if store.room(owner, settings.max_batch_bytes, shared=others) < size:
                raise _full("There is no room for the file: delete others, or raise the limit.")
            store.growing[id] = (owner, size)

        try:
            with _disk_errors():
                form, size = await save(exchange.receive, exchange.headers, path, grow)
                file = _file(id, form, size)
                await store.save_file(KeptFile(owner=owner, file=file))
        except BaseException:
            await store.delete_file(id)
            raise
        await exchange.answer(file)

    async def list_files(self, service: Service, exchange: Exchange) -> None:
        """List the files, the latest first."""
        store, query = self._open(exchange).store, _query(exchange)
        purpose = query.get("purpose")
        files = [
            kept.file
            for kept in _seen(store.files.values(), exchange.call)
            if purpose in (None, kept.file.purpose)
        ]
        page, more = _page(files, query, _MOST_FILES, _MOST_FILES)
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        await exchange.answer(FileList(data=page, first_id=first, last_id=last, has_more=more))

    async def show_file(self, service: Service, exchange: Exchange) -> None:
        """Show a file."""
        await exchange.answer(_find(self._open(exchange).store.files, exchange, "file").file)

    async def delete_file(self, service: Service, exchange: Exchange) -> None:
        """Delete a file."""
        store = self._open(exchange).store
        id = _find(store.files, exchange, "file").file.id
        if users := [kept.batch.id for kept in store.active() if kept.batch.input_file_id == id]:
            message = f"The file has the requests of {users[0]}, which is not at its end."
            raise refused(409, message, "file_in_use")
        await store.delete_file(id)
        await exchange.answer(FileDeleted(id=id))

    async def content(self, service: Service, exchange: Exchange) -> None:
        """Return what is in a file."""
        store = self._open(exchange).store
        file = _find(store.files, exchange, "file").file
        await exchange.unless_gone(_send(exchange, store.path(file.id), file.bytes))

    async def create(self, service: Service, exchange: Exchange) -> None:
        """Run the requests of a file as a batch."""
        batches = self._open(exchange)
        wire = await exchange.read(_DECODER)
        store, call = batches.store, exchange.call
        if wire.endpoint not in ENDPOINTS:
            raise InvalidRequest(f"endpoint is one of {', '.join(ENDPOINTS)}.", param="endpoint")
        file = store.files.get(wire.input_file_id)
        if file is None or not _sees(call, file.owner) or file.file.purpose != "batch":
            message = "No file of requests has this id."
            raise InvalidRequest(message, param="input_file_id")
        if sum(kept.owner == call.client for kept in store.active()) >= MAX_ACTIVE:
            message = f"There are {MAX_ACTIVE} batches already that are not at their end."
            raise refused(429, message, "too_many_batches")
        kept = _kept(wire, call)
        with _disk_errors():
            await store.add_batch(kept)
        batches.changed()
        await exchange.answer(kept.batch)

    async def list_batches(self, service: Service, exchange: Exchange) -> None:
        """List the batches, the latest first."""
        store = self._open(exchange).store
        batches = [kept.batch for kept in _seen(store.batches.values(), exchange.call)]
        page, more = _page(batches, _query(exchange), 20, _MOST_BATCHES)
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        await exchange.answer(BatchList(data=page, first_id=first, last_id=last, has_more=more))

    async def show(self, service: Service, exchange: Exchange) -> None:
        """Show a batch, with how far it is."""
        await exchange.answer(_find(self._open(exchange).store.batches, exchange, "batch").batch)

    async def cancel(self, service: Service, exchange: Exchange) -> None:
        """Cancel a batch; what has been answered is kept."""
        batches = self._open(exchange)
        kept = _find(batches.store.batches, exchange, "batch")
        if kept.batch.status not in ACTIVE:
            message = f"The batch is {kept.batch.status}; it cannot be cancelled."
            raise refused(409, message, "batch_ended")
        if kept.batch.status != "cancelling":
            with _disk_errors():
                await batches.cancel(kept)
        await exchange.answer(batches.store.batches[kept.batch.id].batch)


def _file(id: str, form: Upload, size: int) -> FileObject:
    """Return the file of a form.

    Raises:
        InvalidRequest: a field is wrong.
    """
    fields = form.fields
    if fields.get("purpose") != "batch":
        message = 'purpose must be "batch": files of other purposes are not kept here.'
        raise InvalidRequest(message, param="purpose")
    try:
        seconds = fields.get("expires_after[seconds]", LIFETIME_S)
        lifetime = msgspec.convert(seconds, Lifetime, strict=False)
    except msgspec.ValidationError:
        message = "expires_after[seconds] must be 3600 to 2592000."
        raise InvalidRequest(message, param="expires_after") from None
    now = int(time.time())
    return FileObject(
        id=id,
        bytes=size,
        created_at=now,
        expires_at=now + lifetime,
        filename=form.filename or "file",
        purpose="batch",
    )


def _kept(wire: BatchRequest, call: Call) -> KeptBatch:
    now, expiry = int(time.time()), wire.output_expires_after
    batch = Batch(
        id=new_id("batch_"),
        endpoint=wire.endpoint,
        input_file_id=wire.input_file_id,
        completion_window=wire.completion_window,
        created_at=now,
        expires_at=now + wire.window_s,
        metadata=wire.metadata,
    )
    return KeptBatch(
        owner=call.client,
        is_admin=call.is_admin,
        lifetime_s=expiry.seconds if expiry else LIFETIME_S,
        answers_id=new_id("file-"),
        errors_id=new_id("file-"),
        batch=batch,
    )


def _sees(call: Call, owner: str) -> bool:
    return call.is_admin or owner == call.client


def _seen(kept: Iterable[K], call: Call) -> list[K]:
    """Return what a client sees, the latest first."""
    return [each for each in kept if _sees(call, each.owner)][::-1]


def _find(kept: dict[str, K], exchange: Exchange, kind: str) -> K:
    item = kept.get(exchange.scope["path_params"]["id"])
    if item is None or not _sees(exchange.call, item.owner):
        raise refused(404, f"There is no {kind} with this id.", "not_found")
    return item


def _query(exchange: Exchange) -> dict[str, str]:
    query: bytes = exchange.scope["query_string"]
    return {name: values[-1] for name, values in parse_qs(query.decode("latin-1")).items()}


def _page(
    listed: Sequence[L], query: dict[str, str], default: int, most: int
) -> tuple[list[L], bool]:
    """Return a page of a list, and whether more follows.

    Raises:
        InvalidRequest: a parameter is wrong.
    """
    order, limit, after = query.get("order", "desc"), query.get("limit"), query.get("after")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order is asc or desc.", param="order")
    if limit is not None and not (limit.isascii() and limit.isdigit() and len(limit) < 8):
        raise InvalidRequest(f"limit is 1 to {most}.", param="limit")
    count = default if limit is None else int(limit)
    if not 1 <= count <= most:
        raise InvalidRequest(f"limit is 1 to {most}.", param="limit")
    items = list(listed if order == "desc" else reversed(listed))
    start = 0
    if after:
        start = next((place for place, item in enumerate(items, 1) if item.id == after), 0)
        if not start:
            raise InvalidRequest("Nothing with this id is listed.", param="after")
    return items[start : start + count], len(items) > start + count


def _full(message: str) -> Refused:
    return refused(413, message, "storage_full", ((b"connection", b"close"),))


@contextlib.contextmanager
def _disk_errors() -> Generator[None]:
    """Translate the system's errors of writing.

    Raises:
        Refused: the disk is full, or does not work.
    """
    try:
        yield
    except OSError as error:
        _log.error("Files of batches cannot be written: %s", error)
        message = f"The file cannot be written: {error.strerror}."
        raise refused(507, message, "disk_error", ((b"connection", b"close"),)) from None


async def _send(exchange: Exchange, path: Path, size: int) -> None:
    file = await finished(asyncio.to_thread(path.open, "rb"))
    try:
        length = (b"content-length", b"%d" % size)
        await exchange.start(200, ((b"content-type", b"application/octet-stream"), length))
        while size > 0:
            data = await finished(asyncio.to_thread(file.read, min(_PIECE, size)))
            size -= len(data)
            if not data:
                # It has been cut off: the connection is closed, so that the client sees it.
                raise OSError(f"{path} is shorter than its record says.")
            more = size > 0
            await exchange.send({"type": "http.response.body", "body": data, "more_body": more})
    finally:
        file.close()
