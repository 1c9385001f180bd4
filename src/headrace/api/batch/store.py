"""The files and batches of a service, in a folder that is private to its user.

A file is `ID.jsonl` and its record `ID.json`; a batch is a record. What has no record is left over
from a process that was ended: an upload is deleted, the answers of a batch that goes on are kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from headrace.api.batch.objects import ACTIVE, KeptBatch, KeptFile
from headrace.api.batch.work import finished
from headrace.core.private import private_folder, write_atomically

T = TypeVar("T", KeptFile, KeptBatch)

MAX_FILES = 1000
"""Files of one key."""

MAX_ACTIVE = 100
"""Batches of one key that are not at their end."""

MAX_BATCHES = 1000
"""Batches of one key that are remembered."""

REMEMBERED_S = 30 * 86400
"""How long a batch is remembered after its time."""

RESERVE = 64 << 20
"""Bytes of the disk that stay free: a full disk breaks other programs."""

_log = logging.getLogger("headrace.api")


class NoRoom(Exception):
    """Files of batches may not take more of the disk, or there is no more."""


class Store:
    """The records in memory, and their files. `growing` are bytes of files without a record.

    Raises:
        BlockingIOError: another process uses the folder.
        OSError: it cannot be made or read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = private_folder(folder)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        self.growing: dict[str, tuple[str, int]] = {}
        self._writing = asyncio.Lock()
        files = sorted(self._read("file-", KeptFile), key=lambda kept: kept.file.created_at)
        batches = sorted(self._read("batch_", KeptBatch), key=lambda kept: kept.batch.created_at)
        self.files = {kept.file.id: kept for kept in files if self.path(kept.file.id).exists()}
        self.batches = {kept.batch.id: kept for kept in batches}
        needed = {*self.files}
        needed |= {id for kept in self.active() for id in (kept.answers_id, kept.errors_id)}
        for path in self.folder.glob("file-*"):
            if path.name.partition(".")[0] not in needed:
                path.unlink(missing_ok=True)

    def _read(self, prefix: str, kind: type[T]) -> Iterator[T]:
        for path in self.folder.glob(f"{prefix}*.json"):
            try:
                yield msgspec.json.decode(path.read_bytes(), type=kind)
            except (msgspec.MsgspecError, UnicodeError) as error:
                _log.warning("%s is damaged and left out: %s", path, error)
                path.replace(path.with_name(f"damaged-{path.name}"))

    def close(self) -> None:
        """Let another process use the folder. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def path(self, file_id: str) -> Path:
        """Return the place of a file."""
        return self.folder / f"{file_id}.jsonl"

    def active(self) -> list[KeptBatch]:
        """Return the batches that are not at their end, the oldest first."""
        return [kept for kept in self.batches.values() if kept.batch.status in ACTIVE]

    def used(self, owner: str | None = None) -> int:
        """Return the bytes of the files of an owner, or of all."""
        kept = ((kept.owner, kept.file.bytes) for kept in self.files.values())
        sizes: Iterable[tuple[str, int]] = (*kept, *self.growing.values())
        return sum(size for name, size in sizes if owner in (None, name))

    def room(self, owner: str, most: int, *, shared: bool) -> int:
        """Return how many more bytes the files of an owner may have, of `most` for all.

        If it is `shared` with other owners, one has at most half of what the others have left.
        """
        own = self.used(owner)
        left = most - (self.used() - own)
        free = shutil.disk_usage(self.folder).free - RESERVE
        return min(free, (left // 2 if shared else left) - own)

    async def save_file(self, kept: KeptFile) -> None:
        """Keep the record of a file that has been written."""
        path = self.folder / f"{kept.file.id}.json"
        await finished(asyncio.to_thread(write_atomically, path, msgspec.json.encode(kept)))
        self.files[kept.file.id] = kept
        self.growing.pop(kept.file.id, None)

    async def add_batch(self, kept: KeptBatch) -> None:
        """Keep the record of a new batch."""
        path = self.folder / f"{kept.batch.id}.json"
        await finished(asyncio.to_thread(write_atomically, path, msgspec.json.encode(kept)))
        self.batches[kept.batch.id] = kept

    async def save_batch(self, kept: KeptBatch) -> None:
        """Keep the changed record of a batch."""
        id = kept.batch.id
        self.batches[id] = kept
        async with self._writing:
            # The latest: another change may have come before.
            data = msgspec.json.encode(self.batches[id])
            await finished(asyncio.to_thread(write_atomically, self.folder / f"{id}.json", data))

    async def delete_file(self, file_id: str) -> None:
        """Delete a file and its record."""
        self.files.pop(file_id, None)
        self.growing.pop(file_id, None)
        await asyncio.to_thread(self._unlink, f"{file_id}.json", f"{file_id}.jsonl")

    async def sweep(self) -> None:
        """Delete the files whose time is over, and the records of old batches."""
        now = time.time()
        needed = {kept.batch.input_file_id for kept in self.active()}
        for kept in [*self.files.values()]:
            if kept.file.expires_at < now and kept.file.id not in needed:
                await self.delete_file(kept.file.id)
        counts: dict[str, int] = {}
        for kept in reversed([*self.batches.values()]):
            counts[kept.owner] = counts.get(kept.owner, 0) + 1
            is_old = kept.batch.expires_at + REMEMBERED_S < now or counts[kept.owner] > MAX_BATCHES
            if is_old and kept.batch.status not in ACTIVE:
                del self.batches[kept.batch.id]
                await asyncio.to_thread(self._unlink, f"{kept.batch.id}.json")

    def _unlink(self, *names: str) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()
