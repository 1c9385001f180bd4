"""A `headrace serve` of one's own: started, waited for, and ended whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

from headrace.bench.http import Broken, Http, place
from headrace.core.errors import LoadFailed

# The pipe ends with us, even where we are killed; the server then drains and ends.
_PROGRAM = """
import os, signal, threading
def follow():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=follow, daemon=True).start()
from headrace.cli import main
main()
"""
_END_S = 20.0
_STEP_S = 0.05


class Own(NamedTuple):
    """Where it listens, and the key that only we know."""

    url: str
    key: str


@contextlib.asynccontextmanager
async def own(arguments: Sequence[str]) -> AsyncGenerator[Own]:
    """Run `headrace serve` with these arguments on a free port; yield when its model is loaded.

    Nothing is counted as usage, and nobody else can ask it.

    Raises:
        LoadFailed: it ended before that.
    """
    key = secrets.token_hex(16)
    more = {"LOG_LEVEL": "warning", "API_KEYS": key, "USAGE": "false"}
    with tempfile.TemporaryFile("w+") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", _PROGRAM, "serve", *arguments, "--port", "0", "--json"),
            *("--host", "127.0.0.1"),
            stdin=PIPE,
            stdout=PIPE,
            stderr=log.fileno(),
            env=os.environ | {f"HEADRACE_{name}": value for name, value in more.items()},
            # Ctrl-C is for us; we end it when we have the figures.
            start_new_session=True,
        )
        try:
            url = await _listens(process)
            if url is None or not await _ready(process, url, key):
                await process.wait()
                log.seek(0)
                raise _failure(log.read())
            yield Own(url, key)
        finally:
            await asyncio.shield(_end(process))


async def _listens(process: Process) -> str | None:
    assert process.stdout is not None
    line = await process.stdout.readline()
    return str(json.loads(line)["url"]) if line.strip() else None


async def _ready(process: Process, url: str, key: str) -> bool:
    http = Http(place(url), key)
    try:
        while process.returncode is None:
            with contextlib.suppress(Broken):
                status, _ = await http.fetch("/health/ready")
                if status == 200:
                    return True
            await asyncio.sleep(_STEP_S)
        return False
    finally:
        http.close()


def _failure(text: str) -> LoadFailed:
    lines = text.strip().splitlines()
    try:
        told: Any = json.loads(lines[-1])["error"]["message"]
    except (IndexError, ValueError, KeyError, TypeError):
        told = lines[-1] if lines else "it says nothing"
    return LoadFailed(f"Its own server ended: {told}")


async def _end(process: Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
