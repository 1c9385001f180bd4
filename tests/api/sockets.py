"""A server on a real socket, and a client that sends bytes as they are."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import uvloop
from tests.api.fakes import FakeBackend

from headrace.api.app import create_app
from headrace.api.limits import ApiSettings
from headrace.api.server import Server
from headrace.config import hash_key

SETTINGS = ApiSettings(api_keys=(hash_key("k"),))


@contextlib.contextmanager
def serving(
    backend: FakeBackend, settings: ApiSettings = SETTINGS, **options: Any
) -> Iterator[int]:
    """Serve on a free port of the loopback address, in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(create_app(backend, settings), **options)
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(listener)))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        loop.call_soon_threadsafe(server.stop)
        thread.join()
        loop.close()
        listener.close()


@dataclass
class Answer:
    """A status, headers in lower case, and the body without its framing."""

    status: int
    headers: dict[str, str]
    body: bytes


class Raw:
    """A connection whose client writes bytes; `read` returns one answer."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self._file = self.socket.makefile("rb")

    def send(self, *packets: bytes) -> Raw:
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for packet in packets:
            self.socket.sendall(packet)
        return self

    def read(self, method: str = "POST") -> Answer:
        first = self._file.readline().decode()
        assert first, "the connection was closed without an answer"
        lines = iter(self._file.readline, b"\r\n")
        pairs = (line.decode().rstrip("\r\n").split(": ", 1) for line in lines)
        answer = Answer(int(first.split()[1]), {name.lower(): value for name, value in pairs}, b"")
        if answer.status == 100 or answer.status in {204, 304} or method == "HEAD":
            return answer
        if answer.headers.get("transfer-encoding") == "chunked":
            answer.body = b"".join(self._chunks())
        elif "content-length" in answer.headers:
            answer.body = self._file.read(int(answer.headers["content-length"]))
        else:
            answer.body = self._file.read()
        return answer

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._file.readline(), 16):
            yield self._file.read(size)
            assert self._file.read(2) == b"\r\n"
        assert self._file.readline() == b"\r\n"

    def is_closed(self) -> bool:
        """Whether the server closes the connection, without another byte; waits for it."""
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True

    def read_all(self) -> bytes:
        """Return what the server sends until it closes or resets the connection."""
        whole = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while part := self.socket.recv(1 << 20):
                whole += part
        return bytes(whole)

    def close(self) -> None:
        self._file.close()
        self.socket.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def request(path: str, body: bytes = b"", *lines: str, method: str = "POST") -> bytes:
    """Return a request with a Content-Length, unless the lines frame the body."""
    framed = any(re.match("(?i)transfer-encoding|content-length", line) for line in lines)
    length = () if framed else (f"content-length: {len(body)}",)
    head = [f"{method} {path} HTTP/1.1", "host: localhost", *length, *lines]
    return "\r\n".join([*head, "", ""]).encode() + body


def wait_until(true: Callable[[], bool], within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
