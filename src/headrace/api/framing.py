"""Where the bytes of a connection become the head of a request, and its body (RFC 9112).

Both are parsed by llhttp as they arrive, each up to the empty line that ends it, so that nothing of
the next request is parsed before this one has been answered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol
from urllib.parse import unquote

import httptools
from starlette.types import Scope

from headrace.api import limits
from headrace.api.problems import Refused, refused

_EMPTY_LINE = b"\r\n\r\n"
_OF_A_BYTE = 16
"""Bytes of framing that a byte of content may have, besides `limits.MAX_FRAMING` in all."""


class Body(Protocol):
    """The framing of a request's body; `size` is how many bytes of content have come."""

    @property
    def size(self) -> int: ...  # noqa: D102

    @property
    def complete(self) -> bool: ...  # noqa: D102

    def feed(self, data: bytes) -> bytes:
        """Take what belongs to the body, and return what follows it.

        Raises:
            Refused: the framing is malformed, or too large.
        """
        ...


class Head:
    """The head of a request; the parser calls its `on_` methods, where each limit holds.

    `started` is whether anything but empty lines has come.
    """

    def __init__(self, target: bytes = b"") -> None:
        self.complete = self.started = False
        self.method = "-"
        self.version = "1.1"
        self.target = target
        self.headers: list[tuple[bytes, bytes]] = []
        self._size = 0

    @property
    def keep_alive(self) -> bool:
        """Whether the client lets the connection stay open after the answer."""
        options = {option.strip() for option in self.value(b"connection").lower().split(b",")}
        if self.version == "1.0":
            return b"keep-alive" in options
        return self.complete and b"close" not in options

    def value(self, name: bytes) -> bytes:
        """Return the values of a header, joined by commas."""
        return b",".join(value for key, value in self.headers if key == name)

    def body(self, write: Callable[[bytes], None]) -> Body:
        """Return the framing of the body, which is passed to `write`.

        Raises:
            Refused: the request has a Transfer-Encoding that is not allowed, or not known here.
        """
        codings = [
            coding.strip() for coding in self.value(b"transfer-encoding").lower().split(b",")
        ]
        if codings == [b""]:
            return Sized(int(self.value(b"content-length") or 0), write)
        if codings[-1] != b"chunked" or self.version == "1.0":
            raise _malformed("Invalid Transfer-Encoding")
        if len(codings) > 1:
            message = "Of all transfer codings only chunked is known here."
            raise refused(501, message, "unknown_transfer_coding")
        return Chunked(write)

    def scope(self) -> Scope:
        """Return what ASGI's scope has of the head.

        Raises:
            Refused: the target is no path.
        """
        target = self.target
        if not target.startswith(b"/") and target != b"*":
            target = _path_of(target)
        raw_path, _, query = target.partition(b"#")[0].partition(b"?")
        path = raw_path.decode("latin-1")
        return {
            "http_version": self.version,
            "method": self.method,
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": query,
            "headers": self.headers,
        }

    def on_message_begin(self) -> None:
        """Note the first byte (called by the parser)."""
        self.started = True

    def on_url(self, part: bytes) -> None:
        """Take a part of the target (called by the parser)."""
        self.target += part
        if len(self.target) > limits.MAX_URL:
            raise refused(414, f"The URL is longer than {limits.MAX_URL} bytes.", "url_too_long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a whole header (called by the parser)."""
        # 4 bytes for what separates name and value, and ends the line.
        self._size += len(name) + len(value) + 4
        if self._size > limits.MAX_HEADER:
            raise _header_too_large()
        if len(self.headers) >= limits.MAX_HEADERS:
            message = f"There are more than {limits.MAX_HEADERS} headers."
            raise refused(431, message, "header_too_large")
        self.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        """Note the end of the head (called by the parser)."""
        self.complete = True


class HeadParser:
    """Parses the head of one request as it arrives."""

    def __init__(self) -> None:
        self.head = Head()
        self._fed = 0
        self._before = b""
        # Not of this object, which would be a cycle.
        self._parser = httptools.HttpRequestParser(self.head)

    def feed(self, data: bytes) -> bytes:
        """Parse up to the end of the head, and return what follows it.

        Raises:
            Refused: 400, 414, 431 or 505.
        """
        start = 0
        while start < len(data) and not self.head.complete:
            end = _section(self._before, data, start)
            self._parse(data[start:end])
            self._fed += end - start
            start = end
            if not self.head.complete and self._fed > limits.MAX_URL + limits.MAX_HEADER:
                raise _header_too_large()
        self._before = (self._before + data[-3:])[-3:]
        if self.head.complete:
            self._check_version()
        return data[start:]

    def _check_version(self) -> None:
        self.head.version = self._parser.get_http_version()
        self.head.method = self._parser.get_method().decode()
        if self.head.version not in {"1.1", "1.0"}:
            raise refused(505, "Only HTTP/1.1 and HTTP/1.0 are spoken here.", "http_version")

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # No protocol is upgraded to, so that the header has no meaning (RFC 9110, 7.8).
            pass
        except httptools.HttpParserError as error:
            raise _refusal(error) from None


class Sized:
    """A body with a Content-Length, or none."""

    def __init__(self, length: int, write: Callable[[bytes], None]) -> None:
        self.size = 0
        self._length = length
        self._write = write

    @property
    def complete(self) -> bool:
        """Whether the body has ended."""
        return self.size == self._length

    def feed(self, data: bytes) -> bytes:
        """Take what belongs to the body, and return what follows it."""
        part = data[: self._length - self.size]
        if part:
            self.size += len(part)
            self._write(part)
        return data[len(part) :]


class Chunked:
    """A chunked body; its extensions and trailers are counted and dropped."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._fed = 0
        self._before = b""
        self._content = _Content(write)
        self._parser = httptools.HttpRequestParser(self._content)
        # llhttp parses a body only behind a head. The client's own is left out, as one with an
        # Upgrade would end the parsing.
        self._parser.feed_data(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")

    @property
    def size(self) -> int:
        """How many bytes of content have come."""
        return self._content.size

    @property
    def complete(self) -> bool:
        """Whether the body has ended."""
        return self._content.complete

    def feed(self, data: bytes) -> bytes:
        """Take what belongs to the body, and return what follows it.

        Raises:
            Refused: the framing is malformed, or too large.
        """
        start, view = 0, memoryview(data)
        while start < len(data) and not self.complete:
            end = _section(self._before, data, start)
            try:
                self._parser.feed_data(view[start:end])
            except httptools.HttpParserError as error:
                raise _refusal(error) from None
            start = end
        self._before = (self._before + data[-3:])[-3:]
        self._fed += start
        if self._fed - self.size > limits.MAX_FRAMING + _OF_A_BYTE * self.size:
            message = "The extensions of the chunks and the trailers are too large."
            raise refused(431, message, "framing_too_large")
        return data[start:]


class _Content:
    """The content of a chunked body, as the parser finds it."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self.size = 0
        self.complete = False
        self._write = write

    def on_body(self, part: bytes) -> None:
        self.size += len(part)
        self._write(part)

    def on_message_complete(self) -> None:
        self.complete = True


def _section(before: bytes, data: bytes, start: int) -> int:
    """Return where the first empty line behind `start` ends, or the length of `data`.

    A head and a chunked body end with one, so up to here there is nothing of the next request.
    `before` is the end of what was received earlier.
    """
    place = (before + data[:3]).find(_EMPTY_LINE)
    if place >= 0 and (end := place + 4 - len(before)) > start:
        return end
    place = data.find(_EMPTY_LINE, max(start - 3, 0))
    return len(data) if place < 0 else place + 4


def _path_of(target: bytes) -> bytes:
    try:
        url = httptools.parse_url(target)
    except httptools.HttpParserInvalidURLError:
        url = None
    if url is None or url.schema not in {b"http", b"https"}:
        raise _malformed("The target is no path")
    return (url.path or b"/") + (b"?" + url.query if url.query else b"")


def _refusal(error: httptools.HttpParserError) -> Refused:
    cause = error.__context__
    return cause if isinstance(cause, Refused) else _malformed(str(error))


def _malformed(reason: str) -> Refused:
    return refused(400, f"This is not HTTP/1.1: {reason}.", "malformed_http")


def _header_too_large() -> Refused:
    message = f"The header is larger than {limits.MAX_HEADER} bytes."
    return refused(431, message, "header_too_large")
