"""The private socket of llama.cpp's server, with a scripted one behind it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from headrace.core.errors import GenerationFailed, InvalidRequest
from headrace.engines.llamacpp.link import Link

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def link() -> Iterator[Link]:
    link = Link()
    yield link
    link.close()


@asynccontextmanager
async def answering(link: Link, answer: Answer) -> AsyncGenerator[None]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        await reader.readexactly(length)
        await answer(reader, writer)
        writer.close()

    server = await asyncio.start_unix_server(handle, link.address)
    try:
        yield
    finally:
        server.close()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def streamed(link: Link) -> list[bytes | None]:
    events: asyncio.Queue[bytes | None] = asyncio.Queue()
    received: list[bytes | None] = []
    async with link.stream("/completion", b"{}", events.put_nowait):
        while not received or received[-1] is not None:
            received.append(await events.get())
    return received


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_events_are_whole_however_they_are_cut(link: Link, size: int) -> None:
    """Issue 17.2: an event is read by the event loop, without a thread."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        body = b'data: {"a":1}\n\n: remark\n\ndata: {"b":"\xc3\xa9"}\n\ndata: {"c":3}\n\n'
        pieces = [body[at : at + 11] for at in range(0, len(body), 11)]
        whole = HEAD + b"".join(map(chunk, pieces)) + chunk(b"")
        for at in range(0, len(whole), size):
            writer.write(whole[at : at + size])
            await asyncio.sleep(0)

    async with answering(link, answer):
        events = await streamed(link)
    assert events == [b'{"a":1}', b'{"b":"\xc3\xa9"}', b'{"c":3}', None]


async def test_a_refusal_is_one_event(link: Link) -> None:
    body = b'{"error":\n{"type":"invalid_request_error","message":"no"}}'

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 400 Bad Request\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)

    async with answering(link, answer):
        assert await streamed(link) == [body, None]
        with pytest.raises(InvalidRequest, match="no"):
            await asyncio.to_thread(link.ask, "/tokenize", {})


@pytest.mark.parametrize("sent", [b"", HEAD + chunk(b"data: {"), b"not HTTP\r\n\r\n"])
async def test_an_answer_without_an_end(link: Link, sent: bytes) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)

    async with answering(link, answer):
        assert await streamed(link) == [None]
        with pytest.raises(GenerationFailed, match="does not answer"):
            await asyncio.to_thread(link.ask, "/props")


async def test_the_server_has_ended_an_abandoned_request(link: Link) -> None:
    """W18: closing a stream waits until the server has closed its own side."""
    closes, closed = asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(b"data: {}\n\n"))
        assert await reader.read() == b""
        closes.set()
        await closed.wait()

    async with answering(link, answer):
        events: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def abandon() -> None:
            async with link.stream("/completion", b"{}", events.put_nowait):
                await events.get()

        task = asyncio.create_task(abandon())
        await closes.wait()
        assert not task.done()
        closed.set()
        await task


@pytest.mark.parametrize("size", [2, 4 << 20])
async def test_the_server_has_a_request_before_the_loop_goes_on(link: Link, size: int) -> None:
    """Issue 17.2: of many that begin at once, none waits for the preparation of all others.

    W18: one that is cancelled in that moment is ended as any other.
    """
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(link.address)
        server.listen(1)

        async def ask() -> None:
            async with link.stream("/completion", b"x" * size, lambda _: None):
                raise AssertionError("it was cancelled before")

        task = asyncio.create_task(ask())
        await asyncio.sleep(0)
        connection, _ = server.accept()
        received = connection.recv(16 << 10)
        assert received.startswith(b"POST /completion HTTP/1.1\r\n")
        task.cancel()
        while data := await asyncio.to_thread(connection.recv, 1 << 20):
            received += data
        assert received.endswith(b"\r\n\r\n" + b"x" * size)
        assert not task.done()
        connection.close()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_full_queue_of_the_kernel_is_waited_for(link: Link) -> None:
    """Issue 17.2: more requests at once than the server's socket takes."""
    waiting: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(link.address)
        server.listen(0)
        with pytest.raises(BlockingIOError):
            while True:
                waiting.append(socket.socket(socket.AF_UNIX))
                waiting[-1].setblocking(False)
                waiting[-1].connect(link.address)
        events: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def ask() -> None:
            async with link.stream("/completion", b"{}", events.put_nowait):
                assert await events.get() == b"{}"

        task = asyncio.create_task(ask())
        server.setblocking(False)
        loop = asyncio.get_running_loop()
        for _ in waiting[:-1]:
            (await loop.sock_accept(server))[0].close()
        connection, _ = await loop.sock_accept(server)
        await loop.sock_sendall(connection, HEAD + chunk(b"data: {}\n\n"))
        connection.shutdown(socket.SHUT_WR)
        await task
        connection.close()
    for each in waiting:
        each.close()
