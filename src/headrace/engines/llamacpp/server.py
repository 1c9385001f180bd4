"""llama.cpp's server in this process: its private socket, and the reason if it does not start."""

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
import xllamacpp

from headrace.core.errors import GenerationFailed, HeadraceError, LoadFailed, OutOfMemory
from headrace.engines.llamacpp.call import error_from

_SOCKET = "s.sock"
# The kernel's limit on the address of a Unix socket, without the final zero byte.
_MAX_ADDRESS = 107 if sys.platform == "linux" else 103
_MAX_LOG = 1 << 16
_TIMEOUT_S = 60.0
_DATA = b"data: "
_ERRORS_ONLY = 1
# Time, level, function: "0.00.019 E llama_model_load: error loading model: ...".
_LOG_LINE = re.compile(r"^[\d.]+ E +(?:srv +|cmn +)?(?:[\w~]+(?:\(\))?: +)*(?P<text>.+)$")
_NO_MEMORY = ("bad_alloc", "failed to allocate", "out of memory", "unable to allocate")


class Server:
    """A running server, whose HTTP side only this process can use.

    `library` is the library's own object; `ask` and `stream` call what it offers over HTTP only, of
    which `streams` may be open at a time.

    Raises:
        LoadFailed, OutOfMemory: with the library's reason.
    """

    def __init__(self, params: Any, name: str, streams: int = 0) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="llamacpp-"))
        self.key = secrets.token_urlsafe(24)
        self._folder_fd: int | None = None
        try:
            self._address = self._short_address()
            self._restrict_http(params, streams)
            self.library: xllamacpp.Server | None = self._start(params, name)
        except BaseException:
            self.close()
            raise

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Return the answer of a route. Blocking.

        Raises:
            HeadraceError: the server refuses, or does not answer.
        """
        content = None if body is None else msgspec.json.encode(body)
        with self._connected(path, _TIMEOUT_S) as connection:
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
                for line in answer:
                    if line.startswith(_DATA) and on_event(line[len(_DATA) :]):
                        break
            finally:
                # It looks once a second whether its client is there, and closes at its own end.
                with contextlib.suppress(OSError, http.client.HTTPException):
                    sock.shutdown(socket.SHUT_WR)
                    while answer.read1():
                        pass

    @contextlib.contextmanager
    def _connected(self, path: str, timeout_s: float | None) -> Generator[_UnixConnection]:
        try:
            with contextlib.closing(_UnixConnection(self._address, timeout_s)) as connection:
                yield connection
        except (OSError, http.client.HTTPException) as error:
            reason = f"{path}: {type(error).__name__}: {error}"
            raise GenerationFailed("llama.cpp does not answer.", detail=reason) from error

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}

    def close(self) -> None:
        """Free the model and remove the private directory. Idempotent."""
        self.library = None
        if self._folder_fd is not None:
            os.close(self._folder_fd)
            self._folder_fd = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _short_address(self) -> str:
        """Return an address for the socket that the kernel accepts."""
        address = str(self.folder / _SOCKET)
        if len(os.fsencode(address)) <= _MAX_ADDRESS:
            return address
        if sys.platform != "linux":
            raise LoadFailed(
                f"The directory for temporary files has too long a path for a socket: {address} "
                f"has more than {_MAX_ADDRESS} bytes. Set TMPDIR to a shorter one."
            )
        self._folder_fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._folder_fd}/{_SOCKET}"

    def _restrict_http(self, params: Any, streams: int) -> None:
        # The library always listens, and tokenising needs it. A socket file in a directory that
        # only this user may enter, with a random key, is the most restricted way that it has.
        params.hostnames = [self._address]
        params.api_keys = [self.key]
        params.ui = params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = False
        params.n_threads_http = 2 + streams

    def _start(self, params: Any, name: str) -> xllamacpp.Server:
        # At first with stderr as it is, so that what the library writes before it aborts is seen.
        with contextlib.suppress(RuntimeError):
            return xllamacpp.Server(params)
        # Its log has the reason. It holds Python's lock meanwhile, so nothing could read a pipe.
        params.verbosity = _ERRORS_ONLY
        (self.folder / _SOCKET).unlink(missing_ok=True)
        log = self.folder / "log"
        try:
            with _stderr_to(log):
                return xllamacpp.Server(params)
        except RuntimeError as error:
            raise _failure(name, _tail(log) or str(error)) from error


def _failure(name: str, log: str) -> HeadraceError:
    """Return the error of a failed load; its message has the first error of the log."""
    matches = map(_LOG_LINE.match, log.splitlines())
    reason = next((match["text"] for match in matches if match), log.partition("\n")[0])
    is_memory = any(phrase in log.lower() for phrase in _NO_MEMORY)
    kind = OutOfMemory if is_memory else LoadFailed
    return kind(f"llama.cpp could not load {name}: {reason[:300].rstrip('.')}.", detail=log)


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            return file.read(_MAX_LOG).decode(errors="replace").strip()
    except OSError:
        return ""


@contextlib.contextmanager
def _stderr_to(path: Path) -> Generator[None]:
    """Send what this process writes to stderr to a file, also what native code writes."""
    saved = os.dup(2)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.dup2(file, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(file)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, address: str, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._address = address

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._address)
