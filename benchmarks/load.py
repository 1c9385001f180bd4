"""A load client that costs little: raw sockets, streams of events counted and hardly parsed.

Runs as a process of its own. It reads one JSON command a line and answers each with one line:
`{"do": "open", ...}` starts one stream for each body and answers when all have had an event,
`{"do": "count"}` tells how many events have come, `{"do": "drain"}` waits for the end of all
streams, `{"do": "close"}` hangs up. `host`, `port`, `path` and `bodies` belong to `open`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE, Process
from typing import Any, cast

import uvloop

_TAIL = 4096
_PATIENCE_S = 300.0


class Stream(asyncio.Protocol):
    """One request; an event is what ends with an empty line."""

    def __init__(self, request: bytes) -> None:
        self.events = 0
        self.reads = 0
        self.tail = b""
        self.began = asyncio.Event()
        self.over = asyncio.Event()
        self.over_at = 0.0
        self._request = request
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        # uvloop's transports do not derive from asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count. An event's end that is split over two reads is looked for at the joint."""
        split = self.tail[-1:] == b"\n" and data[:1] == b"\n"
        self.events += data.count(b"\n\n") + split
        self.reads += 1
        self.tail = data if len(data) > 512 else (self.tail + data)[-_TAIL:]
        if self.events and not self.began.is_set():
            self.began.set()
        # Headers can end with a nought too.
        if data.endswith(b"\r\n0\r\n\r\n") or data == b"0\r\n\r\n":
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        self._end()

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.abort()

    def _end(self) -> None:
        if not self.over.is_set():
            self.over_at = time.monotonic()
            self.began.set()
            self.over.set()


class Load:
    """The streams that are open."""

    def __init__(self) -> None:
        self._streams: list[Stream] = []
        self._began_at = 0.0

    async def open(self, command: dict[str, Any]) -> dict[str, Any]:
        """Start all streams and wait for the first event of each."""
        connect = asyncio.get_running_loop().create_connection
        self._streams = [Stream(request_bytes(command, body)) for body in command["bodies"]]
        self._began_at = time.monotonic()
        await asyncio.gather(
            *(
                connect(lambda stream=stream: stream, command["host"], command["port"])
                for stream in self._streams
            )
        )
        await asyncio.gather(*(stream.began.wait() for stream in self._streams))
        return self.count()

    def count(self) -> dict[str, Any]:
        """Tell what has come, and how many streams still run."""
        return {
            "at": time.monotonic(),
            "events": sum(stream.events for stream in self._streams),
            "reads": sum(stream.reads for stream in self._streams),
            "running": sum(not stream.over.is_set() for stream in self._streams),
        }

    async def drain(self) -> dict[str, Any]:
        """Wait for the end of all; `seconds` are from the first connection to the last byte."""
        await asyncio.gather(*(stream.over.wait() for stream in self._streams))
        last = max(stream.over_at for stream in self._streams)
        tails = [stream.tail.decode(errors="replace") for stream in self._streams]
        return {**self.count(), "seconds": last - self._began_at, "tails": tails}

    def close(self) -> dict[str, Any]:
        """Hang up on all."""
        for stream in self._streams:
            stream.close()
        self._streams = []
        return {}


def request_bytes(command: dict[str, Any], body: dict[str, Any]) -> bytes:
    """Return a request as it goes over the wire."""
    payload = json.dumps(body).encode()
    head = (
        f"POST {command['path']} HTTP/1.1\r\nHost: {command['host']}:{command['port']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


class Client:
    """The load process as its parent sees it."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.pid = process.pid

    @classmethod
    async def start(cls) -> Client:
        """Start the process."""
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable, __file__, stdin=PIPE, stdout=PIPE, limit=1 << 24
            )
        )

    async def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Send a command and return its answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        async with asyncio.timeout(_PATIENCE_S):
            return json.loads(await stdout.readline())

    async def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        await self._process.wait()


async def _serve() -> None:
    loop, load = asyncio.get_running_loop(), Load()
    reader = asyncio.StreamReader(limit=1 << 24)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        command = json.loads(line)
        match command["do"]:
            case "open":
                answer = await load.open(command)
            case "drain":
                answer = await load.drain()
            case "close":
                answer = load.close()
            case _:
                answer = load.count()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    uvloop.run(_serve())
