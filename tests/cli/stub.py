"""A service that answers as it is told, on a port of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec


class Stub:
    """What it was asked (method, path, body, key), and what it answers: by path, a status and a
    body; bytes are sent as they are. Without `awake` it takes requests and says nothing."""

    def __init__(self, answers: dict[str, tuple[int, Any]]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str, Any, str | None]] = []
        self.url = ""
        self.awake = threading.Event()
        self.awake.set()


@contextmanager
def stub(answers: dict[str, tuple[int, Any]], port: int = 0) -> Iterator[Stub]:
    told = Stub(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            key = self.headers.get("authorization")
            told.awake.wait(10)
            told.asked.append((self.command, self.path, body, key))
            status, answer = told.answers[self.path.partition("?")[0]]
            content = answer if isinstance(answer, bytes) else msgspec.json.encode(answer)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815

        def log_message(self, format: str, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
