"""Starting the servers that are measured, each in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

_HEADRACE = "from headrace.cli import main; main()"
_START_S = 300.0


class Server(NamedTuple):
    """A server that answers on `port`; `process` is the one whose CPU is counted."""

    port: int
    process: psutil.Process

    def cpu(self) -> float:
        """Return user and system seconds so far, without the children's."""
        times = self.process.cpu_times()
        return times.user + times.system

    def children_cpu(self) -> float:
        """Return the same of its children."""
        every = [child.cpu_times() for child in self.process.children(recursive=True)]
        return sum(times.user + times.system for times in every)


@contextlib.asynccontextmanager
async def serving(arguments: Sequence[str]) -> AsyncGenerator[Server]:
    """Run a Python program that prints `{"url": "http://host:port"}` when it serves."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=PIPE, env={**os.environ, "HEADRACE_LOG_LEVEL": "warning"}
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(_START_S):
            line = await process.stdout.readline()
        port = int(json.loads(line)["url"].rpartition(":")[2])
        yield Server(port, psutil.Process(process.pid))
    finally:
        await _end(process)


def headrace(model: str, options: dict[str, object], *flags: str) -> list[str]:
    """Return the arguments of `headrace serve` with the engine's options."""
    pairs = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    return ["-c", _HEADRACE, "serve", model, "--port", "0", "--json", *flags, *pairs]


def script(name: str, *flags: str) -> list[str]:
    """Return the arguments of a program beside this file."""
    return [str(Path(__file__).with_name(name)), *flags]


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            async with asyncio.timeout(20):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
