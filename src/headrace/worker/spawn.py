"""One child process: its start, its messages, its supervision and its cleanup."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil

from headrace.core.environment import NOTHING, inherited
from headrace.core.errors import (
    HeadraceError,
    InvalidRequest,
    LoadFailed,
    Unsupported,
    WorkerDied,
    from_record,
    to_record,
)
from headrace.core.events import Delta, Event, Progress
from headrace.core.model import ModelInfo
from headrace.core.request import AnyRequest
from headrace.core.stream import Mailbox, within
from headrace.machine import Family
from headrace.worker.meter import Received
from headrace.worker.scratch import TMPDIR, Scratch, mark_of, sweep
from headrace.worker.spec import WorkerSpec
from headrace.worker.wire import (
    Adapt,
    Alive,
    Ask,
    Cancel,
    Emitted,
    Ended,
    Link,
    Loaded,
    Message,
    ToParent,
    until_ended,
)

log = logging.getLogger("headrace.worker")

# Made once: it takes milliseconds, and leaves hundreds of reference cycles.
_DECODER = msgspec.msgpack.Decoder(list[ToParent])

_DYING_S = 0.3
_TAIL_LINES = 20
_NO_MEMORY = re.compile(
    r"bad_alloc|MemoryError|memory allocation of|(?i:cannot allocate memory|out of memory)"
    r"|(?i:fail(ed|ure) to (re)?allocat|std::length_error)"
)


class Relay:
    """Takes the events of a stream, and delivers each by a call; `over` is its end.

    An exception of the call is that of `over`. `has_ended` is whether the child is done with it.
    """

    __slots__ = ("_deliver", "has_ended", "over", "received")

    def __init__(self, deliver: Callable[[Event], None]) -> None:
        self.over: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self.has_ended = False
        self.received = Received()
        self._deliver = deliver

    def put(self, item: Event | Ended) -> None:
        """Deliver an event, unless the stream is over."""
        if isinstance(item, Ended):
            self.has_ended = True
            if not self.over.done():
                self.over.set_result(item)
        elif not self.over.done():
            try:
                self.received.saw(item)
                self._deliver(item)
            except Exception as error:  # noqa: BLE001 - raised where the stream is awaited
                self.over.set_exception(error)


class Listener:
    """The parent's end of a stream: where its events go, and when the last of them arrived."""

    __slots__ = ("_choices", "admitted", "mailbox", "number", "received_at", "relay")

    def __init__(self, number: int, choices: int, relay: Relay | None = None) -> None:
        self.number = number
        self._choices = choices
        self.mailbox: Mailbox[Event | Ended] = Mailbox()
        self.relay = relay
        self.received_at = time.monotonic()
        self.admitted = False

    def put(self, event: Event | Ended, now: float) -> None:
        """Queue an event that the child sent."""
        self.received_at = now
        # Of several choices, one can have ended while the next still waits for its slot; an
        # echoed prompt is sent before the request queues, and has no tokens.
        self.admitted = self._choices == 1 and (
            bool(event.token_ids) if type(event) is Delta else isinstance(event, Progress)
        )
        (self.relay or self.mailbox).put(event)


class ChildProcess:
    """A running child. Its end, for whatever reason, fails all streams and the load."""

    def __init__(self, name: str, on_gone: Callable[[WorkerDied], None]) -> None:
        self.name = name
        self.memory: dict[str, int] = {}
        self.drafting: bool | None = None
        self.gone = asyncio.Event()
        self.loaded: asyncio.Future[ModelInfo] = asyncio.get_running_loop().create_future()
        self.family: Family | None = None
        self.memory_limit: int | None = None
        self.link = Link(
            _DECODER,
            receive=self._receive,
            closed=self._connection_lost,
        )
        self._on_gone = on_gone
        self._numbers = itertools.count()
        self._listeners: dict[int, Listener] = {}
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._alive = time.monotonic()
        self._stopped = False
        self._shown: psutil.Process | None = None
        self._verdict: str | None = None
        self._process: Process | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        """Its process id, while it runs."""
        return self._process.pid if self._process and not self.gone.is_set() else None

    @property
    def number(self) -> int | None:
        """Its process id, also after its end."""
        return self._process.pid if self._process else None

    @property
    def open_streams(self) -> int:
        """How many streams are open."""
        return len(self._listeners)

    async def spawn(self, environment: Mapping[str, str | None] = NOTHING) -> None:
        """Start the process and connect to it.

        It gets `environment` beside the variables that all of them inherit; None is the value
        that this process has.
        """
        ours, theirs = socket.socketpair()
        # All temporary files of the child are removed with this directory.
        await asyncio.to_thread(sweep, Path(tempfile.gettempdir()))
        self._scratch = scratch = Scratch()
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    # -P: nothing is imported from the current directory.
                    *(sys.executable, "-P", "-m", "headrace.worker.child"),
                    *(str(theirs.fileno()), str(scratch.path)),
                    stdin=DEVNULL,
                    stdout=DEVNULL,
                    stderr=PIPE,
                    pass_fds=(theirs.fileno(),),
                    env=inherited(environment) | {TMPDIR: str(scratch.path)},
                    # Ctrl-C in a terminal goes to the parent alone, which decides what to do.
                    start_new_session=True,
                )
            self.family = Family(self._process.pid, mark_of(scratch.path))
            await asyncio.get_running_loop().create_connection(lambda: self.link, sock=ours)
        except BaseException:
            ours.close()
            self.kill()
            scratch.remove()
            raise
        self._task(self._follow_stderr(self._process))

    def adopt(self, name: str, on_gone: Callable[[WorkerDied], None]) -> None:
        """Assign a warm process to the model `name`."""
        self.name, self._on_gone = name, on_gone
        self._alive = time.monotonic()

    async def end(self) -> None:
        """Kill the process and wait until it has ended."""
        self.kill()
        await self.gone.wait()
        self.loaded.cancel()
        if not self.loaded.cancelled():
            self.loaded.exception()

    def begin(self, request: AnyRequest, relay: Relay | None = None) -> Listener:
        """Open a stream; its last event is an Ended. A `relay` gets the events.

        Raises:
            InvalidRequest: the request cannot be encoded.
        """
        number = next(self._numbers)
        self.send(Ask(number, request))
        listener = self._listeners[number] = Listener(number, request.slots, relay)
        return listener

    async def adapt(self, spec: WorkerSpec, timeout_s: float) -> bool:
        """Change the adapters to those of `spec`; return False if that takes a new worker.

        A change that is not waited for any more goes on in the child; later ones come after it.

        Raises:
            LoadFailed, OutOfMemory: one cannot be loaded, or it takes longer than `timeout_s`.
            WorkerDied: the child ended meanwhile.
        """
        number, ended = next(self._numbers), list[Event | Ended]()
        listener = self._listeners[number] = Listener(number, 1)

        async def answered() -> None:
            ended.append(await listener.mailbox.get())

        try:
            self.send(Adapt(number, spec))
            if not await within(timeout_s, answered()):
                raise LoadFailed(f"No adapter was loaded within {timeout_s:g} s.")
        finally:
            self.forget(listener)
        record = ended[0].error if isinstance(ended[0], Ended) else None
        if record is not None and record.kind == Unsupported.__name__:
            return False
        if record is not None:
            raise from_record(record)
        return True

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            InvalidRequest: the message cannot be encoded.
        """
        try:
            self.link.send(message)
        except (OverflowError, TypeError, ValueError) as error:
            raise InvalidRequest(f"The request cannot be passed on: {error}") from error

    async def leave(self, listener: Listener, *, timeout_s: float) -> None:
        """Cancel a stream and wait until the child reports that its slot is free."""
        listener.relay = None
        self.link.send(Cancel(listener.number))
        if not await within(timeout_s, until_ended(listener.mailbox)):
            log.warning("headrace.worker.cancel_slow", extra={"data": {"model": self.name}})

    def forget(self, listener: Listener) -> None:
        """Remove a stream."""
        self._listeners.pop(listener.number, None)

    def is_hung(self, limit_s: float) -> bool:
        """Whether there are streams, and the child has sent nothing for `limit_s` seconds."""
        now = time.monotonic()
        streams = self._listeners.values()
        silent = any(stream.admitted and now - stream.received_at > limit_s for stream in streams)
        return silent or (bool(self._listeners) and now - self._alive > limit_s)

    def is_stopped(self) -> bool:
        """Whether a signal has stopped the process, now and at the previous call."""
        before = self._stopped
        try:
            process = self._shown = self._shown or psutil.Process(self.pid)
            self._stopped = process.status() == psutil.STATUS_STOPPED
        except psutil.Error:
            self._stopped = False
        return before and self._stopped

    def kill(self, verdict: str | None = None) -> None:
        """Kill the process; `verdict` is the reported cause. `gone` is set when it has ended."""
        self._verdict = self._verdict or verdict
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def _receive(self, messages: Sequence[ToParent]) -> None:
        self._alive = now = time.monotonic()
        for message in messages:
            if isinstance(message, Emitted):
                if (listener := self._listeners.get(message.id)) is not None:
                    listener.put(message.event, now)
            elif isinstance(message, Ended):
                if (listener := self._listeners.pop(message.id, None)) is not None:
                    listener.put(message, now)
            elif isinstance(message, Alive):
                self.memory, self.drafting = message.memory, message.drafting
            elif not self.loaded.done():
                self._was_loaded(message)

    def _was_loaded(self, message: Loaded) -> None:
        if message.info is not None:
            self.loaded.set_result(message.info)
        elif message.error is not None:
            self.loaded.set_exception(from_record(message.error))

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _connection_lost(self, why: str) -> None:
        self._task(self._clean_up(why))

    async def _clean_up(self, why: str) -> None:
        process = self._process
        assert process is not None, "the connection is made after the process"
        try:
            async with asyncio.timeout(_DYING_S):
                await process.wait()
        except TimeoutError:
            self.kill()
            await process.wait()
        if self.family is not None:
            # What it has started holds its devices, and nothing else ends it.
            await asyncio.to_thread(self.family.kill)
        self._scratch.remove()
        self.gone.set()
        error = WorkerDied(
            f"The worker of {self.name} {self._cause(process.returncode or 0, why)}.",
            detail="\n".join(self._tail) or None,
        )
        self._fail_all(error)
        self._on_gone(error)

    def _cause(self, code: int, why: str) -> str:
        if self._verdict:
            return self._verdict
        if code and self.memory_limit is not None and any(map(_NO_MEMORY.search, self._tail)):
            return f"ran out of memory: it may allocate {self.memory_limit / 1e9:.1f} GB"
        if code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}" if code else f"ended ({why})"

    def fail_streams(self, error: HeadraceError) -> None:
        """End every open stream with an error, independently of the child."""
        record = to_record(error)
        for number, listener in self._listeners.items():
            listener.put(Ended(number, record), time.monotonic())
        self._listeners.clear()

    def _fail_all(self, error: WorkerDied) -> None:
        self.fail_streams(error)
        if not self.loaded.done():
            self.loaded.set_exception(
                LoadFailed(f"{error.message[:-1]} while loading.", detail=error.detail)
            )

    async def _follow_stderr(self, process: Process) -> None:
        assert process.stderr is not None, "stderr is a pipe"
        while line := await _read_line(process.stderr):
            text = line.decode(errors="replace")
            self._tail.append(text.rstrip())
            try:
                sys.stderr.write(text)
                sys.stderr.flush()
            except (OSError, ValueError):
                # A closed terminal is not an error.
                continue


async def _read_line(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.readline()
    except ValueError:
        # Longer than the limit of the reader, which has dropped it.
        return b"...\n"
