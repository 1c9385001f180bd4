"""The batches of a service: which run, and the end of their time."""

from __future__ import annotations

import asyncio
import logging
import time

from headrace.api.batch.lines import Fault
from headrace.api.batch.objects import KeptBatch
from headrace.api.batch.run import Run
from headrace.api.batch.store import Store
from headrace.api.exchange import Service

_SWEEP_EVERY_S = 600.0
_log = logging.getLogger("headrace.api")


class Batches:
    """Runs the batches of a store, one of each owner at a time, the oldest first."""

    def __init__(self, store: Store, service: Service) -> None:
        self.store = store
        self.service = service
        self._runs: dict[str, tuple[str, Run]] = {}
        self._tasks = set[asyncio.Task[None]]()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Run batches until this is cancelled; each can then be run from where it is."""
        try:
            swept = float("-inf")
            while True:
                self._changed.clear()
                if time.monotonic() - swept > _SWEEP_EVERY_S:
                    swept = time.monotonic()
                    await self._sweep()
                self._begin()
                try:
                    async with asyncio.timeout(_SWEEP_EVERY_S):
                        await self._changed.wait()
                except TimeoutError:
                    pass
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)

    def changed(self) -> None:
        """Look for what is to be run."""
        self._changed.set()

    async def cancel(self, kept: KeptBatch) -> None:
        """Cancel a batch that is not at its end."""
        await self.store.save_batch(kept.change("cancelling"))
        if kept.batch.id in self._runs:
            self._runs[kept.batch.id][1].cancel()
        self._changed.set()

    async def _sweep(self) -> None:
        try:
            await self.store.sweep()
        except OSError as error:
            _log.warning("Old files of batches are not deleted: %s", error)

    def _begin(self) -> None:
        for kept in self.store.active():
            id, owner = kept.batch.id, kept.owner
            is_busy = any(owner == other for other, _ in self._runs.values())
            if id in self._runs or (is_busy and kept.batch.status != "cancelling"):
                continue
            run = Run(self.store, self.service, kept)
            self._runs[id] = (owner, run)
            task = asyncio.create_task(run.run(), name=f"batch {id}")
            self._tasks.add(task)
            task.add_done_callback(lambda task, id=id: self._ended(task, id))

    def _ended(self, task: asyncio.Task[None], id: str) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        _, run = self._runs.pop(id)
        if (error := task.exception()) is not None:
            _log.error("%s was ended by an error.", id, exc_info=error)
            fault = Fault("internal_error", "The server failed; its log has the reason.")
            failing = asyncio.create_task(run.fail(fault))
            self._tasks.add(failing)
            failing.add_done_callback(self._tasks.discard)
        self._changed.set()
