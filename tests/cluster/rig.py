"""Nodes and a front in one process: over sockets, or over a network that a test controls."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from headrace.cluster.directory import StaticDirectory
from headrace.cluster.link import connector
from headrace.cluster.node import NodeServer
from headrace.cluster.pool import ClusterPool
from headrace.cluster.reports import NodeAdmin
from headrace.cluster.secure import Credentials, Identity, Member
from headrace.cluster.wire import Address
from headrace.core.backend import Backend

TOKEN = b"a token of this test"


def member(
    name: str, token: bytes = TOKEN, *, heartbeat_s: float = 0.2, silence_s: float = 2.0
) -> Member:
    access = Credentials(token)
    return Member(Identity(name, f"{name}-1"), access, heartbeat_s=heartbeat_s, silence_s=silence_s)


@contextlib.asynccontextmanager
async def node(
    name: str, backend: Backend, admin: NodeAdmin, **given: Any
) -> AsyncGenerator[tuple[NodeServer, Address]]:
    """Serve a backend on a free port of loopback."""
    server = NodeServer(backend, admin, given.get("member") or member(name))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(listener))
        try:
            yield server, Address(*listener.getsockname())
        finally:
            serving.cancel()
            await asyncio.wait({serving})


@contextlib.asynccontextmanager
async def front(
    addresses: Sequence[Address], given: Member | None = None
) -> AsyncGenerator[ClusterPool]:
    """A front of these addresses, connected or not."""
    me = given or member("front")
    pool = ClusterPool([StaticDirectory(addresses)], me, connector(me.access))
    await pool.start()
    try:
        yield pool
    finally:
        await pool.aclose()


async def until(condition: Callable[[], object], within_s: float = 20.0) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - the state has no event of its own
            await asyncio.sleep(0.01)
