"""A DB-GPT controller that notes what workers register, over real HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

MODELS, BEAT = "/api/controller/models", "/api/controller/heartbeat"


class FakeController:
    """`calls` are the method, path and content of each call, `rows` what is registered.

    `status` is what it answers with; a row is healthy unless it was deregistered and kept.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        self.rows: dict[str, bool] = {}
        self.status = 200

    def take(self, method: str, path: str, content: dict[str, Any]) -> int:
        if self.status != 200:
            return self.status
        self.calls.append((method, path, content))
        name = str(content["model_name"])
        if method == "POST":
            self.rows[name] = True
        elif content["remove_from_registry"] == "true":
            self.rows.pop(name, None)
        else:
            assert content["remove_from_registry"] == "false", "an empty value is a 422"
            self.rows[name] = False
        return 200

    def count(self, method: str, path: str) -> int:
        return sum(call[:2] == (method, path) for call in self.calls)

    def until(self, true: Callable[[], bool], within_s: float = 20) -> None:
        end = time.monotonic() + within_s
        while not true():
            assert time.monotonic() < end, (self.rows, self.calls[-3:])
            time.sleep(0.01)


class _Handler(BaseHTTPRequestHandler):
    controller: FakeController

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self._answer(json.loads(body))

    def do_DELETE(self) -> None:
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        self._answer({name: values[0] for name, values in query.items()})

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, content: dict[str, Any]) -> None:
        status = self.controller.take(self.command, urlsplit(self.path).path, content)
        self.send_response(status)
        self.send_header("content-length", "4")
        self.end_headers()
        self.wfile.write(b"true")


@contextmanager
def controller(
    port: int = 0, known: FakeController | None = None
) -> Iterator[tuple[FakeController, str]]:
    """Run one, and return it with its URL."""
    fake = known or FakeController()
    handler = type("Handler", (_Handler,), {"controller": fake})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
