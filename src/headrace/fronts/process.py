"""FrontProcess: one front, as the process with the models has it."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from starlette.types import ASGIApp

from headrace.core.backend import Admin, Backend
from headrace.core.environment import inherited
from headrace.core.errors import ErrorRecord
from headrace.core.events import Event
from headrace.core.record import Call
from headrace.core.request import AnyRequest
from headrace.fronts.passed import PassedRequest
from headrace.fronts.remote import log
from headrace.fronts.wire import (
    FROM_FRONT,
    Beat,
    Begin,
    Called,
    Done,
    FromFront,
    Left,
    Order,
    Part,
    Pass,
    Served,
    Stop,
    Taken,
)
from headrace.pool.pool import Pool
from headrace.worker.outcome import failure
from headrace.worker.wire import Ask, Cancel, Emitted, Ended, Link, Message


class Monitor(Protocol):
    """Counts what fronts report."""

    def called(self, call: Call) -> None:
        """Count an HTTP request that has ended."""
        ...

    def lagged(self, seconds: float) -> None:
        """Count how late an event loop was."""
        ...


@dataclass(frozen=True)
class Home:
    """What fronts pass requests to. `changed` sends them the models that have changed."""

    backend: Backend
    admin: Admin
    app: ASGIApp
    monitor: Monitor
    changed: Callable[[], None]


class FrontProcess:
    """A front. `gone` is set when its process has ended, and `why`.

    `connections` is how many it has, and `heard` when it last reported, in monotonic seconds.
    """

    def __init__(self, home: Home) -> None:
        self.connections = 0
        self.heard = time.monotonic()
        self.gone = asyncio.Event()
        self.why = ""
        self._home = home
        self._link = Link(FROM_FRONT, receive=self._receive, closed=self._closed)
        self._given, self._theirs = socket.socketpair()
        self._given.setblocking(False)
        self._process: Process | None = None
        self._streams: dict[int, asyncio.Task[Any]] = {}
        self._passed: dict[int, PassedRequest] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self, begin: Begin, served: Served) -> None:
        """Start the process.

        Raises:
            OSError: it cannot be started.
        """
        ours, theirs = socket.socketpair()
        with theirs, self._theirs:
            numbers = (theirs.fileno(), self._theirs.fileno())
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "headrace.fronts.front", *map(str, numbers)),
                    stdin=DEVNULL,
                    pass_fds=numbers,
                    # Images are fetched there, by what TLS trusts here.
                    env=inherited({"SSL_CERT_FILE": None, "SSL_CERT_DIR": None}),
                    # Ctrl-C in a terminal goes to this process alone.
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                self._given.close()
                raise
        await asyncio.get_running_loop().create_connection(lambda: self._link, sock=ours)
        self.send(begin)
        self.send(served)

    def give(self, connection: socket.socket) -> bool:
        """Let it serve a connection; return whether it has room for one now."""
        try:
            socket.send_fds(self._given, [b"\0"], [connection.fileno()])
        except OSError:
            return False
        self.connections += 1
        return True

    def send(self, message: Message) -> None:
        """Send a message."""
        self._link.send(message)

    def stop(self) -> None:
        """Let it end after the answers that are under way."""
        self.send(Stop())

    def kill(self, why: str) -> None:
        """End it at once."""
        self.why = self.why or why
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def _receive(self, messages: Sequence[FromFront]) -> None:
        self.heard = time.monotonic()
        for message in messages:
            self._take(message)

    def _take(self, message: FromFront) -> None:
        match message:
            case Ask(id=number, request=request):
                self._begin(number, failure(self._answer(number, request), log), self._ended)
            case Cancel(id=number):
                if (running := self._streams.get(number)) is not None:
                    running.cancel()
            case Pass():
                self._pass(message)
            case Part() | Taken():
                if (passed := self._passed.get(message.id)) is not None:
                    passed.take(message)
            case Order():
                self._task(self._carry_out(message))
            case _:
                self._count(message)

    def _count(self, message: Left | Called | Beat) -> None:
        match message:
            case Left(count=count):
                self.connections -= count
            case Called(call=call):
                self._home.monitor.called(call)
            case Beat(lags=lags):
                for seconds in lags:
                    self._home.monitor.lagged(seconds)

    def _begin(
        self,
        number: int,
        work: Awaitable[Any],
        ended: Callable[[int, asyncio.Task[Any]], None],
    ) -> None:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)  # type: ignore[assignment]
        self._streams[number] = task
        # Not in the task itself: a task that is cancelled before it starts runs no code.
        task.add_done_callback(partial(ended, number))

    def _ended(self, number: int, task: asyncio.Task[ErrorRecord | None]) -> None:
        del self._streams[number]
        self.send(Ended(number, None if task.cancelled() else task.result()))

    async def _answer(self, number: int, request: AnyRequest) -> None:
        post = self._link.send

        def deliver(event: Event) -> None:
            post(Emitted(number, event))

        backend = self._home.backend
        if isinstance(backend, Pool):
            await backend.relay(request, deliver)
            return
        async with aclosing(backend.ask(request)) as stream:
            async for event in stream:
                deliver(event)

    def _pass(self, message: Pass) -> None:
        changes = message.method not in {"GET", "HEAD"}
        changed = self._home.changed if changes else _nothing
        passed = self._passed[message.id] = PassedRequest(message, self.send, changed)

        def ended(number: int, task: asyncio.Task[None]) -> None:
            del self._streams[number], self._passed[number]
            passed.ended(task)

        self._begin(message.id, passed.run(self._home.app), ended)

    async def _carry_out(self, order: Order) -> None:
        admin = self._home.admin
        action = admin.describe if order.action == "describe" else admin.unload

        async def act() -> None:
            await action(order.model)

        error = await failure(act(), log)
        self._home.changed()
        self.send(Done(order.id, error))

    def _task(self, work: Awaitable[Any]) -> None:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)  # type: ignore[assignment]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _closed(self, why: str) -> None:
        for task in [*self._streams.values(), *self._tasks]:
            task.cancel()
        self._task(self._clean_up(why))

    async def _clean_up(self, why: str) -> None:
        assert self._process is not None, "the connection is made after the process"
        self._given.close()
        # Its connection was closed, so that it ends by itself.
        code = await self._process.wait()
        ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended ({why})"
        self.why = self.why or ended
        self.gone.set()


def _nothing() -> None:
    """Do nothing: the request changes no model."""
