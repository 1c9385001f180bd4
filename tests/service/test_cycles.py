"""Models that come and go, again and again (issue 3, must show 5).

The short form is a part of every run; `-m slow` does 500 cycles.
"""

from __future__ import annotations

import asyncio
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
from tests.service.streams import Got, client, post, status, stream

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


async def cycle(http: httpx.AsyncClient, kind: str) -> None:
    """Load, do something, unload."""
    if kind == "loading":
        loading = asyncio.create_task(http.post("/admin/models/load", json={"model": "echo"}))
        await asyncio.sleep(random.Random(kind).random() / 10)
        await post(http, "models/unload", model="echo")
        await loading
        return
    await post(http, "models/load", model="echo")
    if kind == "answered":
        assert (await stream(http, "echo", "hello")).text == "hello"
    got, running = Got(), None
    if "streaming" in kind:
        running = asyncio.create_task(
            stream(http, "echo", "x", got, ignore_eos=True, max_tokens=1_000_000)
        )
        async with asyncio.timeout(20):
            while not got.times:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    if "killed" in kind:
        found = await status(http, "echo")
        os.kill(found["replicas"][0]["pid"], signal.SIGKILL)
    await post(http, "models/unload", model="echo")
    if running is not None:
        await running
        assert got.error is not None
    # What waits for a model loads it; nobody does.
    assert (await status(http, "echo"))["state"] in {"stopped", "created"}


async def cycles(http: httpx.AsyncClient, count: int) -> None:
    for number in range(count):
        await cycle(http, KINDS[number % len(KINDS)])


async def settled(service: Service) -> Held:
    """What it has once all that was going on has ended."""
    held = Held.by(service)
    end = time.monotonic() + 3
    while time.monotonic() < end and held.children:
        await asyncio.sleep(0.1)
        held = Held.by(service)
    await asyncio.sleep(0.5)
    return Held.by(service)


async def compare(folder: Path, warm_up: int, count: int) -> None:
    (folder / "headrace.toml").write_text(CONFIGURATION)
    with served("--config", str(folder / "headrace.toml")) as service:
        async with client(service.url) as http:
            await cycles(http, warm_up)
            before = await settled(service)
            began = time.monotonic()
            await cycles(http, count)
            took_s = time.monotonic() - began
            after = await settled(service)
    print(f"{count} cycles in {took_s:.0f} s: {before} and then {after}")
    assert after.children == before.children == 0
    assert after.fds <= before.fds * 1.02, (before, after)
    assert after.threads <= before.threads * 1.02, (before, after)
    assert after.memory <= before.memory * 1.02, (before, after)


async def test_nothing_is_left_of_models_that_come_and_go(tmp_path: Path) -> None:
    """W8, M2: memory, descriptors, threads and processes are what they were."""
    await compare(tmp_path, 8, 24)


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_nor_after_five_hundred(tmp_path: Path) -> None:
    """W8, M2: the same, 500 times."""
    await compare(tmp_path, 12, 500)
