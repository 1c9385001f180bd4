"""The process of a front: serves connections that it is given, with models of another process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence

from headrace.api.app import FrontApplication
from headrace.api.bodies import BODIES, KEPT
from headrace.api.exchange import Service
from headrace.api.images import HELD
from headrace.api.server import Server
from headrace.core.confine import give_up_privileges
from headrace.core.record import Call
from headrace.fronts.remote import RemoteApplication, RemoteBackend
from headrace.fronts.wire import (
    TO_FRONT,
    Beat,
    Begin,
    Called,
    Configured,
    Done,
    Left,
    Served,
    Stop,
    ToFront,
)
from headrace.log import configure
from headrace.machine import (
    die_with_parent,
    loop_factory,
    raise_open_files,
    share_malloc_arena,
    shorten_switch_interval,
    tune_garbage_collection,
)
from headrace.worker.wire import Emitted, Ended, Link

_BEAT_S, _LOOK_S = 1.0, 0.25


class Front:
    """Serves the connections that come over `given`."""

    def __init__(self, given: socket.socket) -> None:
        self._given = given
        self._link = Link(TO_FRONT, receive=self._receive, closed=_orphaned)
        self._backend = RemoteBackend(self._link.send)
        self._rest = RemoteApplication(self._link.send)
        self._began: asyncio.Future[Begin] = asyncio.get_running_loop().create_future()
        self._app: FrontApplication | None = None
        self._server: Server | None = None

    async def serve(self, connection: socket.socket) -> None:
        """Serve until the other process sends Stop. If that ends, this process ends at once."""
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self._link, sock=connection)
        begin = await self._began
        server, self._app = self._open(begin)
        self._server = server
        serving = asyncio.ensure_future(server.serve())
        # The server is running when connections come.
        loop.call_soon(loop.add_reader, self._given, self._adopt)
        tune_garbage_collection()
        await self._beat(serving)
        serving.result()
        self._link.close()

    def _open(self, begin: Begin) -> tuple[Server, FrontApplication]:
        configure(begin.log.level, begin.log.style)
        BODIES.shares = KEPT.shares = HELD.shares = begin.fronts
        backend = self._backend
        service = Service(
            backend,
            begin.settings,
            describe=lambda model: backend.order("describe", model),
            unload=lambda model: backend.order("unload", model),
            called=self._called,
        )
        app = FrontApplication(service, self._rest)
        return Server(app, begin.max_idle, lambda: self._link.send(Left(1))), app

    async def _beat(self, serving: asyncio.Future[None]) -> None:
        loop, lags = asyncio.get_running_loop(), list[float]()
        while not serving.done():
            due = loop.time() + _LOOK_S
            await asyncio.wait({serving}, timeout=_LOOK_S)
            lags.append(max(0.0, loop.time() - due))
            if len(lags) >= _BEAT_S / _LOOK_S:
                self._link.send(Beat(tuple(lags)))
                lags.clear()

    def _receive(self, messages: Sequence[ToFront]) -> None:
        for message in messages:
            if isinstance(message, Emitted):
                self._backend.put(message.id, message.event)
            elif isinstance(message, Ended):
                self._backend.put(message.id, message)
            else:
                self._take(message)

    def _take(self, message: ToFront) -> None:
        match message:
            case Begin():
                self._began.set_result(message)
            case Served():
                self._backend.served(message)
            case Configured(settings=settings):
                if self._app is not None:
                    self._app.replace_settings(settings)
            case Done():
                self._backend.done(message)
            case Stop():
                self._stop()
            case Emitted() | Ended():
                pass
            case _:
                self._rest.put(message)

    def _adopt(self) -> None:
        """Take the connections that have come."""
        assert self._server is not None
        with contextlib.suppress(BlockingIOError):
            while (received := socket.recv_fds(self._given, 1, 1))[0]:
                if received[1]:
                    self._server.adopt(socket.socket(fileno=received[1][0]))
                else:
                    # This process has as many open files as it may.
                    self._link.send(Left(1))

    def _called(self, call: Call) -> None:
        self._link.send(Called(call))

    def _stop(self) -> None:
        if self._server is None:
            os._exit(0)
        asyncio.get_running_loop().remove_reader(self._given)
        self._adopt()
        self._server.stop()


def _orphaned(why: str) -> None:
    # Nothing can be answered without the models.
    os._exit(0)


def main() -> None:
    """Run with the descriptors of two inherited sockets as arguments: messages and connections."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Sent to all processes of a service; the one with the models says when to end.
        signal.signal(number, signal.SIG_IGN)
    give_up_privileges()
    raise_open_files()
    share_malloc_arena()
    shorten_switch_interval()
    connection, given = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    given.setblocking(False)
    for inherited in (connection, given):
        inherited.set_inheritable(False)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(connection, given))


async def _serve(connection: socket.socket, given: socket.socket) -> None:
    await Front(given).serve(connection)


if __name__ == "__main__":
    main()
