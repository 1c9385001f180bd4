"""Many streams at once, as a client sees them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

TIMEOUT = httpx.Timeout(120, connect=10)


@dataclass
class Got:
    """What came of one stream; times are monotonic seconds, one for each piece of text."""

    text: str = ""
    times: list[float] = field(default_factory=list[float])
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict[str, str])
    reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict[str, Any])
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])
    error: dict[str, Any] | None = None
    ended: float = 0.0
    done: bool = False

    def take(self, line: str) -> None:
        if line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            self._chunk(json.loads(line[6:]))

    def _chunk(self, chunk: dict[str, Any]) -> None:
        self.error = chunk.get("error", self.error)
        self.usage = chunk.get("usage") or self.usage
        self.metrics = chunk.get("metrics") or self.metrics
        for choice in chunk.get("choices", ()):
            self.reason = choice["finish_reason"] or self.reason
            if text := choice.get("text", ""):
                self.text += text
                self.times.append(time.monotonic())

    @property
    def gaps(self) -> list[float]:
        """Milliseconds between one piece and the next."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [(after - before) * 1000 for before, after in pairs]


def client(url: str, **more: Any) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=500, max_keepalive_connections=500)
    return httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits, **more)


async def stream(
    http: httpx.AsyncClient, model: str, prompt: str, got: Got | None = None, **more: Any
) -> Got:
    """Ask for a completion and follow it to its end; `got` can be looked at meanwhile."""
    got = got or Got()
    body = {"model": model, "prompt": prompt, "temperature": 0, "stream": True, **more}
    body["stream_options"] = {"include_usage": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        got.status, got.headers = response.status_code, dict(response.headers)
        if response.status_code != 200:
            got.error = json.loads(await response.aread())["error"]
        else:
            async for line in response.aiter_lines():
                got.take(line)
    got.ended = time.monotonic()
    return got


async def status(http: httpx.AsyncClient, model: str) -> dict[str, Any]:
    return (await http.get(f"/admin/models/{model}")).raise_for_status().json()


async def until_ready(http: httpx.AsyncClient, model: str, within_s: float = 60) -> dict[str, Any]:
    end = time.monotonic() + within_s
    while (found := await status(http, model))["state"] != "ready":
        assert time.monotonic() < end, f"{model} is not ready: {found}"
        await asyncio.sleep(0.02)
    return found


async def post(http: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    """Order something of an operator's, and return the answer."""
    answer = await http.post(f"/admin/{path}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@asynccontextmanager
async def events(http: httpx.AsyncClient) -> AsyncIterator[list[dict[str, Any]]]:
    """Collect what happens in the pool, until it is left."""
    got: list[dict[str, Any]] = []
    listening = asyncio.Event()

    async def follow() -> None:
        async with http.stream("GET", "/admin/events") as response:
            async for line in response.aiter_lines():
                listening.set()
                if line.startswith("data: "):
                    got.append(json.loads(line[6:]))

    following = asyncio.create_task(follow())
    try:
        await asyncio.wait_for(listening.wait(), 10)
        yield got
    finally:
        following.cancel()
        await asyncio.wait({following})


async def until(true: Callable[[], Awaitable[bool]], within_s: float = 20) -> None:
    """Ask again and again until it is true."""
    async with asyncio.timeout(within_s):
        while True:
            if await true():
                return
            await asyncio.sleep(0.01)


def tell(figures: str) -> None:
    """Show what was measured to whom runs the tests with -s."""
    print(figures)  # noqa: T201
