"""Start programs, servers and models to be measured, and always end them.

A `Program` is any process; it may take commands as lines of JSON. A `Server` is one that serves
HTTP: `headrace serve` of this or of another checkout, a script, or a peer such as llama-server. A
Backend is a model in this process, in a worker process, or behind the pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import psutil

from headrace import runtime
from headrace.config import Settings
from headrace.core.backend import Backend
from headrace.core.errors import LoadFailed
from headrace.core.model import ModelSpec
from headrace.lab.http import Broken, Http, place

Kind = Literal["worker", "process", "pool"]

# The pipe is closed when the parent ends, even if it is killed; the server then drains and ends.
_SERVE = """
import os, signal, threading
def follow():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=follow, daemon=True).start()
from headrace.cli import main
main()
"""
_END_S = 20.0
_CHILDREN_S = 10.0
_STEP_S = 0.05
_LONGEST_LINE = 1 << 28
_SCHEDULED = 2


class Program:
    """A process that was started by `program`, which ends it."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def __repr__(self) -> str:
        """Show the process id and whether it still runs."""
        return f"<Program {self.pid} {'running' if self.running else 'ended'}>"

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it still runs."""
        return self._process.returncode is None

    def cpu(self) -> float:
        """Return user and system seconds so far, without the children's."""
        return cpu_of(self.process())

    def children_cpu(self) -> float:
        """Return the same of all its descendants that run now."""
        return sum(map(cpu_of, self.process().children(recursive=True)))

    def process(self) -> psutil.Process:
        """Return the process, for its memory and its children."""
        return psutil.Process(self.pid)

    async def line(self) -> bytes:
        """Return the next line of its output; empty at its end."""
        assert self._process.stdout is not None
        return await self._process.stdout.readline()

    async def send(self, command: Mapping[str, Any]) -> None:
        """Send a command as a line of JSON."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        await self._process.stdin.drain()

    async def ask(self, command: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Send a command, if there is one, and return the next line of output.

        Raises:
            LoadFailed: it has ended.
        """
        if command is not None:
            await self.send(command)
        line = await self.line()
        if not line.strip():
            raise LoadFailed(f"The program {self.pid} ended without an answer.")
        return json.loads(line)

    async def wait(self) -> None:
        """Wait until it has ended."""
        await _ended(self._process)


class Server(NamedTuple):
    """A program that serves HTTP at `url`; `key` is the API key that it needs, if any."""

    url: str
    program: Program
    key: str | None = None

    def http(self) -> Http:
        """Return connections to it, none of which is open yet."""
        return Http(place(self.url), self.key)


@contextlib.asynccontextmanager
async def program(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    output: IO[Any] | None = None,
    errors: IO[Any] | None = None,
) -> AsyncGenerator[Program]:
    """Run a program; at the end it and all its descendants are terminated.

    Signals of the terminal do not reach it. Its output can be read, or is written to `output`.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=PIPE,
        stdout=PIPE if output is None else output,
        stderr=errors,
        env=os.environ | dict(environment or {}),
        limit=_LONGEST_LINE,
        start_new_session=True,
    )
    try:
        yield Program(process)
    finally:
        await asyncio.shield(_end(process))


@contextlib.asynccontextmanager
async def server(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    url: str | None = None,
    ready: str | None = None,
    key: str | None = None,
    start_s: float | None = None,
    log: Path | None = None,
) -> AsyncGenerator[Server]:
    """Run a server, and yield it when it accepts requests.

    Without `url` it has to print `{"url": "http://HOST:PORT"}` as its first line. With `ready`,
    that path has to be answered with 200 first. Headrace logs only warnings; an error quotes the
    last one. The log is kept in the file `log`, if there is one.

    Raises:
        LoadFailed: it ended before that, or took longer than `start_s`.
    """
    with _opened(log) as errors:
        output = None if url is None else errors
        quiet = {"HEADRACE_LOG_LEVEL": "warning"} | dict(environment or {})
        async with program(command, quiet, output=output, errors=errors) as running:
            try:
                async with asyncio.timeout(start_s):
                    url = url or await _printed(running)
                    if url is None or (ready and not await _ready(running, url, ready, key)):
                        await running.wait()
                        raise _failure(errors)
            except TimeoutError:
                raise LoadFailed(f"The server did not start within {start_s:g} s.") from None
            yield Server(url, running, key)


def serve(
    *arguments: str,
    options: Mapping[str, object] | None = None,
    command: Sequence[str] = ("serve",),
) -> list[str]:
    """Return the command of a `headrace serve` on a free port; it ends with this process.

    `command` may be another one that serves: `("cluster", "front")`.
    """
    pairs = [word for key, value in (options or {}).items() for word in ("-o", f"{key}={value}")]
    fixed = ("--host", "127.0.0.1", "--port", "0", "--json")
    return [sys.executable, "-P", "-c", _SERVE, *command, *arguments, *pairs, *fixed]


def checkout(folder: Path) -> dict[str, str]:
    """Return the environment variables to import Headrace from another checkout's `src`.

    Raises:
        LoadFailed: the folder has no `src/headrace`.
    """
    source = folder.resolve() / "src"
    if not (source / "headrace").is_dir():
        raise LoadFailed(f"There is no src/headrace in {folder}.")
    return {"PYTHONPATH": str(source)}


def free_port() -> int:
    """Return a port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def model(
    spec: ModelSpec, settings: Settings, kind: Kind = "process"
) -> AsyncGenerator[Backend]:
    """Load a model behind one kind of Backend, and close it at the end.

    Raises:
        HeadraceError: it cannot be loaded.
    """
    if kind == "pool":
        backend = runtime.open_pool(settings, [spec])
    else:
        backend = runtime.open_worker(spec, settings.config, isolate=kind == "process")
    try:
        await backend.start()
        yield backend
    finally:
        await backend.aclose()


def _opened(log: Path | None) -> IO[str]:
    if log is None:
        return tempfile.TemporaryFile("w+", errors="replace")
    return log.open("w+", errors="replace")


async def _printed(running: Program) -> str | None:
    line = await running.line()
    return str(json.loads(line)["url"]) if line.strip() else None


async def _ready(running: Program, url: str, path: str, key: str | None) -> bool:
    http = Http(place(url), key)
    try:
        while running.running:
            with contextlib.suppress(Broken):
                status, _ = await http.fetch(path)
                if status == 200:
                    return True
            await asyncio.sleep(_STEP_S)
        return False
    finally:
        http.close()


def _failure(log: IO[str]) -> LoadFailed:
    log.seek(0)
    lines = log.read().strip().splitlines()
    try:
        message: Any = json.loads(lines[-1])["error"]["message"]
    except (IndexError, ValueError, KeyError, TypeError):
        message = lines[-1] if lines else "it printed nothing"
    return LoadFailed(f"The server ended: {message}")


def cpu_of(process: psutil.Process) -> float:
    """Return user and system seconds of a process so far, 0 if it has ended.

    On Linux to the nanosecond, by the process's own clock; else in ticks, often of 10 ms.
    """
    if sys.platform == "linux":
        # The clock of another process, as `clock_getcpuclockid` makes it.
        with contextlib.suppress(OSError):
            return time.clock_gettime((~process.pid << 3) | _SCHEDULED)
        return 0.0
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


async def _end(process: Process) -> None:
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_END_S):
            await _ended(process)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await _ended(process)
    await asyncio.to_thread(_end_children, children)


async def _ended(process: Process) -> None:
    # Process.wait would also wait for children that have inherited the pipe of its output.
    while process.returncode is None:  # noqa: ASYNC110 - asyncio has no event for this alone
        await asyncio.sleep(_STEP_S)


def _end_children(children: Sequence[psutil.Process]) -> None:
    # The child processes of some peers outlive their parent.
    for child in psutil.wait_procs(children, _CHILDREN_S)[1]:
        with contextlib.suppress(psutil.Error):
            child.kill()
