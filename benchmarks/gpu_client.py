"""One of the processes that ask: raw sockets, the time of every read noted, nothing parsed.

It reads one JSON command, `{"port", "bodies", "answer"}`, and writes into the file `answer` what
each stream gave: the time to its first event, the gaps between its reads, its events, and its end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any, cast

_TAIL = 2048


class Stream(asyncio.Protocol):
    """One request."""

    def __init__(self, body: dict[str, Any], port: int) -> None:
        payload = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
        )
        self._request = head.encode() + payload
        self.began = 0.0
        self.times: list[float] = []
        self.events = 0
        self.tail = b""
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self.began = time.monotonic()
        # uvloop's transports do not derive from asyncio's.
        cast("asyncio.Transport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        """Note the time of a read with at least one event in it."""
        found = data.count(b"data: ")
        if found:
            self.events += found
            self.times.append(time.monotonic())
        self.tail = (self.tail + data)[-_TAIL:]

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        if not self.over.done():
            self.over.set_result(None)

    def result(self) -> dict[str, Any]:
        """Return what was seen."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return {
            "first": self.times[0] - self.began if self.times else None,
            "last": self.times[-1] if self.times else None,
            "gaps": [round(after - before, 5) for before, after in pairs],
            "events": self.events,
            "tail": self.tail.decode(errors="replace"),
        }


async def _ask(command: dict[str, Any]) -> dict[str, Any]:
    port = int(command["port"])
    streams = [Stream(body, port) for body in command["bodies"]]
    connect = asyncio.get_running_loop().create_connection
    began = time.monotonic()
    await asyncio.gather(*(connect(lambda one=one: one, "127.0.0.1", port) for one in streams))
    await asyncio.gather(*(stream.over for stream in streams))
    return {"began": began, "streams": [stream.result() for stream in streams]}


def main() -> None:
    """Answer the command on standard input."""
    import uvloop

    command = json.loads(sys.stdin.readline())
    Path(command["answer"]).write_text(json.dumps(uvloop.run(_ask(command))))


if __name__ == "__main__":
    main()
