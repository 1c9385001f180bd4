"""What open tabs of the console cost the API process, while the service is busy.

One service with 8 echo models answers 8 streams all the time. Windows with 0, 1 and 20 tabs follow
one another, in rounds. A tab polls as the page does: one GET of /admin/overview every 2 s with the
last ETag, on a connection of its own. The CPU time of the API process in a window, less that of the
window of the same round without tabs, is the cost of the tabs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from statistics import median
from typing import Any

import httpx

import report
from headrace.lab import drive
from headrace.lab.drive import Server

EVERY_S = 2.0
TABS = (0, 1, 20)
MOST = {1: 0.01, 20: 0.05}
MODELS, STREAMS = 8, 8
_MODEL = '[models.m{}]\nmodel = "echo"\noptions = {{ tokens_per_second = 25 }}\n'


def client(url: str) -> httpx.AsyncClient:
    """Return a client that reads no certificates, which takes tens of milliseconds of CPU time.

    Twenty of them in a row stop this loop for longer than the server waits for a request on a new
    connection (10 s) when the machine is busy.
    """
    return httpx.AsyncClient(base_url=url, timeout=60, verify=False)


async def stream(url: str, number: int) -> None:
    """Keep one stream running, until cancelled."""
    messages = [{"role": "user", "content": "word " * 400}]
    body = {"model": f"m{number % MODELS}", "messages": messages, "stream": True}
    async with client(url) as http:
        while True:
            async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
                async for _ in answer.aiter_raw():
                    pass


async def tab(url: str, delay_s: float) -> None:
    """Poll as an open page does, until cancelled."""
    await asyncio.sleep(delay_s)
    tag = ""
    async with client(url) as http:
        while True:
            answer = await http.get("/admin/overview", headers={"if-none-match": tag})
            assert answer.status_code in (200, 304), answer.text
            tag = answer.headers["etag"]
            await asyncio.sleep(EVERY_S)


@contextlib.asynccontextmanager
async def running(work: list[asyncio.Task[None]]) -> AsyncGenerator[None]:
    """Let tasks run, and cancel them at the end; none may have ended before."""
    try:
        yield
        for task in work:
            if task.done():
                task.result()
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)


async def share(server: Server, tabs: int, seconds: float) -> float:
    """Return the share of a core that the API process took with so many tabs."""
    delays = [EVERY_S * number / max(tabs, 1) for number in range(tabs)]
    clock = asyncio.get_running_loop().time
    async with running([asyncio.create_task(tab(server.url, delay)) for delay in delays]):
        cpu, began = server.program.cpu(), clock()
        await asyncio.sleep(seconds)
        return (server.program.cpu() - cpu) / (clock() - began)


async def rounds(count: int, seconds: float) -> list[dict[int, float]]:
    """Return the shares of each round, by the number of tabs."""
    with tempfile.TemporaryDirectory() as home:
        file = Path(home) / "headrace.toml"
        file.write_text("".join(map(_MODEL.format, range(MODELS))))
        command = [sys.executable, "-m", "headrace", "serve", "--port", "0", "--json"]
        environment = {"HEADRACE_CONFIG": str(file), "HEADRACE_HOME": home}
        async with drive.server(command, environment, ready="/health/ready") as server:
            streams = [asyncio.create_task(stream(server.url, n)) for n in range(STREAMS)]
            async with running(streams):
                await asyncio.sleep(min(seconds, 5))
                orders = [TABS if number % 2 else TABS[::-1] for number in range(count)]
                return [{n: await share(server, n, seconds) for n in tabs} for tabs in orders]


def table(measured: list[dict[int, float]]) -> str:
    """Return a line for each number of tabs."""
    base = median(shares[0] for shares in measured)
    lines = [f"without a tab: {base:.2%} of a core, for {STREAMS} streams of 25 tokens/s"]
    for tabs, most in MOST.items():
        costs = sorted(shares[tabs] - shares[0] for shares in measured)
        middle, spread = median(costs), f"{costs[0]:+.2%} to {costs[-1]:+.2%}"
        lines.append(f"{tabs} tabs: {middle:+.2%} of a core ({spread}), allowed {most:.0%}")
    return "\n".join(lines)


def is_cheap(measured: list[dict[int, float]]) -> bool:
    """Whether the tabs cost no more than is allowed."""
    costs = {n: median(shares[n] - shares[0] for shares in measured) for n in MOST}
    return all(costs[tabs] <= most for tabs, most in MOST.items())


def main(arguments: list[str] | None = None) -> None:
    """Print the cost of 1 and of 20 tabs; fail if it is more than is allowed."""
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=12.0, help="length of a window")
    options: argparse.Namespace = parser.parse_args(arguments)
    conditions = report.Conditions()
    count, seconds = (1, 2.5) if options.quick else (options.rounds, options.seconds)
    measured = asyncio.run(rounds(count, seconds))
    facts = report.machine()
    text = f"{table(measured)}\n{report.describe(facts)}\n{conditions}"
    print(text)
    record: dict[str, Any] = {"machine": facts, "rounds": measured}
    report.write("console-tabs", text, record, options)
    if not (options.quick or is_cheap(measured)):
        sys.exit(1)


if __name__ == "__main__":
    main()
