"""The body of a request, read under its limits."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

from starlette.types import Receive

from headrace.api import limits
from headrace.api.problems import Refused, refused


class ClientGone(Exception):
    """The client closed the connection before it was answered."""


async def read_body(receive: Receive, headers: dict[bytes, bytes], limit: int) -> bytes:
    """Return a body of at most `limit` bytes.

    Raises:
        Refused: it is encoded, too large or too slow, or there are too many bytes of others.
        ClientGone: the client has left.
    """
    coding = headers.get(b"content-encoding", b"").strip().lower()
    if coding not in {b"", b"identity"}:
        raise encoded(coding.decode("latin-1"))
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or int(declared[:20]) > limit:
        raise too_large(limit)
    try:
        async with asyncio.timeout(limits.BODY_TIMEOUT_S):
            return await BODIES.read(receive, limit)
    except TimeoutError:
        raise refused(408, "The body was not received in time.", "body_timeout") from None


class Bodies:
    """The bytes of all bodies that are being received, bounded in sum.

    `shares` is how many processes share the bound.
    """

    def __init__(self) -> None:
        self.size = 0
        self.shares = 1

    async def read(self, receive: Receive, limit: int) -> bytes:
        """Return a body.

        Raises:
            Refused: it is too large, or there are too many bytes of others.
            ClientGone: the client has left.
        """
        parts: list[bytes] = []
        size = 0
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                self.size += len(parts[-1])
                if size > limit:
                    raise too_large(limit)
                if not message.get("more_body", False):
                    return b"".join(parts)
                if self._is_full(size) and size > limits.SMALL_BODY:
                    raise _too_many()
        finally:
            self.size -= size

    def _is_full(self, size: int) -> bool:
        """Whether a body of so many bytes is too much; one that is alone never is for a share."""
        is_alone = self.shares > 1 and self.size == size
        return self.size > limits.MAX_BODIES // self.shares and not is_alone


class Kept:
    """The bodies of all requests that run or wait, bounded in sum.

    A key has half of it, or one body. `shares` is how many processes share the bound.
    """

    def __init__(self) -> None:
        self.size = 0
        self.shares = 1
        self._clients: Counter[str] = Counter()

    @contextmanager
    def hold(self, size: int, client: str) -> Generator[None]:
        """Count a body of a client while the context is open.

        Raises:
            Refused: there are too many bytes of others, or of this client.
        """
        if size > limits.SMALL_BODY and self._is_full(size, client):
            message = "The bodies of other requests take all room; try again later."
            raise refused(503, message, "too_many_bodies", ((b"retry-after", b"1"),))
        self.size += size
        self._clients[client] += size
        try:
            yield
        finally:
            self.size -= size
            self._clients[client] -= size
            if not self._clients[client]:
                del self._clients[client]

    def _is_full(self, size: int, client: str) -> bool:
        """Whether a body of so many bytes is too much; one that is alone never is."""
        most, own = limits.MAX_KEPT // self.shares, self._clients[client]
        is_many = bool(client and own) and own + size > most // 2
        return bool(self.size) and (is_many or self.size + size > most)


BODIES = Bodies()
KEPT = Kept()


def encoded(coding: str) -> Refused:
    """Return the error for a body with a content coding."""
    message = f"The body is encoded with {coding}; send it as it is, without a Content-Encoding."
    return refused(
        415, message, "unsupported_content_encoding", ((b"accept-encoding", b"identity"),)
    )


def too_large(limit: int) -> Refused:
    """Return the error for a body of more than `limit` bytes."""
    message = f"The body is larger than {limit} bytes."
    return refused(413, message, "body_too_large", ((b"connection", b"close"),))


def _too_many() -> Refused:
    message = "Too many request bodies are being received; try again later."
    again = ((b"connection", b"close"), (b"retry-after", b"1"))
    return refused(503, message, "too_many_bodies", again)
