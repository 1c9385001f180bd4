"""HTTP/1.1 for a load client, with little work for each chunk and a timestamp on arrival.

A general client takes longer for a chunk than some servers need to produce one; on a machine that
runs both, its work would distort the figures.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import httptools
import msgspec

from headrace import __version__
from headrace.core.errors import ConfigError

Headers = dict[str, str]

_FETCH_S = 30.0


class Broken(Exception):
    """There is no complete answer. `kind` is `connect`, `disconnected` or `malformed`."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


class Sink(Protocol):
    """Receives an answer in pieces; `at` is a time of `time.perf_counter`, one for each read."""

    def head(self, status: int, headers: Headers) -> None:
        """Receive the status and the headers, their names in lower case."""
        ...

    def body(self, data: bytes, at: float) -> None:
        """Receive a piece of the body: the part of a chunk that was in one read."""
        ...


class Place(NamedTuple):
    """The address of a service. `base` is the path before /chat/completions."""

    host: str
    port: int
    base: str
    tls: bool

    @property
    def root(self) -> str:
        """The path before /tokenize."""
        return self.base.removesuffix("/v1")

    @property
    def authority(self) -> str:
        """Host and port, as in a URL."""
        return f"{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    @property
    def name(self) -> str:
        """The URL without secrets."""
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.base}"

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


def place(url: str) -> Place:
    """Parse the URL of a service, with or without /v1.

    Raises:
        ConfigError: it is not one.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"flag --url: {url} is no URL: {error}.", param="url") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ConfigError(f"flag --url: {url} is not like http://HOST:PORT/v1.", param="url")
    tls = parts.scheme == "https"
    base = parts.path.rstrip("/") or "/v1"
    return Place(parts.hostname, port or (443 if tls else 80), base, tls)


class Http:
    """A pool of connections to one service, each for one request at a time."""

    def __init__(self, address: Place, key: str | None = None) -> None:
        self.place = address
        self._key = key
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._tls = ssl.create_default_context() if address.tls else None

    async def send(self, path: str, body: bytes, sink: Sink) -> None:
        """Send a request (a GET without a body) and pass the answer to `sink` until its end.

        Raises:
            Broken: there is no connection, or it was lost.
        """
        request = self._request(path, body)
        while self._idle:
            if await self._ask(self._idle.pop(), request, sink):
                return
        if not await self._ask(await self._connect(), request, sink):
            raise Broken("disconnected", "the connection was closed before the answer began")

    async def fetch(
        self, path: str, body: object = None, *, within_s: float = _FETCH_S
    ) -> tuple[int, bytes]:
        """Return status and body of a short answer; with `body`, as JSON, it is a POST.

        Raises:
            Broken: there is no connection, it was lost, or there is no answer `within_s`.
        """
        whole = Whole()
        try:
            async with asyncio.timeout(within_s):
                await self.send(path, b"" if body is None else msgspec.json.encode(body), whole)
        except TimeoutError:
            raise Broken("timeout", f"no answer within {within_s:g} s") from None
        return whole.status, bytes(whole.data)

    def close(self) -> None:
        """Close all connections, also those that wait for an answer."""
        for connection in list(self._open):
            connection.close()
        self._idle.clear()

    async def _ask(self, connection: _Connection, request: bytes, sink: Sink) -> bool:
        """Return False if the server had closed the connection before the request."""
        try:
            done = await connection.ask(request, sink)
        except BaseException:
            connection.close()
            raise
        finally:
            if connection.closed:
                self._open.discard(connection)
        if done and not connection.closed:
            self._idle.append(connection)
        return done

    async def _connect(self) -> _Connection:
        loop, (host, port, _, tls) = asyncio.get_running_loop(), self.place
        try:
            _, connection = await loop.create_connection(
                _Connection, host, port, ssl=self._tls, server_hostname=host if tls else None
            )
        except OSError as error:
            raise Broken("connect", error.strerror or str(error)) from None
        self._open.add(connection)
        return connection

    def _request(self, path: str, body: bytes) -> bytes:
        lines = [
            f"{'POST' if body else 'GET'} {path} HTTP/1.1",
            f"Host: {self.place.authority}",
            f"User-Agent: headrace-bench/{__version__}",
            "Accept: text/event-stream, application/json",
            *([f"Authorization: Bearer {self._key}"] if self._key else []),
            *([f"Content-Type: application/json\r\nContent-Length: {len(body)}"] if body else []),
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


class Whole:
    """Keeps a short answer."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Headers = {}
        self.data = bytearray()

    def head(self, status: int, headers: Headers) -> None:
        """Keep status and headers."""
        self.status, self.headers = status, headers

    def body(self, data: bytes, at: float) -> None:
        """Keep a piece."""
        self.data += data


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.closed = False
        self._transport: Any = None
        self._parser = httptools.HttpResponseParser(self)
        self._sink: Sink | None = None
        self._headers: Headers = {}
        self._done: asyncio.Future[bool] | None = None
        self._begun = False
        self._kept = True
        self._now = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    async def ask(self, request: bytes, sink: Sink) -> bool:
        if self.closed:
            return False
        self._sink, self._headers, self._begun = sink, {}, False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._done

    def close(self) -> None:
        self.closed = True
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self._begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            fault = error.__context__ if error.__context__ is not None else error
            self._end(Broken("malformed", f"{type(fault).__name__}: {fault}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._done is None or self._done.done():
            return
        if not self._begun:
            self._end(False)
        elif self._kept:
            self._end(Broken("disconnected", str(exc) if exc else "closed in the middle"))
        else:
            self._end(True)

    # The methods below are called by the parser.
    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._kept = self._parser.should_keep_alive()
        if self._sink is not None:
            self._sink.head(self._parser.get_status_code(), self._headers)

    def on_body(self, data: bytes) -> None:
        if self._sink is not None:
            self._sink.body(data, self._now)

    def on_message_complete(self) -> None:
        if not self._kept:
            self.closed = True
            self._transport.close()
        self._end(True)

    def _end(self, outcome: bool | Broken) -> None:
        self._sink = None
        if self._done is None or self._done.done():
            return
        if isinstance(outcome, Broken):
            self.close()
            self._done.set_exception(outcome)
        else:
            self._done.set_result(outcome)
