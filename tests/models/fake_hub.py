"""A hub on this machine, as far as huggingface_hub talks to one for downloads."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

COMMIT = "5f0c" * 10


class FakeHub:
    """One public repository `org/model`, and what can go wrong with it."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.refused: tuple[int, str] | None = None
        self.break_after: int | None = None
        """Hang up once, after so many bytes of a large file."""
        self.tampered = False
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.url = ""

    def downloads(self) -> list[str]:
        """Return the names of files whose contents were asked for."""
        return [r.rpartition("/")[2] for r in self.requests if r.startswith("GET /org/model/res")]

    def listing(self) -> bytes:
        siblings = []
        for name, data in self.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
            if not name.endswith((".json", ".txt")):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        info = {"id": "org/model", "modelId": "org/model", "sha": COMMIT, "siblings": siblings}
        return json.dumps(info).encode()

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _send(self, status: int, data: bytes, body: bool = True, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def _answer(self, *, body: bool) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.refused is not None:
            status, code = self.hub.refused
            return self._send(status, b"", X_Error_Code=code, X_Error_Message="no")
        if match := re.fullmatch(r"/api/models/org/model(?:/revision/(.+))?", path):
            if match[1] not in (None, "main", COMMIT):
                return self._send(404, b"", X_Error_Code="RevisionNotFound")
            return self._send(200, self.hub.listing(), body, Content_Type="application/json")
        if match := re.fullmatch(rf"/org/model/resolve/{COMMIT}/(.+)", path):
            return self._file(match[1], body)
        return self._send(404, b"", X_Error_Code="RepoNotFound")

    def _file(self, name: str, body: bool) -> None:
        data = self.hub.files[name]
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X_Repo_Commit": COMMIT,
            "Accept_Ranges": "bytes",
        }
        if self.hub.tampered:
            data = data[:-1] + b"!"
        status, start = 200, 0
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, start = 206, int(match[1])
            self.hub.ranges.append(match[0])
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        limit = self.hub.break_after
        if body and limit is not None and len(data) > limit and start == 0:
            self.hub.break_after = None
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:limit])
            self.close_connection = True
            return
        self._send(status, data[start:], body, **headers)
