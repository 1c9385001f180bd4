"""Renders chat templates in processes of their own, with limits that the kernel enforces.

One step of a template, such as printing a list that contains itself in many places, can take any
time and memory, and a thread cannot be stopped. Such a process is killed by its own alarm at the
deadline, gets no more memory than `MEMORY`, and is replaced. It ends with the process that uses it,
and can change no files and connect to nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from headrace.core import confine
from headrace.core.environment import inherited
from headrace.core.errors import GenerationFailed

MEMORY = 512 << 20
"""Bytes that a rendering may take beside what the process has."""
MAX_CHARACTERS = 8 << 20
"""The longest text."""

_PROCESSES = 2
_PATIENCE_S = 0.2
"""How long to wait for a process that renders something else, before another is started."""
_GRACE_S = 20.0
_LOOK_S = 0.5
_ENDING_S = 0.2
_TRIES = 2
_OUT_OF_MEMORY = 3
_MAX_REASON = 500
_LENGTH = 8
_LONGEST_FRAME = 6 * MAX_CHARACTERS + 1024
"""Bytes of an answer: JSON writes six for some characters."""

FaultKind = Literal["syntax", "refused", "limit", "failed"]


class Work(msgspec.Struct, frozen=True, array_like=True):
    """A template and its variables; without variables it is only compiled."""

    source: str
    variables: dict[str, Any] | None
    seconds: float


class Rendered(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The text."""

    text: str


class Fault(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Why there is no text; `line` is that of a syntax error."""

    kind: FaultKind
    reason: str
    line: int | None = None


def render(work: Work) -> Rendered | Fault:
    """Render a template within its limits. Blocking, thread-safe.

    A process that another one has stopped or killed is replaced, and it is tried again, once.

    Raises:
        GenerationFailed: no process could be started, or none was left in peace.
    """
    with _slots:
        for _ in range(_TRIES):
            process = _taken()
            try:
                if (answer := process.render(work)) is not None:
                    return answer
            finally:
                _give_back(process)
    raise GenerationFailed("The chat template cannot be rendered.", detail="its process was killed")


def prepare() -> None:
    """Start a process for the first rendering, without waiting for it. Thread-safe."""
    with contextlib.suppress(GenerationFailed):
        if not _idle:
            _idle.append(_started())


class _Process:
    """A process that renders, one template after another."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", "headrace.text.renderer", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=inherited(),
            )
        self.alive = True

    def render(self, work: Work) -> Rendered | Fault | None:
        """Return the answer, or None if another process has ended this one.

        After that, and after some faults, it has ended.
        """
        # The alarm of the process itself is first, unless it cannot run at all.
        limit_s = work.seconds + _GRACE_S
        self._socket.settimeout(limit_s)
        try:
            _send(self._socket, msgspec.json.encode(work))
            if not self._is_heard(limit_s):
                self.end()
                return None
            if (reply := _receive(self._socket)) is not None:
                return msgspec.json.decode(reply, type=Rendered | Fault)
            code = self.end(limit_s)
        except TimeoutError:
            self.end()
            code = -signal.SIGALRM
        except OSError:
            code = self.end(limit_s)
        return None if code == -signal.SIGKILL else Fault("limit", _cause(code))

    def _is_heard(self, limit_s: float) -> bool:
        """Wait for an answer, or the end; return whether there is one, and it was not stopped.

        Raises:
            TimeoutError: there is none in time.
        """
        waiting, end = select.poll(), time.monotonic() + limit_s
        waiting.register(self._socket, select.POLLIN)
        while not waiting.poll(1000 * _LOOK_S):
            if _is_stopped(self._process.pid):
                return False
            if time.monotonic() > end:
                raise TimeoutError
        return True

    def end(self, patience_s: float = _ENDING_S) -> int:
        """End it, and return its exit status; it has the time to end by itself."""
        self.alive = False
        self._socket.close()
        try:
            return self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _started() -> _Process:
    try:
        return _Process()
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"
        raise GenerationFailed("The chat template cannot be rendered.", detail=reason) from error


def _taken() -> _Process:
    with _changed:
        if not _changed.wait_for(_is_idle, _PATIENCE_S) and len(_busy) < _PROCESSES:
            _busy.add(another := _started())
            threading.Thread(target=_warm_up, args=(another,), daemon=True).start()
        # The one that renders may be idle before the other has started.
        _changed.wait_for(_is_idle)
        process = _idle.pop() if _idle else _started()
        _busy.add(process)
        return process


def _is_idle() -> bool:
    return bool(_idle) or not _busy


def _warm_up(process: _Process) -> None:
    try:
        process.render(Work("", {}, _GRACE_S))
    finally:
        _give_back(process)


def _give_back(process: _Process) -> None:
    with _changed:
        _busy.discard(process)
        if process.alive:
            _idle.append(process)
        _changed.notify()


_slots = threading.BoundedSemaphore(_PROCESSES)
_changed = threading.Condition()
_busy: set[_Process] = set()
_idle: deque[_Process] = deque()


@atexit.register
def end_idle() -> None:
    """End the processes that render nothing now. Thread-safe."""
    with contextlib.suppress(IndexError):
        while True:
            _idle.pop().end()


def _is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process (Linux only)."""
    try:
        # After the name, which can contain anything.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    except OSError:
        return False


def _cause(code: int) -> str:
    if code == -signal.SIGALRM:
        return "it took too long"
    if code == _OUT_OF_MEMORY:
        return "it took too much memory"
    return f"it ended the process that renders ({code})"


def _send(connection: socket.socket, frame: bytes) -> None:
    connection.sendall(len(frame).to_bytes(_LENGTH, "little") + frame)


def _receive(connection: socket.socket, most: int = _LONGEST_FRAME) -> bytes | None:
    """Return the next frame, None at the end.

    Raises:
        OSError: it has more than `most` bytes, or none came in time.
    """
    head = connection.recv(_LENGTH, socket.MSG_WAITALL)
    if len(head) < _LENGTH:
        return None
    size = int.from_bytes(head, "little")
    if size > most:
        raise OSError(f"a frame of {size} bytes")
    frame = connection.recv(size, socket.MSG_WAITALL)
    while frame and len(frame) < size:
        more = connection.recv(size - len(frame))
        frame = frame + more if more else b""
    return frame or None


def _answer(work: Work) -> Rendered | Fault:
    # Imported here: what uses this module needs no Jinja.
    from jinja2.exceptions import TemplateSyntaxError

    from headrace.text import sandbox

    try:
        text = sandbox.render(work.source, work.variables)
    except sandbox.Refusal as error:
        return Fault("refused", str(error)[:_MAX_REASON])
    except TemplateSyntaxError as error:
        return Fault("syntax", str(error.message)[:_MAX_REASON], error.lineno)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except Exception as error:  # noqa: BLE001  # a template is code
        return Fault("failed", f"{type(error).__name__}: {error}"[:_MAX_REASON])
    if len(text) > MAX_CHARACTERS:
        return Fault("limit", "it made too much text")
    return Rendered(text)


def _encoded(answer: Rendered | Fault) -> bytes:
    try:
        return msgspec.json.encode(answer)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    except UnicodeEncodeError as error:
        return msgspec.json.encode(Fault("failed", f"{type(error).__name__}: {error.reason}"))


def _frames(connection: socket.socket) -> Iterator[bytes]:
    while (frame := _receive(connection, sys.maxsize)) is not None:
        yield frame


def _limit_memory() -> None:
    if sys.platform != "linux":
        return
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        pages = int(file.read().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    _, allowed = resource.getrlimit(resource.RLIMIT_AS)
    most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """Render what comes over the inherited socket, whose file descriptor is the argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    confine.give_up_privileges()
    decode = msgspec.json.Decoder(Work).decode
    _answer(Work("", None, 0.0))  # imports what it needs
    confine.restrict(())
    _limit_memory()
    connection = socket.socket(fileno=int(sys.argv[1]))
    for frame in _frames(connection):
        work = decode(frame)
        signal.setitimer(signal.ITIMER_REAL, work.seconds)
        reply = _encoded(_answer(work))
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        _send(connection, reply)


if __name__ == "__main__":
    main()
