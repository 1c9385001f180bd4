"""What a client sends without end does not fill the memory of the service."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import psutil
import pytest
from tests.service.serving import Service, served

MB = 1 << 20
KB64 = 1 << 16
LARGEST = 24 * MB
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
NOPE = HEAD.replace(b"/v1/chat/completions", b"/nope")
GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
CHUNK = b"10000\r\n" + b"a" * KB64 + b"\r\n"
EVENTS = b"GET /admin/events HTTP/1.1\r\nhost: localhost\r\n\r\n"

FLOODS = {
    "header lines": (HEAD, b"X: y\r\n" * 10_000, 431),
    "a header's value": (HEAD + b"x: ", b"a" * KB64, 431),
    "a header's name": (HEAD, b"a" * KB64, 431),
    "spaces before a value": (HEAD + b"x:", b" " * KB64, 431),
    "a path": (b"GET /", b"a" * KB64, 414),
    "a query": (b"GET /?", b"a=b&" * 10_000, 414),
    "empty lines": (b"", b"\r\n" * 10_000, 431),
    "spaces in the request line": (b"GET ", b" " * KB64, 431),
    "an extension of a chunk": (CHUNKED + b"5;a=", b"a" * KB64, 431),
    "extensions of chunks": (CHUNKED, (b"1;" + b"a" * 60 + b"=b\r\nx\r\n") * 1000, 431),
    "trailers": (CHUNKED + b"0\r\n", b"X: y\r\n" * 10_000, 431),
    "a trailer's value": (CHUNKED + b"0\r\nx: ", b"a" * KB64, 431),
    "the size of a chunk": (CHUNKED, b"0" * KB64, 431),
    "behind a refusal": (b"NONSENSE\r\n\r\n", b"a" * KB64, 400),
    "a body that is not read": (NOPE + b"content-length: 10000000000\r\n\r\n", b"a" * KB64, 404),
    "chunks that are not read": (NOPE + b"transfer-encoding: chunked\r\n\r\n", CHUNK, 404),
    "a declared body": (HEAD + b"content-length: 10000000000\r\n\r\n", b"a" * KB64, 413),
    "a chunked body": (CHUNKED, CHUNK * 4, 413),
    "requests whose answers are not read": (b"", GET * 1000, 503),
    "requests behind a stream": (EVENTS, GET * 1000, 200),
}


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with served("builtin:echo", environment={"LOG_LEVEL": "error"}) as running:
        yield running


def flood(raw: socket.socket, first: bytes, more: bytes) -> None:
    """Send until it is enough, or refused, or nothing is taken for a second."""
    raw.settimeout(1)
    with contextlib.suppress(OSError):
        raw.sendall(first)
        for _ in range(LARGEST // len(more)):
            raw.sendall(more)


@pytest.mark.parametrize("name", FLOODS)
def test_memory(service: Service, name: str) -> None:
    """Issue 11.1: at most the limit and one read.

    Of 200 MB of each: less than 1 MB is kept, and 15 MB of a body up to its limit of 8 MiB.
    """
    first, more, status = FLOODS[name]
    address = urlsplit(service.url)
    process = psutil.Process(service.process.pid)
    before = peak = process.memory_info().rss
    with socket.create_connection((address.hostname, address.port)) as raw:
        sending = threading.Thread(target=flood, args=(raw, first, more))
        sending.start()
        while sending.is_alive():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.002)
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(12) in {b"HTTP/1.1 %d" % status, b"HTTP/1.1 200"}
    assert peak - before < (24 if "body" in name else 8) * MB


def test_many_silent_connections(service: Service) -> None:
    """Issue 11.2: an address keeps no more than its bound, and others' requests go on."""
    address = urlsplit(service.url)
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(socket.create_connection((address.hostname, address.port)))
            for _ in range(1100)
        ]
        opened[75].settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert opened[75].recv(1) == b""
        opened[-1].sendall(GET)
        assert opened[-1].recv(9) == b"HTTP/1.1 "
