"""Serves an ASGI application on a socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket

from starlette.types import ASGIApp

from headrace.api import limits
from headrace.api.connection import Connections

_BACKLOG = 2048
_SWEEP_S = 1.0


class Server:
    """Accepts connections until it is stopped.

    `max_idle` is how many connections without a running request a client's address may have.
    """

    def __init__(self, app: ASGIApp, max_idle: int = limits.MAX_IDLE_CONNECTIONS) -> None:
        self._app = app
        self._max_idle = max_idle
        self._stopping = asyncio.Event()
        self._connections: Connections | None = None

    async def serve(self, listener: socket.socket) -> None:
        """Serve until `stop` is called; then let the answers end, for a short time."""
        loop = asyncio.get_running_loop()
        connections = self._connections = Connections(self._app, self._max_idle)
        sweep = _Sweep(connections)
        accepting = await loop.create_server(connections.open, sock=listener, backlog=_BACKLOG)
        try:
            await self._stopping.wait()
        finally:
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
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limits.CLOSE_TIMEOUT_S):
            await connections.empty.wait()


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
