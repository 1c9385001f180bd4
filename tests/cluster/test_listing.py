"""The list of nodes that `cluster up` places, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncGenerator, Sequence

import pytest
from tests.cluster.rig import member, until

from headrace.cluster import listing
from headrace.cluster.admin import ClusterAdmin
from headrace.cluster.directory import RayDirectory, directories
from headrace.cluster.link import connector
from headrace.cluster.listing import ListingServer, fetch
from headrace.cluster.pool import ClusterPool
from headrace.cluster.secure import Refusal
from headrace.cluster.wire import MAX_GREETING, Address, Placed
from headrace.config.cluster import ClusterSettings
from headrace.core.errors import ConfigError
from headrace.worker.wire import HEADER

NODES = (
    Placed("a", "127.0.0.1:1", "running"),
    Placed("b", "127.0.0.1:2", "failed", "the file is another here"),
)


@contextlib.asynccontextmanager
async def listed(nodes: Sequence[Placed], port: int = 0) -> AsyncGenerator[Address]:
    server = ListingServer(member("ray"), lambda: tuple(nodes))
    with socket.create_server(("127.0.0.1", port)) as listener:
        serving = asyncio.create_task(server.serve(listener))
        try:
            yield Address(*listener.getsockname())
        finally:
            serving.cancel()
            await asyncio.wait({serving})


async def test_a_front_gets_what_is_placed() -> None:
    """Issue 15.3: addresses, and what `headrace cluster status` shows of each node."""
    me = member("front")
    async with listed(NODES) as address:
        assert await fetch(address, me) == NODES
        pool = ClusterPool([RayDirectory(address, me, 0.01)], me, connector(me.access))
        await pool.start()
        try:
            await until(lambda: len(pool.links) == 2)
            admin = ClusterAdmin(pool, reread=tuple)
            placed = {node.name: node.placed for node in admin.status().nodes}
            assert placed == {"a": "running", "b": "failed: the file is another here"}
        finally:
            await pool.aclose()


async def test_a_list_that_is_gone_or_empty_removes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Issue 15.1: a directory only adds; each error is logged once."""
    me = member("front")
    nodes = [*NODES]
    async with listed(nodes) as address:
        pool = ClusterPool([RayDirectory(address, me, 0.01)], me, connector(me.access))
        await pool.start()
        await until(lambda: len(pool.links) == 2)
        nodes.clear()
        await until(lambda: not pool.placed(Address("127.0.0.1", 1)))
        assert len(pool.links) == 2
        nodes.extend(NODES)
        await until(lambda: pool.placed(Address("127.0.0.1", 1)))
    with caplog.at_level(logging.WARNING, "headrace.cluster"):
        await until(lambda: "lookup_failed" in caplog.text)
        assert len(pool.links) == 2
        later = Placed("c", "127.0.0.1:3", "running")
        async with listed([later], address.port):
            await until(lambda: len(pool.links) == 3)
    await pool.aclose()


async def test_both_sides_prove_themselves() -> None:
    """Issue 15.1: no list without the token, and no front takes one from who has none."""
    async with listed(NODES) as address:
        with pytest.raises(Refusal, match="does not have the token"):
            await fetch(address, member("front", b"another token of this test"))
        assert await fetch(address, member("front")) == NODES


@pytest.mark.parametrize(
    "sent",
    [
        HEADER.pack(MAX_GREETING + 1) + b"x" * 100,
        HEADER.pack(3) + b"abc",
        HEADER.pack(200),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
async def test_what_is_no_greeting(sent: bytes) -> None:
    """A limit holds before the bytes have come; the connection is closed, and others go on."""
    async with listed(NODES) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(sent)
        writer.write_eof()
        answer = await reader.read()
        assert b"listing" not in answer
        writer.close()
        await writer.wait_closed()
        assert await fetch(address, member("front")) == NODES


async def test_silent_strangers_do_not_keep_fronts_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 11.2: 64 of them did, and again and again."""
    monkeypatch.setattr("headrace.cluster.strangers.MAX_STRANGERS", 3)
    async with listed(NODES) as address, contextlib.AsyncExitStack() as stack:
        opened = []
        for _ in range(5):
            reader, writer = await asyncio.open_connection(*address)
            stack.callback(writer.close)
            opened.append(reader)
        async with asyncio.timeout(20):
            assert await opened[0].read() == b""
            assert await fetch(address, member("front")) == NODES


async def test_a_silent_stranger_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.cluster.strangers.GREETING_TIMEOUT_S", 0.1)
    async with listed(NODES) as address:
        reader, writer = await asyncio.open_connection(*address)
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()


async def test_a_list_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with listed(NODES) as address:
        monkeypatch.setattr(listing, "MAX_LISTING", 20)
        with pytest.raises(Refusal, match="too long"):
            await fetch(address, member("front"))


async def test_a_directory_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    over = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        over.set()

    monkeypatch.setattr(listing, "GREETING_TIMEOUT_S", 0.05)
    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        with pytest.raises(TimeoutError):
            await fetch(Address(*server.sockets[0].getsockname()), member("front"))
        # Its end of the connection is closed before the event loop.
        await over.wait()


def test_the_setting() -> None:
    """Issue 15.3: `cluster.ray` is Ray's head; the list is beside it, on a port of its own."""
    (directory,) = directories(ClusterSettings(ray="10.0.0.1:6379"), member("front"))
    assert isinstance(directory, RayDirectory)
    assert vars(directory)["_name"] == Address("10.0.0.1", 11513)
    with pytest.raises(ConfigError, match=r"cluster\.ray"):
        directories(ClusterSettings(), member("front"))
