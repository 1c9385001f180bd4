"""One request on a connection, and its answer: ASGI's `receive` and `send`."""

from __future__ import annotations

import asyncio
import http
import logging
from collections.abc import Awaitable, Iterable
from typing import Protocol

from starlette.types import Message

from headrace.api.framing import Head
from headrace.api.problems import Refused

_log = logging.getLogger("headrace.api")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_STATUS = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode()
    for status in http.HTTPStatus
}


class Client(Protocol):
    """The connection that a request came on, as far as its answer needs it.

    `writable` is done while the client reads what is sent, and `date` the header of that name.
    """

    writable: asyncio.Future[None]

    @property
    def date(self) -> bytes: ...  # noqa: D102

    def resume_reading(self) -> None:
        """Take more from the client, unless too much has been sent behind this request."""


class Transaction:
    """The body of a request while it arrives, and the answer while it is sent.

    `keep_alive` is whether another request may follow, and `failed` whether the framing of the body
    is malformed or too large.
    """

    def __init__(
        self, client: Client, transport: asyncio.Transport, head: Head, *, expects: bool
    ) -> None:
        self.keep_alive = head.keep_alive
        self.failed = False
        self._client = client
        self._transport = transport
        self._version = head.version
        self._method = head.method
        self._expects = expects
        self._parts: list[bytes] = []
        self._read = 0
        self._body = head.body(self._parts.append)
        self._refusals = list[Refused]()
        self._gone = self._delivered = self._started = self._answered = False
        self._chunked = self._bodyless = False
        self._left: int | None = None
        self._arrival: asyncio.Future[None] | None = None

    @property
    def unread(self) -> int:
        """How many bytes of the body have come that the app has not read."""
        return self._body.size - self._read

    @property
    def complete(self) -> bool:
        """Whether the whole request has arrived."""
        return self._body.complete

    def feed(self, data: bytes) -> bytes:
        """Take what belongs to the body, and return what follows it."""
        if self.failed:
            return b""
        try:
            rest = self._body.feed(data)
        except Refused as error:
            self.failed, self.keep_alive, rest = True, False, b""
            self._refusals.append(error)
        if self._answered:
            self._parts.clear()
        self._wake()
        return rest

    def disconnect(self) -> None:
        """Let `receive` return a disconnect, and `send` do nothing."""
        self._gone = True
        self._wake()

    async def receive(self) -> Message:
        """Return what has arrived of the body, or a disconnect.

        Raises:
            Refused: the framing of the body is malformed, or too large.
        """
        if self._expects and not self._started and not self.complete:
            self._transport.write(_CONTINUE)
        self._expects = False
        while not self._is_readable():
            self._client.resume_reading()
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        if self._refusals and not self._gone and not self._answered:
            # Not kept, as its traceback leads back here: it would be a cycle.
            raise self._refusals.pop()
        if self._gone or self._answered or self.failed:
            return {"type": "http.disconnect"}
        body, self._delivered = b"".join(self._parts), self.complete
        self._parts.clear()
        self._read = self._body.size
        self._client.resume_reading()
        return {"type": "http.request", "body": body, "more_body": not self.complete}

    def send(self, message: Message) -> Awaitable[None]:
        """Write a message of the answer; the result is awaited until the client reads.

        Not a coroutine, which would cost each event of a stream one.

        Raises:
            RuntimeError: the message is not in its place.
        """
        if self._gone:
            pass
        elif message["type"] == "http.response.body":
            self._continue(message.get("body", b""), more=message.get("more_body", False))
        else:
            self._start(message["status"], message.get("headers", ()))
        return self._client.writable

    def end(self, task: asyncio.Future[None]) -> None:
        """Complete the answer after the app's end, however it ended."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _log.error("A request failed after its answer had begun.", exc_info=error)
        if self._gone or self._answered or self._transport.is_closing():
            return
        self.keep_alive = False
        if not self._started:
            self._start(500, ((b"content-length", b"0"),))

    def _start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        if self._started:
            raise RuntimeError("An answer has begun already.")
        self._started = True
        lines = [_STATUS[status], self._client.date]
        for name, value in headers:
            lines.append(b"%b: %b\r\n" % (name, value))
            match name.lower():
                case b"content-length":
                    self._left = int(value)
                case b"connection":
                    self.keep_alive = self.keep_alive and b"close" not in value.lower()
                    del lines[-1]
                case _:
                    pass
        lines += self._framing(status)
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
            raise RuntimeError("A header of an answer has a line break in it.")
        self._transport.write(head + b"\r\n")

    def _framing(self, status: int) -> Iterable[bytes]:
        """Decide how the end of the answer is marked, and yield the headers of it."""
        # A client that waits for 100 may send its body or not: what follows could be either.
        self.keep_alive = self.keep_alive and not (self._expects and not self.complete)
        self._bodyless = self._method == "HEAD" or status in {204, 304}
        if self._left is None and not self._bodyless:
            self._chunked = self._version == "1.1"
            self.keep_alive = self.keep_alive and self._chunked
            if self._chunked:
                yield b"transfer-encoding: chunked\r\n"
        if not self.keep_alive:
            yield b"connection: close\r\n"
        elif self._version == "1.0":
            yield b"connection: keep-alive\r\n"

    def _continue(self, body: bytes, *, more: bool) -> None:
        if self._answered or not self._started:
            raise RuntimeError("A part of an answer comes before its start or after its end.")
        if self._chunked:
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
            self._transport.write(body if more else body + b"0\r\n\r\n")
        elif not self._bodyless:
            self._write_plain(body, more=more)
        if not more:
            self._answered = True
            self._wake()

    def _write_plain(self, body: bytes, *, more: bool) -> None:
        if self._left is not None:
            self._left -= len(body)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("The answer is not as long as its Content-Length.")
        self._transport.write(body)

    def _is_readable(self) -> bool:
        if self._gone or self._answered or self.failed or self._parts:
            return True
        return self.complete and not self._delivered

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done() and self._is_readable():
            self._arrival.set_result(None)
