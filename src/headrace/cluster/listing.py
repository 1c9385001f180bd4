"""The list of nodes of what places them, for fronts: one connection for each look.

    front: Hello ▶   ◀ directory: Hello   front: Proof ▶   ◀ directory: Proof, Listing

The greeting is that of a node. A list is only a hint, as that of any directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from headrace.cluster.secure import Member, Refusal, check, proof, verify
from headrace.cluster.strangers import Stranger, Strangers
from headrace.cluster.wire import (
    FROM_DIRECTORY,
    GREETING_TIMEOUT_S,
    GREETINGS,
    MAX_GREETING,
    MAX_LISTING,
    Address,
    Greeting,
    Hello,
    Listing,
    Placed,
    Proof,
    Refused,
)
from headrace.worker.wire import HEADER, Message

_CHECK_S = 1.0


async def fetch(address: Address, member: Member) -> tuple[Placed, ...]:
    """Return the nodes that a directory lists.

    Raises:
        OSError, TimeoutError: it cannot be reached.
        Refusal: it does not accept this front, or this front does not accept it.
    """
    token, hello = member.access.token, member.identity.hello()
    async with asyncio.timeout(GREETING_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(*address, ssl=member.access.client)
        async with _closing(writer):
            await _send(writer, hello)
            other = await _greeting(reader, Hello)
            check(other, "node")
            await _send(writer, Proof(proof(token, "front", hello, other)))
            verify((await _greeting(reader, Proof)).mac, token, "node", hello, other)
            (listing,) = await _receive(reader, FROM_DIRECTORY, MAX_LISTING)
            return listing.nodes


class ListingServer:
    """Answers fronts with what `placed` returns."""

    def __init__(self, member: Member, placed: Callable[[], tuple[Placed, ...]]) -> None:
        self._member = member
        self._placed = placed
        self._strangers = Strangers()

    async def serve(self, listener: socket.socket) -> None:
        """Answer on a socket until cancelled."""
        tls = self._member.access.server
        accepting = asyncio.ensure_future(self._strangers.accept(listener, self._opened, tls))
        try:
            while True:
                await asyncio.sleep(_CHECK_S)
                self._strangers.check(time.monotonic())
        finally:
            accepting.cancel()
            self._strangers.clear()

    def _opened(self, stranger: Stranger) -> asyncio.Protocol:
        async def answer(reader: StreamReader, writer: StreamWriter) -> None:
            def end(_why: str) -> None:
                writer.transport.abort()

            stranger.end = end
            try:
                # It is a stranger to the end, as one who has the token has no reason to stay.
                async with _closing(writer):
                    if stranger in self._strangers:
                        await self._greet(reader, writer)
            except OSError:
                return
            finally:
                self._strangers.remove(stranger)

        return asyncio.StreamReaderProtocol(StreamReader(), answer)

    async def _greet(self, reader: StreamReader, writer: StreamWriter) -> None:
        token, hello = self._member.access.token, self._member.identity.hello()
        try:
            other = await _greeting(reader, Hello)
            check(other, "front")
            await _send(writer, hello)
            verify((await _greeting(reader, Proof)).mac, token, "front", other, hello)
        except Refusal as refusal:
            self._strangers.note("headrace.cluster.refused", "", str(refusal))
            await _send(writer, Refused(str(refusal)))
            return
        await _send(writer, Proof(proof(token, "node", other, hello)))
        await _send(writer, Listing(self._placed()))


@contextlib.asynccontextmanager
async def _closing(writer: StreamWriter) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _send(writer: StreamWriter, message: Message) -> None:
    payload = msgspec.msgpack.encode([message])
    writer.write(HEADER.pack(len(payload)) + payload)
    await writer.drain()


async def _greeting(reader: StreamReader, kind: type[Any]) -> Any:
    """Return the next message of a greeting, which has to be of a kind.

    Raises:
        Refusal: it is another.
    """
    messages: list[Greeting] = await _receive(reader, GREETINGS, MAX_GREETING)
    if len(messages) == 1 and isinstance(messages[0], kind):
        return messages[0]
    refused = [message for message in messages if isinstance(message, Refused)]
    raise Refusal(refused[0].reason if refused else "The greeting is malformed.")


async def _receive(
    reader: StreamReader, decoder: msgspec.msgpack.Decoder[list[Any]], limit: int
) -> list[Any]:
    try:
        (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
        if length <= limit:
            return decoder.decode(await reader.readexactly(length))
    except (EOFError, msgspec.DecodeError) as error:
        raise Refusal("The connection ended, or is not of a cluster.") from error
    raise Refusal(f"A frame of {length} bytes is too long.")
