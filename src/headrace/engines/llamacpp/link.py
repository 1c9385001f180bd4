"""The HTTP side of llama.cpp's server: a private Unix socket behind a random key."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.errors import GenerationFailed, HeadraceError, LoadFailed, OutOfMemory
from headrace.engines.llamacpp.call import error_from

SOCKET = "s.sock"
# The kernel's limit on the address of a Unix socket, without the final zero byte.
_MAX_ADDRESS = 107 if sys.platform == "linux" else 103
_TIMEOUT_S = 60.0
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
        with self._connected(path, timeout_s) as connection:
            connection.request("GET" if body is None else "POST", path, content, self._headers)
            answer = msgspec.json.decode(connection.getresponse().read())
        if "error" in answer:
            raise error_from(answer["error"])
        return answer

    def stream(self, path: str, body: bytes, on_event: Callable[[bytes], bool]) -> None:
        """Call `on_event` with each event of an answer until it returns True. Blocking.

        When this returns, the server has ended the request.

        Raises:
            HeadraceError: the server refuses, or does not answer; what `on_event` raises.
        """
        with self._connected(path, None) as connection:
            connection.request("POST", path, body, self._headers)
            answer, sock = connection.getresponse(), connection.sock
            if answer.status != http.client.OK:
                on_event(answer.read())
                return
            try:
                if not any(
                    line.startswith(_DATA) and on_event(line[len(_DATA) :]) for line in answer
                ):
                    raise self._lost(f"{path}: the answer has no end")
            finally:
                # It looks once a second whether its client is there, and closes at its own end.
                with contextlib.suppress(OSError, http.client.HTTPException):
                    sock.shutdown(socket.SHUT_WR)
                    while answer.read1():
                        pass

    @contextlib.contextmanager
    def _connected(self, path: str, timeout_s: float | None) -> Generator[_UnixConnection]:
        try:
            with contextlib.closing(_UnixConnection(self.address, timeout_s)) as connection:
                yield connection
        except (OSError, http.client.HTTPException) as error:
            reason = f"{path}: {type(error).__name__}: {error}"
            raise self._lost(reason) from error

    def _lost(self, reason: str) -> HeadraceError:
        return GenerationFailed("llama.cpp does not answer.", detail=reason)

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}

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


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, address: str, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._address = address

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._address)
