"""A cheap load client: the events of streams are counted, and hardly parsed.

As a program (`command`) it is a process of its own, so that its CPU time is not that of the
process that measures. It reads one command a line, `{"do": NAME, ...}`, and answers each with one
line of JSON. The commands are the public methods of `Load`, and their fields the parameters.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec

from headrace.lab.http import Broken, Headers, Http, place

PATH = "/v1/completions"
WORDS = (
    *("river", "stone", "mill", "water", "wheel", "bridge", "valley", "winter", "bread", "flour"),
    *("grain", "farmer", "market", "road", "horse", "child", "music", "letter", "window", "ship"),
)
_TAIL = 4096
_LONGEST_LINE = 1 << 28


class Stream:
    """One streamed answer: its times, in seconds of `perf_counter`, and its number of events.

    An event ends with an empty line, or is a line of JSON; comments count too, but a stream begins
    with its first data.
    `times` are those of reads with data.
    """

    def __init__(self) -> None:
        self.status = 0
        self.events = 0
        self.reads = 0
        self.tail = b""
        self.times: list[float] = []
        self.began_at = time.perf_counter()
        self.over_at = 0.0
        self.began = asyncio.Event()
        self.over = asyncio.Event()
        self._read_at = 0.0
        self._is_lines = False

    def head(self, status: int, headers: Headers) -> None:
        """Keep the status, and whether events are lines of JSON."""
        self.status = status
        self._is_lines = headers.get("content-type") == "application/x-ndjson"

    def body(self, data: bytes, at: float) -> None:
        """Count events; the end of one may be split over two pieces."""
        if self._is_lines:
            self.events += data.count(b"\n")
        else:
            split = self.tail[-1:] == b"\n" and data[:1] == b"\n"
            self.events += data.count(b"\n\n") + split
        if at != self._read_at:
            self._read_at = at
            self.reads += 1
        if (self._is_lines or b"data: " in data) and at not in self.times[-1:]:
            self.times.append(at)
        self.tail = data if len(data) > _TAIL // 2 else (self.tail + data)[-_TAIL:]
        if self.times and not self.began.is_set():
            self.began.set()

    async def run(self, http: Http, path: str, body: bytes) -> None:
        """Send the request and read the answer to its end, or until the connection is lost."""
        self.began_at = time.perf_counter()
        try:
            with contextlib.suppress(Broken):
                await http.send(path, body, self)
        finally:
            self.over_at = time.perf_counter()
            self.began.set()
            self.over.set()

    @property
    def first_s(self) -> float | None:
        """Seconds to the first data."""
        return self.times[0] - self.began_at if self.times else None

    def timing(self) -> dict[str, Any]:
        """Return the times: of the first data, of the last, and between two reads."""
        gaps = [round(later - earlier, 5) for earlier, later in pairwise(self.times)]
        last = self.times[-1] if self.times else None
        return {"first": self.first_s, "last": last, "gaps": gaps, "events": self.events}


class Load:
    """The open streams of one service."""

    def __init__(self) -> None:
        self._http: Http | None = None
        self._streams: list[Stream] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._began_at = 0.0

    async def open(
        self,
        url: str,
        bodies: Sequence[dict[str, Any]],
        path: str = PATH,
        key: str | None = None,
    ) -> dict[str, Any]:
        """Start a stream for each body, on a new connection, and wait for the first event of all.

        `key` is the API key, if one is needed.

        Returns:
            As `count`.
        """
        await self.close()
        self._http = http = Http(place(url), key)
        self._streams = [Stream() for _ in bodies]
        payloads = [msgspec.json.encode(body) for body in bodies]
        self._began_at = time.perf_counter()
        self._tasks = [
            asyncio.create_task(stream.run(http, path, payload))
            for stream, payload in zip(self._streams, payloads, strict=True)
        ]
        await asyncio.gather(*(stream.began.wait() for stream in self._streams))
        return await self.count()

    async def count(self) -> dict[str, Any]:
        """Return how many events and reads there were so far, and how many streams still run."""
        return {
            "at": time.perf_counter(),
            "events": sum(stream.events for stream in self._streams),
            "reads": sum(stream.reads for stream in self._streams),
            "running": sum(not stream.over.is_set() for stream in self._streams),
        }

    async def drain(self, *, times: bool = False) -> dict[str, Any]:
        """Wait for the end of all streams, and return the last bytes of each.

        `seconds` are from the first connection to the last byte. With `times`, `streams` has the
        times of each stream, and `began` that of the first connection.
        """
        await asyncio.gather(*(stream.over.wait() for stream in self._streams))
        last = max((stream.over_at for stream in self._streams), default=self._began_at)
        tails = [stream.tail.decode(errors="replace") for stream in self._streams]
        answer = {**await self.count(), "seconds": last - self._began_at, "tails": tails}
        if times:
            answer["began"] = self._began_at
            answer["streams"] = [stream.timing() for stream in self._streams]
        return answer

    async def close(self) -> dict[str, Any]:
        """Close all streams."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._http is not None:
            self._http.close()
        self._http, self._streams, self._tasks = None, [], []
        return {}

    async def arrive(
        self, urls: Sequence[str], body: dict[str, Any], rate: float, seconds: float
    ) -> dict[str, Any]:
        """Send `rate` requests/s to each of several services, evenly and in turn; wait for all.

        Returns:
            `first` and `whole` of each service: milliseconds to the first data and to the end.
        """
        payload, pause = msgspec.json.encode(body), 1 / rate / len(urls)
        streams: list[list[Stream]] = [[] for _ in urls]
        began = time.perf_counter()

        async def ask(number: int) -> None:
            # Each request has its own connection.
            http, stream = Http(place(urls[number])), Stream()
            streams[number].append(stream)
            await stream.run(http, PATH, payload)
            http.close()

        async with asyncio.TaskGroup() as tasks:
            for number in range(int(seconds / pause)):
                await asyncio.sleep(began + number * pause - time.perf_counter())
                tasks.create_task(ask(number % len(urls)))
        return {"services": [_waits(answers) for answers in streams]}


def prompt(source: random.Random, words: int = 124) -> str:
    """Return a text with a random first word; 124 words are about 130 tokens."""
    return f"{source.randrange(10**6)} " + " ".join(source.choices(WORDS, k=words))


def command() -> list[str]:
    """Return the command that runs a `Load` as a process, for `drive.program`."""
    return [sys.executable, "-P", "-m", "headrace.lab.load"]


def _waits(streams: Sequence[Stream]) -> dict[str, list[float]]:
    return {
        "first": [1000 * (stream.first_s or 0.0) for stream in streams],
        "whole": [1000 * (stream.over_at - stream.began_at) for stream in streams],
    }


async def _serve() -> None:
    event_loop, load = asyncio.get_running_loop(), Load()
    reader = asyncio.StreamReader(limit=_LONGEST_LINE)
    await event_loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        fields: dict[str, Any] = msgspec.json.decode(line)
        answer = await getattr(load, fields.pop("do"))(**fields)
        sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve())
