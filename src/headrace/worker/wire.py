"""The messages between a worker's parent and child, and their framing.

A frame is a big-endian 32-bit length and a msgpack list of messages: everything that one side sent
in one turn of its event loop, which for the child is all deltas of one engine step.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

import msgspec

from headrace.core.errors import ErrorRecord
from headrace.core.events import Event
from headrace.core.model import ModelInfo
from headrace.core.request import AnyRequest
from headrace.log import LogSettings
from headrace.worker.spec import WorkerSpec

_HEADER = struct.Struct(">I")
_ARRAY = struct.Struct(">BI")
MAX_FRAME = 256 << 20
"""Bytes; a longer frame is a fault of the other side."""


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of all messages: compact, told apart by the first element."""


class Load(Message, frozen=True, tag="load"):
    """Parent: load this model. `log` is the configuration of the log, level and format."""

    spec: WorkerSpec
    log: LogSettings


class Ask(Message, frozen=True, tag="ask"):
    """Parent: begin stream `id`."""

    id: int
    request: AnyRequest


class Cancel(Message, frozen=True, tag="cancel"):
    """Parent: stream `id` is not read any more. Answered by its Ended."""

    id: int


class Close(Message, frozen=True, tag="close"):
    """Parent: drain for so many seconds and end."""

    drain_s: float


class Ready(Message, frozen=True, tag="ready"):
    """Child: the model is loaded."""

    info: ModelInfo


class Failed(Message, frozen=True, tag="failed"):
    """Child: the model could not be loaded."""

    error: ErrorRecord


class Said(Message, frozen=True, tag="e"):
    """Child: the next event of stream `id`."""

    id: int
    event: Event


class Ended(Message, frozen=True, tag="end"):
    """Child: stream `id` is over and its slot free; after its Finish, or with an error."""

    id: int
    error: ErrorRecord | None = None


class Alive(Message, frozen=True, tag="alive"):
    """Child, every second or two: its event loop turns. Memory is resident bytes."""

    memory: int


ToChild = Load | Ask | Cancel | Close
ToParent = Ready | Failed | Said | Ended | Alive
In = TypeVar("In")


class Link(asyncio.Protocol, Generic[In]):
    """One end of the socket pair. Messages sent in one turn of the loop leave as one frame."""

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[list[In]],
        receive: Callable[[Sequence[In]], None],
        closed: Callable[[str], None],
    ) -> None:
        self._decode = decoder.decode
        self._receive = receive
        self._closed = closed
        self._buffer = bytearray()
        self._outbox: list[bytes] = []
        self._encode = msgspec.msgpack.Encoder().encode
        self._why = "the socket was closed"
        self._transport: asyncio.Transport | None = None

    def send(self, message: Message) -> None:
        """Send a message; what is sent after the connection is lost is dropped.

        Raises:
            OverflowError, TypeError, ValueError: msgpack cannot carry the message.
        """
        # Encoded here: what cannot be sent is the sender's fault and takes nobody else with it.
        self._outbox.append(self._encode(message))
        if len(self._outbox) == 1:
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Write all messages sent in this turn of the loop."""
        outbox, self._outbox = self._outbox, []
        if outbox and self._transport is not None:
            payload = b"".join(outbox)
            length = _ARRAY.size + len(payload)
            self._transport.write(_HEADER.pack(length) + _ARRAY.pack(0xDD, len(outbox)) + payload)

    def close(self) -> None:
        """Close the connection after everything sent is written."""
        self.flush()
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (called by asyncio)."""
        # uvloop's transports do not derive from asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Split frames; an invalid one closes the connection (called by asyncio)."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while (end := _frame_end(buffer, start)) is not None:
                self._receive(self._decode(buffer[start + _HEADER.size : end]))
                start = end
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            self._why = f"a frame was not valid: {error}"
            start = len(buffer)
            if self._transport is not None:
                self._transport.abort()
        del buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        """Report why the connection was lost (called by asyncio)."""
        self._transport = None
        self._closed(str(exc) if exc else self._why)


def _frame_end(buffer: bytearray, start: int) -> int | None:
    if len(buffer) - start < _HEADER.size:
        return None
    (length,) = _HEADER.unpack_from(buffer, start)
    if length > MAX_FRAME:
        raise msgspec.DecodeError(f"a frame of {length} bytes")
    end = start + _HEADER.size + length
    return end if end <= len(buffer) else None
