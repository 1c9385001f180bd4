"""The HTTP side of llama.cpp's server: a private Unix socket behind a random key."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Generator
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import httptools
import msgspec

from headrace.core.errors import GenerationFailed, HeadraceError, LoadFailed, OutOfMemory
from headrace.engines.llamacpp.call import error_from

SOCKET = "s.sock"
# The kernel's limit on the address of a Unix socket, without the final zero byte.
_MAX_ADDRESS = 107 if sys.platform == "linux" else 103
_TIMEOUT_S = 60.0
_READ = 1 << 18
_DATA = b"data: "
# Time, level, function: "0.00.019 E llama_model_load: error loading model: ...".
_LOG_LINE = re.compile(r"^[\d.]+ E +(?:srv +|cmn +)?(?:[\w~]+(?:\(\))?: +)*(?P<text>.+)$")
_NO_MEMORY = ("bad_alloc", "failed to allocate", "out of memory", "unable to allocate")


class Link:
    """A connection to a server, in a folder and with a key that only this process has.

    `ask` and `stream` call routes of the server at `address`, which is below the open `folder_fd`
    where the folder's own path is too long for a socket.
    """

    def __init__(self, prefix: str = "llamacpp-") -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=prefix))
        self.key = secrets.token_urlsafe(24)
        self.folder_fd: int | None = None
        try:
            self.address = self._short_address()
        except BaseException:
            self.close()
            raise

    def ask(
        self,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = _TIMEOUT_S,
    ) -> Any:
        """Return the answer of a route. Blocking.

        Raises:
            HeadraceError: the server refuses, or does not answer.
        """
        content = None if body is None else msgspec.json.encode(body)
        whole = _Whole()
        with self._connected(path, timeout_s) as connection:
            connection.sendall(self._request(path, content))
            while not whole.is_complete:
                whole.feed(connection.recv(_READ))
        answer = msgspec.json.decode(whole.content)
        if "error" in answer:
            raise error_from(answer["error"])
        return answer

    @contextlib.asynccontextmanager
    async def stream(
        self, path: str, body: bytes, receive: Callable[[bytes | None], None]
    ) -> AsyncGenerator[None]:
        """Send a request, and call `receive` with each event of its answer, at last with None.

        The answer of a server that refuses is one event. After the block the server has ended the
        request.

        Raises:
            HeadraceError: the server cannot be reached.
        """
        try:
            opening = await self._sent(self._request(path, body), receive)
        except OSError as error:
            raise await self.lost(path, f"{type(error).__name__}: {error}") from error
        try:
            # Not to be cancelled: the server has the request, which has to be ended.
            await asyncio.shield(opening)
            yield
        finally:
            transport, events = await opening
            await events.end(transport)

    async def lost(self, path: str, reason: str) -> HeadraceError:
        """Return the error of an answer that is not whole."""
        return await asyncio.to_thread(self._lost, f"{path}: {reason}")

    async def _sent(
        self, request: bytes, receive: Callable[[bytes | None], None]
    ) -> asyncio.Task[tuple[asyncio.WriteTransport, _Events]]:
        """Send a request, and return the opening of its connection to the event loop."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.setblocking(False)
            try:
                connection.connect(self.address)
            except BlockingIOError:
                # So many wait to be accepted that the kernel takes no more at once.
                connection.setblocking(True)
                await asyncio.to_thread(connection.connect, self.address)
                connection.setblocking(False)
            # At once: the server begins with it while the loop prepares the next requests.
            rest = request[connection.send(request) :]
        except BaseException:
            connection.close()
            raise
        return asyncio.ensure_future(_opened(connection, lambda: _Events(receive, rest)))

    @contextlib.contextmanager
    def _connected(self, path: str, timeout_s: float | None) -> Generator[socket.socket]:
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(timeout_s)
                connection.connect(self.address)
                yield connection
        except (OSError, httptools.HttpParserError) as error:
            reason = f"{path}: {type(error).__name__}: {error}"
            raise self._lost(reason) from error

    def _request(self, path: str, content: bytes | None) -> bytes:
        method, body = ("GET", b"") if content is None else ("POST", content)
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Authorization: Bearer {self.key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def _lost(self, reason: str) -> HeadraceError:
        return GenerationFailed("llama.cpp does not answer.", detail=reason)

    def close(self) -> None:
        """Remove the private directory. Idempotent."""
        if self.folder_fd is not None:
            os.close(self.folder_fd)
            self.folder_fd = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _short_address(self) -> str:
        """Return an address for the socket that the kernel accepts."""
        address = str(self.folder / SOCKET)
        if len(os.fsencode(address)) <= _MAX_ADDRESS:
            return address
        if sys.platform != "linux":
            raise LoadFailed(
                f"The directory for temporary files has too long a path for a socket: {address} "
                f"has more than {_MAX_ADDRESS} bytes. Set TMPDIR to a shorter one."
            )
        self.folder_fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self.folder_fd}/{SOCKET}"


def failure(name: str, log: str) -> HeadraceError:
    """Return the error of a failed load; its message has the first error of the log."""
    matches = map(_LOG_LINE.match, log.splitlines())
    reason = next((match["text"] for match in matches if match), log.partition("\n")[0])
    is_memory = any(phrase in log.lower() for phrase in _NO_MEMORY)
    kind = OutOfMemory if is_memory else LoadFailed
    return kind(f"llama.cpp could not load {name}: {reason[:300].rstrip('.')}.", detail=log)


async def _opened(
    connection: socket.socket, new: Callable[[], _Events]
) -> tuple[asyncio.WriteTransport, _Events]:
    try:
        transport, events = await asyncio.get_running_loop().create_unix_connection(
            new, sock=connection
        )
    except BaseException:
        connection.close()
        raise
    # uvloop's transports do not derive from asyncio's.
    return cast("asyncio.WriteTransport", transport), events


class _Whole:
    """An answer that is read to its end before it is used."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.is_complete = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Take what was read.

        Raises:
            ConnectionError: there is no more.
            httptools.HttpParserError: it is not HTTP.
        """
        if not data:
            raise ConnectionError("closed before the end of the answer")
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        """Take a part of the body (called by the parser)."""
        self.content += data

    def on_message_complete(self) -> None:
        """Note the end (called by the parser)."""
        self.is_complete = True


class _Events(asyncio.Protocol):
    """An answer whose events are passed on as they come; `unsent` is the end of its request."""

    def __init__(self, receive: Callable[[bytes | None], None], unsent: bytes) -> None:
        self._receive = receive
        self._unsent = unsent
        self._closed = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.BaseTransport | None = None
        self._rest = b""

    async def end(self, transport: asyncio.WriteTransport) -> None:
        """Close this side, and wait until the server has closed its own."""
        try:
            # It looks once a second whether its client is there.
            if not transport.is_closing():
                transport.write_eof()
            await asyncio.wait({self._closed})
        finally:
            transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport, and send the rest of the request (called by asyncio)."""
        self._transport = transport
        if self._unsent:
            # uvloop's transports do not derive from asyncio's.
            cast("asyncio.WriteTransport", transport).write(self._unsent)
            self._unsent = b""

    def data_received(self, data: bytes) -> None:
        """Take what was read (called by asyncio)."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            if self._transport is not None:
                self._transport.close()

    def on_body(self, data: bytes) -> None:
        """Pass on the events that are whole (called by the parser)."""
        data = self._rest + data
        if self._parser.get_status_code() == HTTPStatus.OK:
            *lines, data = data.split(b"\n")
            for line in lines:
                if line.startswith(_DATA):
                    self._receive(line[len(_DATA) :])
        self._rest = data

    def on_message_complete(self) -> None:
        """Pass on a refusal (called by the parser)."""
        if self._parser.get_status_code() != HTTPStatus.OK:
            self._receive(self._rest)

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end (called by asyncio)."""
        self._receive(None)
        self._closed.set_result(None)
