"""A worker in a process of its own, as a Backend like any other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator

import msgspec

from headrace.core.errors import Draining, LoadFailed, WorkerDied, from_record
from headrace.core.events import Event
from headrace.core.model import ModelInfo, ModelSpec, State
from headrace.core.request import AnyRequest
from headrace.log import LogSettings
from headrace.machine import process_memory
from headrace.models.transfer import silent
from headrace.worker.lifecycle import Lifecycle
from headrace.worker.spawn import ChildProcess
from headrace.worker.spec import (
    OnProgress,
    Resolve,
    WorkerSpec,
    resolved,
    unloaded_info,
)
from headrace.worker.warm import Spawn, spawn
from headrace.worker.wire import Close, Ended, Load

log = logging.getLogger("headrace.worker")

_QUIET = LogSettings()
_CANCEL_S = 30.0
_LAST_STEP_S = 10.0
_LAST_WORD_S = 1.0
_WATCH_S = 0.25
_FREED_LOOKS, _FREED_STEP_S = 100, 0.05


class WorkerProcess:
    """Loads its model in a child, and notices when the child dies or hangs."""

    def __init__(
        self,
        spec: ModelSpec,
        resolve: Resolve,
        *,
        on_progress: OnProgress | None = None,
        log_settings: LogSettings = _QUIET,
        spawn: Spawn = spawn,
    ) -> None:
        self.spec = spec
        self.died = asyncio.Event()
        self._resolve = resolve
        self._on_progress = on_progress or silent
        self._log_settings = log_settings
        self._spawn = spawn
        self._life = Lifecycle(spec.name)
        self._found: WorkerSpec | None = None
        self._info: ModelInfo | None = None
        self._child: ChildProcess | None = None
        self._watchdog: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """One of the states of contract W7."""
        return self._life.state

    @property
    def pid(self) -> int | None:
        """Process id of the child, while there is one."""
        return self._child.pid if self._child else None

    @property
    def outstanding(self) -> int:
        """How many streams are open."""
        return self._child.outstanding if self._child else 0

    def __repr__(self) -> str:
        """Tell the name, the state and the process."""
        return f"<WorkerProcess {self._life!r}, pid {self.pid}>"

    async def start(self) -> None:
        """Load the model in a new process. Idempotent; callers share one load.

        Raises:
            HeadraceError: as Worker.start; the child is gone then.
        """
        await self._life.start(self._load)

    async def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        """Yield what the child's worker yields. Once it is closed, the slot is free.

        Raises:
            WorkerDied: the child ended or hung.
        """
        child = self._ready()
        listener = child.begin(request)
        mailbox, over = listener.mailbox, False
        try:
            while True:
                while not mailbox:
                    await mailbox.filled()
                event = mailbox.take()
                if isinstance(event, Ended):
                    over = True
                    if event.error is not None:
                        raise from_record(event.error)
                    return
                yield event
        finally:
            try:
                if not over:
                    await child.leave(listener, timeout_s=_CANCEL_S)
            finally:
                child.forget(listener)

    def models(self) -> tuple[ModelInfo, ...]:
        """Return the metadata of the one model, at any time."""
        state, child = self._life.state, self._child
        if self._info is None or child is None:
            return (unloaded_info(self.spec, state, self._life.reason, self._found),)
        memory = child.memory or self._info.memory
        reason = self._life.reason
        return (msgspec.structs.replace(self._info, state=state, reason=reason, memory=memory),)

    async def memory(self) -> dict[str, int]:
        """Measure what the child holds now: bytes by device; nothing when there is no child."""
        pid = self.pid
        return await asyncio.to_thread(process_memory, pid) if pid is not None else {}

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, let running ones end within `drain_s`, end the rest and the child.

        Idempotent. When it returns the process is gone, and its memory with it.
        """
        self._life.state = "draining"
        await self._life.abandon_start()
        if (child := self._child) is not None:
            pid = child.pid
            child.link.send(Close(drain_s))
            # A hung engine ends nothing by itself: its streams are told here.
            if not await _within(drain_s + _LAST_WORD_S, child.gone):
                child.fail_streams(Draining(f"{self.spec.name} is stopping."))
                await _within(_LAST_STEP_S, child.gone)
            await child.end()
            if pid is not None:
                await _freed(pid)
        if self._watchdog is not None:
            await asyncio.wait({self._watchdog})
        self._child = None
        self._life.state = "stopped"

    def abandon(self) -> None:
        """End the process without its event loop, which is closed: a lost connection ends it."""
        if self._child is not None:
            self._child.link.shut()

    def _ready(self) -> ChildProcess:
        self._life.require_ready()
        if self._child is None:
            raise Draining(f"{self.spec.name} is stopping.")
        return self._child

    async def _load(self) -> None:
        began = time.monotonic()
        self._found = await resolved(self._resolve, self.spec, self._on_progress)
        self._on_progress("loading", 0, 0)
        child = await self._spawn(self.spec.name, self._on_gone)
        self._watchdog = asyncio.create_task(self._watch(child))
        try:
            child.link.send(Load(self._found, self._log_settings))
            info = await self._loaded(child)
        except BaseException:
            await child.end()
            raise
        load_ms = (time.monotonic() - began) * 1000
        self._info = msgspec.structs.replace(info, load_ms=load_ms)
        self._child = child
        self.died.clear()

    async def _loaded(self, child: ChildProcess) -> ModelInfo:
        try:
            async with asyncio.timeout(self.spec.load_timeout_s):
                return await child.loaded
        except TimeoutError as error:
            raise LoadFailed(
                f"{self.spec.name} was not loaded within {self.spec.load_timeout_s:g} s."
            ) from error

    def _on_gone(self, error: WorkerDied) -> None:
        if self._life.state == "ready":
            data = {"model": self.spec.name, "reason": error.message, "stderr": error.detail}
            log.error("headrace.worker.died", extra={"data": data})
            self._life.fail(error.message)
        self._child = None
        self.died.set()

    async def _watch(self, child: ChildProcess) -> None:
        while not child.gone.is_set():
            if child.is_hung(self.spec.hang_s):
                child.kill("hung and was killed")
            if child.is_stopped():
                child.kill("was stopped from outside and killed")
            await _within(_WATCH_S, child.gone)


async def _within(timeout_s: float, event: asyncio.Event) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
    return event.is_set()


async def _freed(pid: int) -> None:
    # The driver takes the memory of a process back after it has ended, not as it ends.
    for _ in range(_FREED_LOOKS):
        if not await asyncio.to_thread(process_memory, pid):
            return
        await asyncio.sleep(_FREED_STEP_S)
