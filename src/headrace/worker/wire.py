"""The messages between a worker's parent and child, and their framing.

A frame is a big-endian 32-bit length and a msgpack list of messages: all that one side sent in one
iteration of its event loop. For the child these are all deltas of one engine step.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import msgspec

from headrace.core.errors import ErrorRecord
from headrace.core.events import Event
from headrace.core.model import ModelInfo
from headrace.core.request import AnyRequest
from headrace.core.stream import Mailbox
from headrace.log import LogSettings
from headrace.worker.spec import WorkerSpec

HEADER = struct.Struct(">I")
"""What precedes a frame: its length."""
_ARRAY = struct.Struct(">BI")
MAX_FRAME = 256 << 20
"""Bytes; a longer frame is an error of the other side."""
_LARGE = 1 << 20


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of all messages: compact, distinguished by the first element."""


class Load(Message, frozen=True, tag="load"):
    """Parent: load this model. `log` is the configuration of the log.

    `environment` are variables to set before any library of an engine is imported. With `confine`
    the process gives up what it does not need; `memory_limit` is in bytes.
    """

    spec: WorkerSpec
    log: LogSettings
    environment: dict[str, str] = {}
    confine: bool = False
    memory_limit: int | None = None


class Ask(Message, frozen=True, tag="ask"):
    """Parent: begin stream `id`."""

    id: int
    request: AnyRequest


class Adapt(Message, frozen=True, tag="adapt"):
    """Parent: change to the adapters of `spec`, which differs in nothing else.

    The reply is an Ended, with Unsupported if only a new worker can have them.
    """

    id: int
    spec: WorkerSpec


class Cancel(Message, frozen=True, tag="cancel"):
    """Parent: cancel stream `id`. The reply is its Ended."""

    id: int


class Close(Message, frozen=True, tag="close"):
    """Parent: drain for at most `drain_s` seconds, and exit."""

    drain_s: float


class Loaded(Message, frozen=True, tag="loaded"):
    """Child: the model is loaded, or why it could not be; one of the two is None."""

    info: ModelInfo | None
    error: ErrorRecord | None = None


class Emitted(Message, frozen=True, tag="e"):
    """Child: the next event of stream `id`."""

    id: int
    event: Event


class Ended(Message, frozen=True, tag="end"):
    """Child: stream `id` has ended and its slot is free; after its Finish, or with an error."""

    id: int
    error: ErrorRecord | None = None


class Alive(Message, frozen=True, tag="alive"):
    """Child, every second or two: its event loop runs. `memory` is bytes by device.

    `drafting` is as in `ReplicaStatus`.
    """

    memory: dict[str, int]
    drafting: bool | None = None


class _Corked(threading.local):
    """The links of this thread with messages to be sent at the end of a received read.

    None while no link receives.
    """

    links: list[Link[Any]] | None = None


_CORKED = _Corked()

ToChild = Load | Ask | Adapt | Cancel | Close
ToParent = Loaded | Emitted | Ended | Alive
In = TypeVar("In")


class Link(asyncio.Protocol, Generic[In]):
    """One end of the socket pair. Messages of one event loop iteration are sent as one frame.

    What is sent while a link receives is written when all that was read has been received.

    `room` is set unless the other side is behind with reading (`limit_unsent`).
    """

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[list[In]],
        receive: Callable[[Sequence[In]], None],
        closed: Callable[[str], None],
        *,
        limit: int = MAX_FRAME,
        connected: Callable[[], None] | None = None,
    ) -> None:
        self._connected = connected
        self._limit = limit
        self.room = asyncio.Event()
        self.room.set()
        self._decode = decoder.decode
        self._receive = receive
        self._closed = closed
        self._buffer = bytearray()
        self._outbox: list[bytes] = []
        self._encode = msgspec.msgpack.Encoder().encode
        self._why = "the socket was closed"
        self._transport: asyncio.Transport | None = None

    def expect(self, decoder: msgspec.msgpack.Decoder[list[In]], *, limit: int) -> None:
        """Decode the next frames with another decoder, each of up to `limit` bytes."""
        self._decode, self._limit = decoder.decode, limit

    def limit_unsent(self, limit: int) -> None:
        """Clear `room` while more than `limit` bytes wait for the other side to read them."""
        if self._transport is not None:
            self._transport.set_write_buffer_limits(high=limit)

    def pause_writing(self) -> None:
        """Note that too much waits (called by asyncio)."""
        self.room.clear()

    def resume_writing(self) -> None:
        """Note that most has been read (called by asyncio)."""
        self.room.set()

    def send(self, message: Message) -> None:
        """Send a message; it is dropped if the connection is lost.

        Raises:
            OverflowError, TypeError, ValueError: msgpack cannot carry the message.
        """
        # Encoded here, so that a message that cannot be encoded fails for its sender alone.
        encoded = self._encode(message)
        self._outbox.append(encoded)
        if len(encoded) > _LARGE:
            # Several of them could be longer than a frame may be.
            self.flush()
        elif len(self._outbox) == 1:
            if _CORKED.links is not None:
                _CORKED.links.append(self)
            else:
                asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Write all messages of this event loop iteration."""
        outbox, self._outbox = self._outbox, []
        if outbox and self._transport is not None:
            payload = b"".join(outbox)
            length = _ARRAY.size + len(payload)
            self._transport.write(HEADER.pack(length) + _ARRAY.pack(0xDD, len(outbox)) + payload)

    def fail(self, why: str) -> None:
        """End the connection at once, for a reason of this side."""
        self._why = why
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Close the connection after all messages are written."""
        self.flush()
        if self._transport is not None:
            self._transport.close()

    def shut(self) -> None:
        """Close the connection from outside of its event loop, which may be closed."""
        if self._transport is not None:
            with contextlib.suppress(OSError):
                self._transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (called by asyncio)."""
        # uvloop's transports do not derive from asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        if self._connected is not None:
            self._connected()

    def data_received(self, data: bytes) -> None:
        """Split frames; an invalid one closes the connection (called by asyncio)."""
        buffer = self._buffer
        buffer += data
        start = 0
        corked: list[Link[Any]] = []
        _CORKED.links = corked
        try:
            while (end := _frame_end(buffer, start, self._limit)) is not None:
                self._receive(self._decode(buffer[start + HEADER.size : end]))
                start = end
        except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
            start = len(buffer)
            self.fail(f"a frame was not valid: {error}")
        finally:
            _CORKED.links = None
            for link in corked:
                link.flush()
        del buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        """Report why the connection was lost (called by asyncio)."""
        self._transport = None
        self.room.set()
        closed = self._closed
        # The owner has the link and the link its owner, which would be a cycle.
        self._receive = self._closed = _ignore
        self._connected = None
        closed(str(exc) if exc else self._why)


async def until_ended(mailbox: Mailbox[Any]) -> None:
    """Drop the events of a stream until its Ended."""
    while not isinstance(await mailbox.get(), Ended):
        pass


def _ignore(_event: object) -> None:
    """Do nothing."""


def _frame_end(buffer: bytearray, start: int, limit: int) -> int | None:
    if len(buffer) - start < HEADER.size:
        return None
    (length,) = HEADER.unpack_from(buffer, start)
    if length > limit:
        raise msgspec.DecodeError(f"a frame of {length} bytes")
    end = start + HEADER.size + length
    return end if end <= len(buffer) else None
