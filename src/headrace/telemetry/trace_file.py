"""Trace files: records of requests as JSON lines in a folder, written by a thread.

Any number of processes append to `requests.jsonl`. At an eighth of the limit it is renamed to
`requests-<time>.jsonl`, and the oldest of these are deleted. A line can be truncated if the disk is
full or the machine crashes: readers skip it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.private import private_folder
from headrace.core.record import RequestRecord

FOLDER = "traces"
"""Its name in the home directory."""

CURRENT = "requests.jsonl"
"""The file that is being written."""

_log = logging.getLogger("headrace.telemetry")
_encode = msgspec.json.Encoder(enc_hook=str).encode
_SEGMENTS = 8
# Records with content are large: fewer of them may wait for a slow disk.
_MOST_WAITING, _MOST_WITH_CONTENT = 4096, 256
# Encoded in well under a millisecond, during which the event loop does not run.
_LINES_AT_ONCE = 64
_BARE: dict[str, Any] = {"content": None, "parameters": {}, "spans": (), "message": ""}
_GATHER_S, _AGAIN_S, _LOCK_S = 0.1, 5.0, 2.0


def renamed_files(folder: Path) -> list[Path]:
    """Return the renamed files, oldest first."""
    paths = folder.glob("requests-*.jsonl")
    return sorted(path for path in paths if path.stem.rpartition("-")[2].isdigit())


class TraceFile:
    """A Sink that keeps records on the disk, at most about `limit` bytes of them.

    It never fails or delays a request: records that cannot be kept are dropped, counted and
    logged. A record longer than an eighth of the limit is kept without content, parameters and
    spans.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.dropped = 0
        self._folder = folder
        self._limit = limit
        self._segment = limit // _SEGMENTS
        self._queue: deque[RequestRecord] = deque()
        self._lines: deque[bytes] = deque()
        self._descriptor: int | None = None
        self._failing = False
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="headrace-traces", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<TraceFile {self._folder} waiting={len(self._queue)} dropped={self.dropped}>"

    def record(self, record: RequestRecord) -> None:
        """Queue a record; it is written within a fraction of a second."""
        limit = _MOST_WAITING if record.content is None else _MOST_WITH_CONTENT
        if len(self._queue) >= limit:
            self._drop("records arrive faster than they can be written")
            return
        self._queue.append(record)
        if not self._wake.is_set():
            self._wake.set()

    def close(self, within_s: float = 2.0) -> None:
        """Write the queued records and end, within `within_s` seconds."""
        self._closing.set()
        self._wake.set()
        self._thread.join(within_s)

    def _drop(self, why: str) -> None:
        self.dropped += 1
        if self.dropped == 1:
            _log.warning("Traces in %s are incomplete: %s.", self._folder, why)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._wake.wait()
            self._wake.clear()
            if not (self._flushed() or self._closing.wait(_AGAIN_S)):
                self._wake.set()
            self._closing.wait(_GATHER_S)
        if not self._flushed():
            lost = len(self._queue) + len(self._lines)
            _log.warning("Traces of %s requests were not written.", lost)
        self._release()

    def _flushed(self) -> bool:
        """Write all queued records; on a failure keep them, log it once, and return False."""
        try:
            while self._queue or self._lines:
                self._fill()
                self._write()
        except OSError as error:
            self._release()
            if not self._failing:
                text = "Traces cannot be written to %s: %s. Requests go on; it is tried again."
                _log.warning(text, self._folder, error)
            self._failing = True
            return False
        if self._failing:
            _log.info("Traces are written to %s again.", self._folder)
        self._failing = False
        return True

    def _fill(self) -> None:
        while self._queue and len(self._lines) < _LINES_AT_ONCE:
            line = self._line(self._queue.popleft())
            if line is None:
                self._drop("a record cannot be written")
            else:
                self._lines.append(line)

    def _line(self, record: RequestRecord) -> bytes | None:
        for more in ({}, _BARE):
            # Values from an engine or a client may not be encodable as JSON.
            with contextlib.suppress(TypeError, ValueError, ArithmeticError, RecursionError):
                line = _encode(msgspec.structs.replace(record, **more)) + b"\n"
                if len(line) <= self._segment:
                    return line
        return None

    def _write(self) -> None:
        """Write as many lines as fit into the current file, at once."""
        if not self._lines:
            return
        file = self._opened()
        size = os.fstat(file).st_size
        if size and size + len(self._lines[0]) > self._segment:
            self._rotate(file)
            return
        # After a truncated line, of a process that has crashed, begin a new one. A line that
        # another process is writing looks the same; an empty line is harmless.
        truncated = size and os.pread(file, 1, size - 1) != b"\n"
        parts = [b"\n"] if truncated else []
        for line in self._lines:
            size += len(line)
            if size > self._segment and len(parts) > bool(truncated):
                break
            parts.append(line)
        data = b"".join(parts)
        written = os.write(file, data)
        if not os.fstat(file).st_nlink:
            # The file was deleted meanwhile: write again.
            self._release()
            return
        # A full disk may accept a part; the next write reports the error.
        for _ in range(data[:written].count(b"\n") - bool(truncated)):
            self._lines.popleft()

    def _opened(self) -> int:
        """Return the current file, opened again if another process has renamed it."""
        path = self._folder / CURRENT
        if self._descriptor is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(self._descriptor)):
                    return self._descriptor
            self._release()
        private_folder(self._folder)
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        return self._descriptor

    def _rotate(self, file: int) -> None:
        """Rename the current file, unless another process has, and delete the oldest ones.

        A process that still has it open may append once more; nothing is lost.
        """
        from filelock import FileLock  # not for a command that only reads

        path = self._folder / CURRENT
        with FileLock(self._folder / ".lock", timeout=_LOCK_S, mode=0o600):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file)):
                    path.rename(path.with_stem(f"{path.stem}-{_stamp(self._folder)}"))
            files = [(old, old.stat().st_size) for old in renamed_files(self._folder)]
            left = sum(size for _, size in files)
            for old, size in files:
                if left <= self._limit - self._segment:
                    break
                old.unlink(missing_ok=True)
                left -= size

    def _release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _stamp(folder: Path) -> str:
    """Return a suffix that sorts after the existing ones, even if the clock was set back."""
    last = max((int(path.stem.rpartition("-")[2]) for path in renamed_files(folder)), default=0)
    return f"{max(time.time_ns(), last + 1):020}"
