"""The child process: serves one Worker to its parent over the inherited socket."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec

from headrace import engines
from headrace.core import confine
from headrace.core.errors import ErrorRecord, Unsupported, WorkerDied
from headrace.core.model import ModelSpec
from headrace.log import configure
from headrace.machine import (
    Family,
    die_with_parent,
    keep_descendants,
    loop_factory,
    tune_garbage_collection,
)
from headrace.worker.outcome import failure
from headrace.worker.spec import OnProgress, WorkerSpec, localized, open_request
from headrace.worker.wire import (
    Adapt,
    Alive,
    Ask,
    Cancel,
    Close,
    Emitted,
    Ended,
    Link,
    Load,
    Loaded,
    ToChild,
)
from headrace.worker.worker import Worker

log = logging.getLogger("headrace.worker")

_HEARTBEAT_S = 1.0


class Child:
    """Turns messages into calls of the worker, and its events into messages."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._link = Link(
            msgspec.msgpack.Decoder(list[ToChild]), receive=self._receive, closed=self._orphaned
        )
        self._worker: Worker | None = None
        self._spec: WorkerSpec | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: dict[int, asyncio.Task[ErrorRecord | None]] = {}
        self._over = asyncio.Event()

    async def serve(self, connection: socket.socket) -> None:
        """Serve until the parent sends Close. If the parent ends, this process ends at once."""
        await asyncio.get_running_loop().create_connection(lambda: self._link, sock=connection)
        over = self._task(self._over.wait())
        while not over.done():
            worker = self._worker
            self._link.send(Alive(dict(worker.held), worker.drafting) if worker else Alive({}))
            await asyncio.wait({over}, timeout=_HEARTBEAT_S)
        self._link.close()

    def _receive(self, messages: Sequence[ToChild]) -> None:
        for message in messages:
            match message:
                case Ask():
                    self._begin(message.id, self._answer(message))
                case Adapt():
                    self._begin(message.id, self._adapt(message))
                case Cancel(id=number):
                    if (running := self._streams.get(number)) is not None:
                        running.cancel()
                case Load():
                    self._task(self._load(message))
                case Close(drain_s=drain_s):
                    self._task(self._close(drain_s))

    def _task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(self, message: Load) -> None:
        configure(message.log.level, message.log.style)
        os.environ |= message.environment
        worker_spec = self._spec = localized(message.spec)

        def resolved(spec: ModelSpec, on_progress: OnProgress) -> WorkerSpec:
            assert self._spec is not None, "it is set before"
            return self._spec

        if worker_spec.import_from is not None and worker_spec.import_from not in sys.path:
            sys.path.append(worker_spec.import_from)
        content = message.log.content
        self._worker = worker = Worker(worker_spec.model, resolved, log_content=content)
        if error := await failure(self._start(worker, worker_spec, message), log):
            self._link.send(Loaded(None, error))
        else:
            tune_garbage_collection()
            self._link.send(Loaded(worker.models()[0]))

    async def _start(self, worker: Worker, worker_spec: WorkerSpec, message: Load) -> None:
        if message.confine:
            _confine(worker_spec, self._scratch, message.memory_limit)
        await worker.start()

    def _begin(self, number: int, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(failure(work, log))
        self._streams[number] = task
        # Not in the task itself: a task that is cancelled before it starts runs no code.
        task.add_done_callback(lambda task: self._end(number, task))

    def _end(self, number: int, task: asyncio.Task[ErrorRecord | None]) -> None:
        del self._streams[number]
        error = None if task.cancelled() else task.result()
        self._link.send(Ended(number, error))
        if error is not None and error.kind == WorkerDied.__name__:
            # The engine's own process has ended: this one cannot serve any more.
            self._link.flush()
            os._exit(1)

    async def _answer(self, message: Ask) -> None:
        assert self._worker is not None, "requests are sent after the load"
        number, send = message.id, self._link.send
        async with aclosing(self._worker.ask(message.request)) as stream:
            async for event in stream:
                send(Emitted(number, event))

    async def _adapt(self, message: Adapt) -> None:
        assert self._worker is not None, "adapters change after the load"
        self._spec = localized(message.spec)
        if not await self._worker.adapt(self._spec.model):
            raise Unsupported("It takes a new worker.")

    async def _close(self, drain_s: float) -> None:
        if self._worker is not None:
            await self._worker.aclose(drain_s)
        self._over.set()

    def _orphaned(self, why: str) -> None:
        # The parent has ended. The engine may be busy or hung: do not wait for it.
        shutil.rmtree(self._scratch, ignore_errors=True)
        if os.environ.get("TMPDIR") == str(self._scratch):
            Family(os.getpid(), f"TMPDIR={self._scratch}").kill()
        os._exit(0)


def _confine(worker_spec: WorkerSpec, scratch: Path, memory_limit: int | None) -> None:
    """Give up what the engine does not need, before it reads a file of the model."""
    confine.give_up_privileges()
    if memory_limit is not None:
        confine.limit_memory(memory_limit)
    name = worker_spec.engine
    about = engines.about(name)
    if about.confined:
        engines.import_library(name)
        folders = [scratch, *engines.writes(name, open_request(worker_spec))]
        if about.program:
            confine.program_folders[:] = map(str, folders)
            return
        try:
            confine.restrict(folders)
        except OSError as error:
            log.warning("headrace.worker.not_confined", extra={"data": {"error": str(error)}})


def main() -> None:
    """Run with the inherited socket's file descriptor and the scratch directory as arguments."""
    # The closed socket ends it too, but only while the event loop runs.
    die_with_parent()
    keep_descendants()
    connection, scratch = socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2])
    # Not for what it starts: uvloop closes nothing there.
    connection.set_inheritable(False)
    # Python would fall back to another directory if this one were not writable.
    tempfile.tempdir = str(scratch)
    # Wake-ups of uvloop are cheaper, and each takes time on a core from the engine.
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(Child(scratch).serve(connection))


if __name__ == "__main__":
    main()
