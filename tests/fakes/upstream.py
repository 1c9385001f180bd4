"""A stand-in for somebody else's server: real HTTP on a free port, with scripted faults."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

Step = bytes | float | str
"""Bytes to send, seconds to wait, or `drop`: the connection is cut."""


@dataclass(frozen=True)
class Play:
    """What is answered to one request. `framing` is `chunked`, `length` or `close`."""

    steps: Sequence[Step] = ()
    status: int = 200
    kind: str | None = "text/event-stream"
    headers: dict[str, str] = field(default_factory=dict[str, str])
    framing: str = "chunked"


@dataclass
class Seen:
    """A request as it came, and when the client left before its answer had ended."""

    path: str
    headers: dict[str, str]
    body: Any
    connection: int
    left: float | None = None
    over: bool = False


def event(data: Any, end: bytes = b"\n\n") -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return b"data: " + text.encode() + end


DONE = event("[DONE]")


def chunk(index: int = 0, reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": delta, "finish_reason": reason}]}


def usage(prompt: int, completion: int, cached: int = 0, thought: int = 0) -> dict[str, Any]:
    return {
        "choices": [],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": thought},
        },
    }


def said(*texts: str, reason: str = "stop", prompt: int = 7) -> Play:
    """A good answer, one event for each text."""
    steps = [event(chunk(role="assistant", content=""))]
    steps += [event(chunk(content=text)) for text in texts]
    steps += [event(chunk(reason=reason)), event(usage(prompt, len(texts))), DONE]
    return Play(steps)


def refused(status: int, error: Any, **headers: str) -> Play:
    body = json.dumps(error if isinstance(error, str) else {"error": error}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Play([body], status, "application/json", named, "length")


def answered(body: Any) -> Play:
    return Play([json.dumps(body).encode()], 200, "application/json", {}, "length")


Script = Callable[[Seen], Play]


class Upstream:
    """Answers by its script; `plays` come first, one for each request."""

    def __init__(self, script: Script | None = None) -> None:
        self.plays: list[Play] = []
        self.requests: list[Seen] = []
        self.connections = 0
        self.open = 0
        self.most_open = 0
        self.script = script or (lambda seen: said("Hello", " there"))
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def will(self, *plays: Play) -> Upstream:
        self.plays += plays
        return self

    async def start(self) -> None:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve(reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=1 << 24)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        number = self.connections
        try:
            while (seen := await _read(reader, number)) is not None:
                self.requests.append(seen)
                play = self.plays.pop(0) if self.plays else self.script(seen)
                if not await self._perform(play, seen, reader, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.open -= 1
            writer.close()
            with suppress(ConnectionError, asyncio.CancelledError):
                await writer.wait_closed()

    async def _perform(
        self, play: Play, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Send an answer, and see whether the client leaves meanwhile."""
        leaving = asyncio.ensure_future(_leaves(reader))
        sending = asyncio.ensure_future(_send(play, writer))
        try:
            await asyncio.wait({leaving, sending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            was_cut = not sending.done()
            sending.cancel()
            leaving.cancel()
            [sent, _] = await asyncio.gather(sending, leaving, return_exceptions=True)
        if was_cut or isinstance(sent, ConnectionError):
            seen.left = asyncio.get_running_loop().time()
        seen.over = seen.left is None
        return sent is True and seen.over


async def _leaves(reader: asyncio.StreamReader) -> None:
    # No client sends a second request before its answer: what comes here is the end.
    while True:
        if reader.at_eof() or reader.exception() is not None:
            return
        await asyncio.sleep(0.01)


async def _send(play: Play, writer: asyncio.StreamWriter) -> bool:
    whole = b"".join(step for step in play.steps if isinstance(step, bytes))
    head = dict(play.headers)
    if play.kind:
        head["content-type"] = play.kind
    if play.framing == "chunked":
        head["transfer-encoding"] = "chunked"
    elif play.framing == "length":
        head["content-length"] = str(len(whole))
    else:
        head["connection"] = "close"
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    head_sent = False
    for step in play.steps:
        if step == "drop":
            writer.transport.abort()
            return False
        if isinstance(step, float | int):
            await asyncio.sleep(step)
            continue
        assert isinstance(step, bytes)
        if not head_sent:
            writer.write(f"HTTP/1.1 {play.status} X\r\n{lines}\r\n".encode())
            head_sent = True
        chunked = play.framing == "chunked"
        writer.write(b"%x\r\n%s\r\n" % (len(step), step) if chunked else step)
        await writer.drain()
    if not head_sent:
        writer.write(f"HTTP/1.1 {play.status} X\r\n{lines}\r\n".encode())
    if play.framing == "chunked":
        writer.write(b"0\r\n\r\n")
    await writer.drain()
    return play.framing != "close"


async def _read(reader: asyncio.StreamReader, connection: int) -> Seen | None:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in lines if line)
    }
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    path = first.split(" ")[1]
    return Seen(path, headers, json.loads(body) if body else None, connection)


@asynccontextmanager
async def upstream(*plays: Play, script: Script | None = None) -> AsyncIterator[Upstream]:
    server = Upstream(script).will(*plays)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def eventually(true: Callable[[], bool], within_s: float = 2.0) -> None:
    async with asyncio.timeout(within_s):
        while True:
            if true():
                return
            await asyncio.sleep(0.005)


@contextmanager
def upstream_aside() -> Iterator[Upstream]:
    """Serve from a thread, for several tests; its script and plays can be set from outside."""
    loop, server = asyncio.new_event_loop(), Upstream()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
