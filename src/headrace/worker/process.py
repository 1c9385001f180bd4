"""A worker in a process of its own, and a process that is started before it is needed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Protocol

import msgspec

from headrace.core.environment import NOTHING
from headrace.core.errors import Draining, HeadraceError, LoadFailed, WorkerDied, from_record
from headrace.core.events import Event
from headrace.core.model import ModelInfo, ModelSpec, State
from headrace.core.request import AnyRequest
from headrace.core.stream import within
from headrace.log import LogSettings
from headrace.machine import HOST, process_memory, visibility
from headrace.models.transfer import silent
from headrace.worker.computing import Hangs
from headrace.worker.meter import Received
from headrace.worker.spawn import ChildProcess, Relay
from headrace.worker.spec import (
    OnProgress,
    Resolve,
    WorkerSpec,
    resolved,
    unloaded_info,
)
from headrace.worker.wire import Close, Ended, Load
from headrace.worker.worker import Lifecycle

log = logging.getLogger("headrace.worker")

_QUIET = LogSettings()
_CANCEL_S = 30.0
_LAST_STEP_S = 10.0
_LAST_WORD_S = 1.0
_WATCH_S = 0.25
_FREED_LOOKS, _FREED_STEP_S = 300, 0.05

OnGone = Callable[[WorkerDied], None]


class Spawn(Protocol):
    """Returns a running child for the model of that name, with variables of its own."""

    def __call__(
        self, name: str, on_gone: OnGone, environment: Mapping[str, str | None] = NOTHING
    ) -> Awaitable[ChildProcess]:
        """Return a child that is connected."""
        ...


async def spawn(
    name: str, on_gone: OnGone, environment: Mapping[str, str | None] = NOTHING
) -> ChildProcess:
    """Start a new child."""
    child = ChildProcess(name, on_gone)
    await child.spawn(environment)
    return child


class WorkerProcess:
    """Loads a model in a child process, and detects when the child dies or hangs."""

    def __init__(
        self,
        spec: ModelSpec,
        resolve: Resolve,
        *,
        on_progress: OnProgress | None = None,
        log_settings: LogSettings = _QUIET,
        spawn: Spawn = spawn,
        confine: bool = True,
    ) -> None:
        self.spec = spec
        self.died = asyncio.Event()
        self.failure: HeadraceError | None = None
        self._resolve = resolve
        self._on_progress = on_progress or silent
        self._log_settings = log_settings
        self._spawn = spawn
        self._confine = confine
        self._life = Lifecycle(spec.name)
        self._resolved: WorkerSpec | None = None
        self._info: ModelInfo | None = None
        self._child: ChildProcess | None = None
        self._last: ChildProcess | None = None
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
    def open_streams(self) -> int:
        """How many streams are open."""
        return self._child.open_streams if self._child else 0

    def __repr__(self) -> str:
        """Describe the name, the state and the process."""
        return f"<WorkerProcess {self._life!r}, pid {self.pid}>"

    async def start(self) -> None:
        """Load the model in a new process. Idempotent; callers share one load.

        Raises:
            HeadraceError: as Worker.start; the child has ended.
        """
        await self._life.start(self._load)

    async def ask(self, request: AnyRequest) -> AsyncGenerator[Event, None]:
        """Yield the events of the child's worker. Once the stream is closed, the slot is free.

        Raises:
            WorkerDied: the child ended or hung.
        """
        child = self._ready()
        listener = child.begin(request)
        mailbox, over, progress = listener.mailbox, False, Received()
        try:
            while True:
                while not mailbox:
                    await mailbox.filled()
                event = mailbox.take()
                if isinstance(event, Ended):
                    over = True
                    if event.error is not None:
                        raise self._failed(from_record(event.error), request, progress)
                    return
                progress.saw(event)
                yield event
        finally:
            try:
                if not over:
                    await child.leave(listener, timeout_s=_CANCEL_S)
            finally:
                child.forget(listener)

    async def relay(self, request: AnyRequest, deliver: Callable[[Event], None]) -> None:
        """Deliver the events of a stream by calls, and return at its end; see `ask`.

        An exception of `deliver` ends the stream, and is raised. A call is cheaper than a yield.
        """
        child, relay = self._ready(), Relay(deliver)
        listener = child.begin(request, relay)
        try:
            if (error := (await relay.over).error) is not None:
                raise self._failed(from_record(error), request, relay.received)
        finally:
            try:
                if not relay.has_ended:
                    await child.leave(listener, timeout_s=_CANCEL_S)
            finally:
                child.forget(listener)

    async def adapt(self, spec: ModelSpec) -> bool:
        """Serve a specification that has other adapters; see `PooledWorker`."""
        worker_spec = await resolved(self._resolve, spec, silent)
        if not await self._ready().adapt(worker_spec, spec.load_timeout_s):
            return False
        self.spec, self._resolved = spec, worker_spec
        return True

    def models(self) -> tuple[ModelInfo, ...]:
        """Return the metadata of the one model, at any time."""
        state, child = self._life.state, self._child
        if self._info is None or child is None:
            return (unloaded_info(self.spec, state, self._life.reason, self._resolved),)
        memory = child.memory.get(HOST) or self._info.memory
        reason = self._life.reason
        return (msgspec.structs.replace(self._info, state=state, reason=reason, memory=memory),)

    @property
    def held(self) -> Mapping[str, int]:
        """The memory of the child as it last reported it, in bytes by device."""
        return self._child.memory if self._child else {}

    @property
    def drafting(self) -> bool | None:
        """As in `ReplicaStatus`, as the child last reported it."""
        return self._child.drafting if self._child else None

    async def memory(self) -> dict[str, int]:
        """Return the memory of the child in bytes by device; empty if there is no child.

        After the child has ended, it is what processes that it had started still hold.
        """
        if (child := self._child or self._last) is None:
            return {}
        return await asyncio.to_thread(_memory, child)

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, let running ones end within `drain_s`, end the rest and the child.

        Idempotent. When it returns, the process has ended and its memory is free.
        """
        self._life.state = "draining"
        await self._life.abandon_start()
        if (child := self._child) is not None:
            if child.family is not None:
                # While it lives, it is the parent of all that it has started.
                await asyncio.to_thread(child.family.find)
            child.link.send(Close(drain_s))
            # A hung engine does not end its streams: they fail here.
            if not await within(drain_s + _LAST_WORD_S, child.gone.wait()):
                child.fail_streams(Draining(f"{self.spec.name} is stopping."))
                await within(_LAST_STEP_S, child.gone.wait())
            await child.end()
        if (last := self._last) is not None:
            await _freed(last)
            self._last = None
        if self._watchdog is not None:
            await asyncio.wait({self._watchdog})
        self._child = None
        self._life.state = "stopped"

    def abandon(self) -> None:
        """End the process after its event loop was closed: the lost connection ends it."""
        if self._child is not None:
            self._child.link.shut()

    def _failed(
        self, error: HeadraceError, request: AnyRequest, progress: Received
    ) -> HeadraceError:
        """Return an error with figures; a child that has died cannot report its own."""
        if error.metrics is None:
            error.metrics = msgspec.structs.replace(
                progress.metrics(request),
                engine=self._info.engine if self._info else "",
                worker=self.spec.name,
                model=self.spec.name,
            )
        return error

    def _ready(self) -> ChildProcess:
        self._life.require_ready()
        if self._child is None:
            raise Draining(f"{self.spec.name} is stopping.")
        return self._child

    async def _load(self) -> None:
        began = time.monotonic()
        self._resolved = await resolved(self._resolve, self.spec, self._on_progress)
        self._on_progress("loading", 0, 0)
        child = await self._spawn(self.spec.name, self._on_gone, self.spec.env)
        self._watchdog = asyncio.create_task(self._watch(child))
        try:
            placed = visibility(self._resolved.placed)
            limit = self._resolved.memory_limit if self._confine else None
            child.memory_limit = limit
            load = Load(self._resolved, self._log_settings, placed, self._confine, limit)
            child.link.send(load)
            info = await self._loaded(child)
        except BaseException:
            await child.end()
            raise
        load_ms = (time.monotonic() - began) * 1000
        self._info = msgspec.structs.replace(info, load_ms=load_ms)
        self._child = self._last = child
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
        self.failure = error
        self._child = None
        self.died.set()

    async def _watch(self, child: ChildProcess) -> None:
        hangs = Hangs(child)
        while not child.gone.is_set():
            tasks = self._info.capabilities.tasks if self._info else ("generate",)
            if hangs.is_hung(self.spec.hang_s, encodes="generate" not in tasks):
                child.kill("hung and was killed")
            if child.is_stopped():
                child.kill("was stopped from outside and killed")
            await _passed(_WATCH_S, child.gone)


async def _passed(timeout_s: float, event: asyncio.Event) -> None:
    # Unlike `within` it makes no task, four times a second while nothing happens.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()


async def _freed(child: ChildProcess) -> None:
    # The driver frees the memory of a process some time after its end.
    for _ in range(_FREED_LOOKS):
        if not await asyncio.to_thread(_memory, child):
            return
        await asyncio.sleep(_FREED_STEP_S)


def _memory(child: ChildProcess) -> dict[str, int]:
    """Return the memory of a child, or after its end that of all that it had started."""
    held = process_memory(child.number) if child.number is not None else {}
    if child.family is None:
        return held
    if child.pid is not None:
        child.family.find()
        return held
    left = child.family.memory()
    return {key: held.get(key, 0) + left.get(key, 0) for key in {**held, **left}}


class WarmProcess:
    """Keeps one child started ahead of the next load. All methods belong to one event loop."""

    def __init__(self) -> None:
        self._starting: asyncio.Task[ChildProcess] | None = None
        self._ending: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        """Describe whether there is a process."""
        return f"<WarmProcess {'none' if self._starting is None else 'kept'}>"

    def keep(self, wanted: bool) -> None:
        """Start a process or end it, in the background. Idempotent."""
        starting = self._starting
        if starting is not None and starting.done() and _child(starting) is None:
            self._discard(starting)
            starting = self._starting = None
        if wanted and starting is None:
            self._starting = asyncio.create_task(spawn("(no model)", _ignore), name="spare process")
        elif not wanted and starting is not None:
            self._starting = None
            self._discard(starting)

    async def take(
        self, name: str, on_gone: OnGone, environment: Mapping[str, str | None] = NOTHING
    ) -> ChildProcess:
        """Return a running child for the model `name`: the warm one, or a new one.

        Libraries read some variables when a process starts, so one with variables is new.
        """
        if environment:
            return await spawn(name, on_gone, environment)
        starting, self._starting = self._starting, None
        if starting is not None:
            try:
                await asyncio.wait({starting})
            except asyncio.CancelledError:
                self._discard(starting)
                raise
            if (child := _child(starting)) is not None:
                child.adopt(name, on_gone)
                return child
            self._discard(starting)
        return await spawn(name, on_gone)

    async def aclose(self) -> None:
        """End the process, and wait for it. Idempotent."""
        self.keep(False)
        if self._ending:
            await asyncio.wait(self._ending)

    def _discard(self, starting: asyncio.Task[ChildProcess]) -> None:
        ending = asyncio.create_task(_end(starting), name="end the spare process")
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)


def _child(starting: asyncio.Task[ChildProcess]) -> ChildProcess | None:
    """Return the child, unless it could not be started or has ended."""
    if starting.cancelled() or starting.exception() is not None or starting.result().gone.is_set():
        return None
    return starting.result()


async def _end(starting: asyncio.Task[ChildProcess]) -> None:
    # A process that could not be started has no end to wait for.
    with contextlib.suppress(OSError):
        await (await starting).end()


def _ignore(error: WorkerDied) -> None:
    """Do nothing: no model uses the process yet."""
