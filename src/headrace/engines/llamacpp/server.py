"""llama.cpp's server in this process: its private socket, and the reason if it does not start."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import xllamacpp

from headrace.engines.llamacpp.link import SOCKET, Link, failure

_MAX_LOG = 1 << 16
_ERRORS_ONLY = 1
_LOGGED_S, _POLL_S = 1.0, 0.02


class Server(Link):
    """A running server, whose HTTP side only this process can use.

    `library` is the library's own object; `ask` and `stream` call what it offers over HTTP only, of
    which `streams` may be open at a time.

    Raises:
        LoadFailed, OutOfMemory: with the library's reason.
    """

    def __init__(self, params: Any, name: str, streams: int = 0) -> None:
        super().__init__()
        try:
            self._restrict_http(params, streams)
            self.library: xllamacpp.Server | None = self._start(params, name)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the model and remove the private directory. Idempotent."""
        self.library = None
        super().close()

    def _restrict_http(self, params: Any, streams: int) -> None:
        # The library always listens, and tokenising needs it. A socket file in a directory that
        # only this user may enter, with a random key, is the most restricted way that it has.
        params.hostnames = [self.address]
        params.api_keys = [self.key]
        params.ui = params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = False
        params.n_threads_http = 2 + streams

    def _start(self, params: Any, name: str) -> xllamacpp.Server:
        # At first with stderr as it is, so that what the library writes before it aborts is seen.
        with contextlib.suppress(RuntimeError):
            return xllamacpp.Server(params)
        # Its log has the reason. It holds Python's lock meanwhile, so nothing could read a pipe.
        params.verbosity = _ERRORS_ONLY
        (self.folder / SOCKET).unlink(missing_ok=True)
        log = self.folder / "log"
        try:
            with _stderr_to(log):
                return _started(params, log)
        except RuntimeError as error:
            raise failure(name, _tail(log) or str(error)) from error


def _started(params: Any, log: Path) -> xllamacpp.Server:
    try:
        return xllamacpp.Server(params)
    except RuntimeError:
        # A thread of the library writes the log, and may not have come to it.
        end, size = time.monotonic() + _LOGGED_S, 0
        while time.monotonic() < end and (size == 0 or size != log.stat().st_size):
            size = log.stat().st_size
            time.sleep(_POLL_S)
        raise


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
