"""Starts llama-server, the peer of tune_peer.py.

The peer is not part of Headrace, and nothing of it is kept. To build it, take the source archive of
`llama-cpp-python` (`pip download --no-deps --no-binary :all: llama-cpp-python`), unpack it, and:

    cmake -S vendor/llama.cpp -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_APP=OFF
    ninja -C build llama-server llama-quantize

`--peer-model` is the file that the peer runs. Its kernels for Q4_1 are slow: give it the same
weights as Q8_0, by way of F16:

    build/bin/llama-quantize --allow-requantize MODEL.gguf f16.gguf F16
    build/bin/llama-quantize f16.gguf q8_0.gguf Q8_0
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import urllib.error
import urllib.request
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncGenerator
from pathlib import Path

import psutil

from serving import Server

_START_S = 120.0


@contextlib.asynccontextmanager
async def run(
    program: Path, model: str, streams: int, threads: int, context: int
) -> AsyncGenerator[Server]:
    """Run llama-server with a slot for each stream."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {
        "-m": model,
        "-np": str(streams),
        "-c": str(streams * context),
        "-t": str(threads),
        "-tb": str(threads),
        "--cache-ram": "0",
        "--host": "127.0.0.1",
        "--port": str(port),
    }
    words = [word for pair in flags.items() for word in pair]
    process = await asyncio.create_subprocess_exec(
        str(program), *words, stdout=DEVNULL, stderr=DEVNULL
    )
    try:
        await _healthy(port)
        yield Server(port, psutil.Process(process.pid))
    finally:
        process.kill()
        await process.wait()


async def _healthy(port: int) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError, urllib.error.URLError):
            await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{port}/health")
            return
        await asyncio.sleep(0.2)
    raise SystemExit("llama-server did not start.")
