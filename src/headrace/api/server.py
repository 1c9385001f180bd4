"""Serves an ASGI application on a socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp

from headrace.api import limits
from headrace.api.connection import Connections
from headrace.core.stream import within

_BACKLOG = 2048
_SWEEP_S = 1.0


class Server:
    """Accepts connections until it is stopped.

    `max_idle` is how many connections without a running request a client's address may have.
    `closed` is called for each connection that has ended.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_idle: int = limits.MAX_IDLE_CONNECTIONS,
        closed: Callable[[], None] | None = None,
    ) -> None:
        self._app = app
        self._max_idle = max_idle
        self._closed = closed
        self._stopping = asyncio.Event()
        self._connections: Connections | None = None
        self._adopting = set[asyncio.Task[Any]]()

    def adopt(self, connection: socket.socket) -> None:
        """Serve a connection that another process has accepted; `serve` runs."""
        assert self._connections is not None
        loop = asyncio.get_running_loop()
        adopting = loop.connect_accepted_socket(self._connections.open, connection)
        task = asyncio.ensure_future(adopting)
        self._adopting.add(task)
        task.add_done_callback(self._adopted)

    def _adopted(self, task: asyncio.Task[Any]) -> None:
        self._adopting.discard(task)
        # A client that has left already.
        if not task.cancelled() and task.exception() is not None and self._closed is not None:
            self._closed()

    async def serve(self, listener: socket.socket | None = None) -> None:
        """Serve until `stop` is called; then let the answers end, for a short time.

        Without a listener, the connections are those that `adopt` gets.
        """
        loop = asyncio.get_running_loop()
        connections = self._connections = Connections(self._app, self._max_idle, self._closed)
        sweep = _Sweep(connections)
        accepting = None
        if listener is not None:
            accepting = await loop.create_server(connections.open, sock=listener, backlog=_BACKLOG)
        try:
            await self._stopping.wait()
        finally:
            if accepting is not None:
                accepting.close()
            connections.shutdown()
            await _until_empty(connections)
            connections.abort()
            await _until_empty(connections)
            sweep.cancel()

    def stop(self) -> None:
        """Accept no more connections, and close each after its answer."""
        self._stopping.set()

    def abort(self) -> None:
        """Close all connections, and cancel their requests."""
        if self._connections is not None:
            self._connections.abort()


async def _until_empty(connections: Connections) -> None:
    await within(limits.CLOSE_TIMEOUT_S, connections.empty.wait())


class _Sweep:
    """Looks after the deadlines of connections, until it is cancelled."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._again()

    def cancel(self) -> None:
        """Stop."""
        self._next.cancel()

    def _again(self) -> None:
        # Set before anything that could fail: the deadlines of all hang on it.
        self._next = asyncio.get_running_loop().call_later(_SWEEP_S, self._again)
        self._connections.sweep()
