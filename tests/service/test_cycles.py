"""Models that come and go, again and again (issue 3, must show 5).

The short form is a part of every run; `-m slow` does 500 cycles.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest
from tests.service.serving import Service, served
from tests.service.streams import Got, client, post, status, stream, tell

CONFIGURATION = """
[server]
crashes = 1000000
drain_s = 0.1

[models.echo]
model = "builtin:echo"
preload = false
options = {tokens_per_second = 200, memory = 10000000}
"""
KINDS = ("idle", "answered", "streaming", "killed", "killed streaming", "loading")


class Held(NamedTuple):
    """What the process of the service has."""

    memory: int
    fds: int
    threads: int
    children: int

    @classmethod
    def by(cls, service: Service) -> Held:
        process = psutil.Process(service.process.pid)
        resident = process.memory_info().rss
        return cls(resident, process.num_fds(), process.num_threads(), len(service.children()))


async def cycle(http: httpx.AsyncClient, kind: str, moment: float) -> None:
    """Load, do something, unload."""
    loading = asyncio.create_task(post(http, "models/load", model="echo"))
    if kind == "loading":
        await asyncio.sleep(moment * 0.4)
    else:
        await loading
    got, running = Got(), None
    if kind == "answered":
        assert (await stream(http, "echo", "hello")).text == "hello"
    elif "streaming" in kind:
        more = {"ignore_eos": True, "max_tokens": 1_000_000}
        running = asyncio.create_task(stream(http, "echo", "x", got, **more))
        async with asyncio.timeout(20):
            while not got.times:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    if "killed" in kind:
        found = await status(http, "echo")
        os.kill(found["replicas"][0]["pid"], signal.SIGKILL)
        await asyncio.sleep(moment * 0.4)
    await post(http, "models/unload", model="echo")
    if kind == "streaming" and running is not None:
        await running
        assert got.error is not None
    elif running is not None:
        # His answer goes on in the next worker, for as long as he listens.
        running.cancel()
        await asyncio.wait({running})
    # What was ordered last holds: a load under way is refused.
    with contextlib.suppress(AssertionError):
        await loading
    await post(http, "models/unload", model="echo")


async def cycles(http: httpx.AsyncClient, count: int) -> None:
    dice = random.Random(count)
    for number in range(count):
        async with asyncio.timeout(30):
            await cycle(http, KINDS[number % len(KINDS)], dice.random())


async def settled(service: Service) -> Held:
    """What it has once all that was going on has ended: the spare process, and no other."""
    held = Held.by(service)
    end = time.monotonic() + 5
    while time.monotonic() < end and held.children != 1:
        await asyncio.sleep(0.1)
        held = Held.by(service)
    await asyncio.sleep(0.5)
    return Held.by(service)


async def compare(folder: Path, warm_up: int, count: int) -> None:
    (folder / "headrace.toml").write_text(CONFIGURATION)
    with served("--config", str(folder / "headrace.toml")) as service:
        async with client(service.url) as http:
            # The loop's own pool of threads grows with the need, up to a bound: to that at once.
            await asyncio.gather(*(http.get("/admin/plan?model=echo") for _ in range(64)))
            await cycles(http, warm_up)
        before, began = await settled(service), time.monotonic()
        async with client(service.url) as http:
            await cycles(http, count)
        took_s = time.monotonic() - began
        after = await settled(service)
    tell(f"{count} cycles in {took_s:.0f} s: {before} and then {after}")
    assert after.children == before.children == 1
    assert after.fds <= before.fds * 1.02, (before, after)
    assert after.threads <= before.threads * 1.02, (before, after)
    assert after.memory <= before.memory * 1.02, (before, after)


async def test_nothing_is_left_of_models_that_come_and_go(tmp_path: Path) -> None:
    """W8, M2: memory, descriptors, threads and processes are what they were."""
    await compare(tmp_path, 6, 12)


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_nor_after_five_hundred(tmp_path: Path) -> None:
    """W8, M2: the same, 500 times."""
    await compare(tmp_path, 12, 500)
